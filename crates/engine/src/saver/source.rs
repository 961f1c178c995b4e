//! Access to the contents of a region: in a shared file that the saver maps, or in the address space of a process.
//!
//! The memory of a clone consists of private pages over a base. Only its private pages are data: all other pages equal
//! the image of the base. PAGEMAP_SCAN finds the private pages, because a page that a write has copied is no longer a
//! page of the file. Pages of zeros that the pager has mapped are private pages too. For a migration that sends all
//! pages of a clone, its base and its private pages are one source.

use std::fs::File;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use crate::SMALL_PAGE;
use crate::mapping::{Mapping, data_of, walk};
use crate::pages::PageSet;
use crate::space::Space;
use crate::uapi::{PAGE_IS_FILE, PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, PmScanArg};

/// Origin of the contents of a region.
#[derive(Debug, Clone)]
pub enum PageOrigin {
    /// Memory file, accessed through our mapping.
    Shared(Arc<Mapping>),
    /// Memory of a process, read with process_vm_readv(2).
    Process(ProcessRange),
    /// Private mapping of a base in a process. Its private pages are data.
    Private(ProcessRange),
    /// Private mapping of a base in a process, with the pages of the base. Both are data.
    Overlay(Overlay),
}

/// Private pages of a process over a part of the file of their base.
#[derive(Debug, Clone)]
pub struct Overlay {
    /// File of the base. It is read with pread(2): a mapping of it could fill its holes with zeros.
    pub base: Arc<File>,
    /// Start of the range in the base, bytes.
    pub offset: u64,
    /// Private mapping of the range.
    pub private: ProcessRange,
}

impl From<Arc<Mapping>> for PageOrigin {
    fn from(mapping: Arc<Mapping>) -> Self {
        Self::Shared(mapping)
    }
}

/// Selects the pages in memory or swap.
fn present() -> PmScanArg {
    PmScanArg { category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED, ..Default::default() }
}

