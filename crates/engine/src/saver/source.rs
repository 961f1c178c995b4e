//! Access to the contents of a region: in a shared file that the saver maps, or in the address space of a process.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::SMALL_PAGE;
use crate::mapping::{Mapping, walk};
use crate::space::Space;
use crate::uapi::{PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PmScanArg};

/// Origin of the contents of a region.
#[derive(Debug, Clone)]
pub enum PageOrigin {
    /// Memory file, accessed through our mapping.
    Shared(Arc<Mapping>),
    /// Memory of a process, read with process_vm_readv(2).
    Process(ProcessRange),
}

/// Range of the address space of a process.
#[derive(Debug, Clone)]
pub struct ProcessRange {
    /// Address space of the process.
    pub space: Arc<Space>,
    /// Address of the first byte, page aligned.
    pub address: u64,
    /// Length in bytes, page aligned.
    pub len: usize,
}

impl PageOrigin {
    /// Returns the length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        match self {
            Self::Shared(mapping) => mapping.len(),
            Self::Process(range) => range.len,
        }
    }

    /// Returns the number of base pages.
    pub fn pages(&self) -> usize {
        self.len() / SMALL_PAGE
    }

    /// Returns the descriptor of the memory file, or `None` for memory of a process.
    pub fn file(&self) -> Option<RawFd> {
        match self {
            Self::Shared(mapping) => Some(mapping.file()),
            Self::Process(_) => None,
        }
    }

    /// Returns the ranges that are present in memory or swap, as (start, end) in bytes.
    ///
    /// # Errors
    /// Errors of lseek(2) or PAGEMAP_SCAN.
    pub fn data_ranges(&self) -> io::Result<Vec<(usize, usize)>> {
        match self {
            Self::Shared(mapping) => mapping.data_ranges(),
            Self::Process(range) => range.data_within(0, range.len),
        }
    }

    /// Like [`data_ranges`](Self::data_ranges), but only within `[start, end)` (bytes). Not for files in hugetlbfs,
    /// where lseek(2) reports the whole file as data.
    ///
    /// # Errors
    /// Errors of lseek(2) or PAGEMAP_SCAN.
    pub fn data_within(&self, start: usize, end: usize) -> io::Result<Vec<(usize, usize)>> {
        match self {
            Self::Shared(mapping) => mapping.data_within(start, end),
            Self::Process(range) => range.data_within(start, end),
        }
    }

    /// Returns whether the page at byte `start` is present in memory or swap. Always true for files in hugetlbfs.
    pub(super) fn is_data(&self, start: usize) -> io::Result<bool> {
        match self {
            Self::Shared(mapping) => mapping.is_data(start),
            Self::Process(range) => range.data_within(start, start + SMALL_PAGE).map(|found| !found.is_empty()),
        }
    }

    /// Returns whether a present page contains only zeros.
    pub(super) fn is_zero(&self, page: usize) -> io::Result<bool> {
        match self {
            Self::Shared(mapping) => Ok(mapping.is_zero(page)),
            Self::Process(range) => {
                let mut bytes = vec![0; SMALL_PAGE];
                range.read(page * SMALL_PAGE, &mut bytes)?;
                Ok(crate::block::is_zero(&bytes))
            }
        }
    }

    /// Copies whole pages from byte `start` on into `target`. If the workload writes to the pages during the call, the
    /// copy may be torn.
    pub(super) fn read(&self, start: usize, target: &mut [u8]) -> io::Result<()> {
        let mapping = match self {
            Self::Process(range) => return range.read(start, target),
            Self::Shared(mapping) => mapping,
        };
        let first = start / SMALL_PAGE;
        assert!(first + target.len() / SMALL_PAGE <= mapping.pages(), "pages beyond the mapping");
        // SAFETY: the pages lie within the mapping, by the assertion; the target is exclusively borrowed. The pages do
        // not change if the workload is paused, or if they are protected synchronously in every mapping but ours.
        // Otherwise the copy may be torn: a trace then reports the write, and the caller does not use the copy.
        unsafe { std::ptr::copy_nonoverlapping(mapping.page(first), target.as_mut_ptr(), target.len()) };
        Ok(())
    }
}

impl ProcessRange {
    fn data_within(&self, start: usize, end: usize) -> io::Result<Vec<(usize, usize)>> {
        let mut ranges = Vec::new();
        let (start, end) = (self.address + start as u64, self.address + end as u64);
        let offset = |address: u64| usize::try_from(address - self.address).unwrap_or(usize::MAX);
        let what = PmScanArg { category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED, ..Default::default() };
        walk(self.space.pagemap(), start, end, what, |start, end| ranges.push((offset(start), offset(end))))?;
        Ok(ranges)
    }

    fn read(&self, start: usize, target: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < target.len() {
            let rest = &mut target[done..];
            let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
            let address = self.address + (start + done) as u64;
            let remote = libc::iovec { iov_base: address as *mut libc::c_void, iov_len: rest.len() };
            // SAFETY: the local buffer is exclusively borrowed. The kernel checks the remote address.
            let got = unsafe { libc::process_vm_readv(self.space.pid(), &raw const local, 1, &raw const remote, 1, 0) };
            match usize::try_from(got) {
                Ok(0) => return Err(io::Error::from_raw_os_error(libc::EFAULT)),
                Ok(bytes) => done += bytes,
                Err(_) => return Err(io::Error::last_os_error()),
            }
        }
        Ok(())
    }
}
