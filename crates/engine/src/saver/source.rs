//! Where the contents of a region are read: in a shared file that we map too, or in the address space of a process.

use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;

use crate::SMALL_PAGE;
use crate::mapping::{Mapping, walk};
use crate::space::Space;
use crate::uapi::{PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PmScanArg};

/// A region's contents.
#[derive(Debug, Clone)]
pub enum Source {
    /// In a file that is mapped here.
    Shared(Arc<Mapping>),
    /// In a process, at an address: any memory that it may read.
    Process(ProcessRange),
}

/// A stretch of the address space of a process.
#[derive(Debug, Clone)]
pub struct ProcessRange {
    /// Whose.
    pub space: Arc<Space>,
    /// First byte, page aligned.
    pub address: u64,
    /// Bytes, page aligned.
    pub len: usize,
}

impl Source {
    /// Bytes.
    #[expect(clippy::len_without_is_empty, reason = "never empty")]
    pub fn len(&self) -> usize {
        match self {
            Self::Shared(mapping) => mapping.len(),
            Self::Process(range) => range.len,
        }
    }

    /// Small pages.
    pub fn pages(&self) -> usize {
        self.len() / SMALL_PAGE
    }

    /// The file behind it.
    pub fn file(&self) -> Option<RawFd> {
        match self {
            Self::Shared(mapping) => Some(mapping.file()),
            Self::Process(_) => None,
        }
    }

    /// The parts that are in memory (or swap), as (start, end) in bytes.
    pub fn data_ranges(&self) -> io::Result<Vec<(usize, usize)>> {
        match self {
            Self::Shared(mapping) => mapping.data_ranges(),
            Self::Process(range) => range.data_within(0, range.len),
        }
    }

    /// Those of `[start, end)`. Not for hugetlbfs files.
    pub fn data_within(&self, start: usize, end: usize) -> io::Result<Vec<(usize, usize)>> {
        match self {
            Self::Shared(mapping) => mapping.data_within(start, end),
            Self::Process(range) => range.data_within(start, end),
        }
    }

    /// Whether a page is in memory (or swap).
    pub(super) fn is_data(&self, start: usize) -> io::Result<bool> {
        match self {
            Self::Shared(mapping) => mapping.is_data(start),
            Self::Process(range) => range.data_within(start, start + SMALL_PAGE).map(|found| !found.is_empty()),
        }
    }

    /// Whether a page that is in memory has nothing but zeros.
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

    /// Copies whole pages from `start` on, which nobody writes to meanwhile.
    pub(super) fn read(&self, start: usize, target: &mut [u8]) -> io::Result<()> {
        let mapping = match self {
            Self::Process(range) => return range.read(start, target),
            Self::Shared(mapping) => mapping,
        };
        let first = start / SMALL_PAGE;
        assert!(first + target.len() / SMALL_PAGE <= mapping.pages(), "pages beyond the mapping");
        // SAFETY: the pages are within the mapping, by the assertion; the target is ours. Nobody writes to the pages:
        // they are protected in every mapping but ours, or the workload is paused.
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
            // SAFETY: the local part is a slice of ours; the remote one is only looked up in the other address space.
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