/// Selects the private pages of a file mapping that belong to all of `categories`.
pub(crate) fn private(categories: u64) -> PmScanArg {
    PmScanArg { category_inverted: PAGE_IS_FILE, category_mask: PAGE_IS_FILE | categories, ..present() }
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
            Self::Process(range) | Self::Private(range) => range.len,
            Self::Overlay(overlay) => overlay.private.len,
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
            Self::Process(_) | Self::Private(_) | Self::Overlay(_) => None,
        }
    }

    /// Returns whether pages that are not data equal those of a base. Otherwise, they are zeros.
    pub fn is_private(&self) -> bool {
        matches!(self, Self::Private(_))
    }

    /// Returns the ranges that are present in memory or swap, as (start, end) in bytes. For a private mapping of a
    /// base, returns the private pages.
    ///
    /// # Errors
    /// Errors of lseek(2) or PAGEMAP_SCAN.
    pub fn data_ranges(&self) -> io::Result<Vec<(usize, usize)>> {
        match self {
            Self::Shared(mapping) => mapping.data_ranges(),
            Self::Process(_) | Self::Private(_) | Self::Overlay(_) => self.data_within(0, self.len()),
        }
    }

    /// Returns the pages in data ranges (see [`data_ranges`](Self::data_ranges)).
    ///
    /// # Errors
    /// Errors of lseek(2) or PAGEMAP_SCAN.
    pub fn data_pages(&self) -> io::Result<PageSet> {
        let mut data = PageSet::new(self.pages());
        for (start, end) in self.data_ranges()? {
            data.insert(start / SMALL_PAGE, end.div_ceil(SMALL_PAGE));
        }
        Ok(data)
    }

    /// Like [`data_ranges`](Self::data_ranges), but only within `[start, end)` (bytes). Must not be called for files in
    /// hugetlbfs, where lseek(2) reports the whole file as data.
    ///
    /// # Errors
    /// Errors of lseek(2) or PAGEMAP_SCAN.
    pub fn data_within(&self, start: usize, end: usize) -> io::Result<Vec<(usize, usize)>> {
        match self {
            Self::Shared(mapping) => mapping.data_within(start, end),
            Self::Process(range) => range.pages_within(start, end, present()),
            Self::Private(range) => range.pages_within(start, end, private(0)),
            Self::Overlay(overlay) => overlay.data_within(start, end),
        }
    }

    /// Returns the data ranges within `[start, end)` (bytes) that are known to be zeros without being read.
    ///
    /// # Errors
    /// The error of PAGEMAP_SCAN.
    pub(super) fn zeros_within(&self, start: usize, end: usize) -> io::Result<Vec<(usize, usize)>> {
        match self {
            Self::Private(range) => range.pages_within(start, end, private(PAGE_IS_PFNZERO)),
            Self::Shared(_) | Self::Process(_) | Self::Overlay(_) => Ok(Vec::new()),
        }
    }

    /// Copies the private pages into `bytes`, which contains whole pages of the base from byte `start` on.
    ///
    /// # Errors
    /// Errors of PAGEMAP_SCAN and process_vm_readv(2).
    pub fn overlay(&self, start: usize, bytes: &mut [u8]) -> io::Result<()> {
        for (from, to) in self.data_within(start, start + bytes.len())? {
            self.read(from, &mut bytes[from - start..to - start])?;
        }
        Ok(())
    }

    /// Returns whether the page at byte `start` is present in memory or swap. The result is always true for files in
    /// hugetlbfs.
    pub(super) fn is_data(&self, start: usize) -> io::Result<bool> {
        match self {
            Self::Shared(mapping) => mapping.is_data(start),
            Self::Process(_) | Self::Private(_) | Self::Overlay(_) => {
                self.data_within(start, start + SMALL_PAGE).map(|found| !found.is_empty())
            }
        }
    }

    /// Returns whether a present page contains only zeros.
    pub(super) fn is_zero(&self, page: usize) -> io::Result<bool> {
        match self {
            Self::Shared(mapping) => Ok(mapping.is_zero(page)),
            Self::Process(_) | Self::Private(_) | Self::Overlay(_) => {
                let mut bytes = vec![0; SMALL_PAGE];
                self.read(page * SMALL_PAGE, &mut bytes)?;
                Ok(crate::block::is_zero(&bytes))
            }
        }
    }

    /// Like [`read`](Self::read), but does not read data pages that are known to be zeros.
    pub(crate) fn fetch(&self, start: usize, target: &mut [u8]) -> io::Result<()> {
        let end = start + target.len();
        let mut at = start;
        for (zero, stop) in self.zeros_within(start, end)?.into_iter().chain(std::iter::once((end, end))) {
            if at < zero {
                self.read(at, &mut target[at - start..zero - start])?;
            }
            target[zero - start..stop - start].fill(0);
            at = stop;
        }
        Ok(())
    }

    /// Copies whole pages from byte `start` on into `target`. If the workload writes to the pages during the call, the
    /// copy may be torn.
    pub(super) fn read(&self, start: usize, target: &mut [u8]) -> io::Result<()> {
        let mapping = match self {
            Self::Process(range) | Self::Private(range) => return range.read(start, target),
            Self::Overlay(overlay) => return overlay.read(start, target),
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

impl Overlay {
    fn data_within(&self, start: usize, end: usize) -> io::Result<Vec<(usize, usize)>> {
        let mut data = PageSet::new(self.private.len / SMALL_PAGE);
        let base = data_of(&self.base, self.offset + start as u64, self.offset + end as u64)?;
        let bytes = |position: u64| usize::try_from(position - self.offset).unwrap_or(usize::MAX);
        let base = base.into_iter().map(|(from, to)| (bytes(from), bytes(to)));
        for (from, to) in base.chain(self.private.pages_within(start, end, private(0))?) {
            data.insert(from / SMALL_PAGE, to.div_ceil(SMALL_PAGE));
        }
        Ok(data.runs().map(|(first, last)| (first * SMALL_PAGE, last * SMALL_PAGE)).collect())
    }

    fn read(&self, start: usize, target: &mut [u8]) -> io::Result<()> {
        self.base.read_exact_at(target, self.offset + start as u64)?;
        for (from, to) in self.private.pages_within(start, start + target.len(), private(0))? {
            self.private.read(from, &mut target[from - start..to - start])?;
        }
        Ok(())
    }
}

impl ProcessRange {
    fn pages_within(&self, start: usize, end: usize, what: PmScanArg) -> io::Result<Vec<(usize, usize)>> {
        let mut ranges = Vec::new();
        let (start, end) = (self.address + start as u64, self.address + end as u64);
        let offset = |address: u64| usize::try_from(address - self.address).unwrap_or(usize::MAX);
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
