//! Installation of contents in private memory of a workload, such as the memory of a virtual machine monitor that has
//! sent its userfaultfd.
//!
//! The pager cannot map private memory. UFFDIO_COPY writes a page and maps it in one step, unless the page is present,
//! so no thread of the workload sees a page without its contents. The deferred bit is cleared afterwards. Pages that
//! are neither deferred nor present are zeros: they were zeros in the image, or have been removed since.
//!
//! While the event of a removal (MADV_DONTNEED) has not been read, the kernel refuses to install pages. After the event
//! has been read and before the removal is recorded, it would accept them, and a removed page would get its old
//! contents back. Contents are therefore installed with [`Memory::removing`] held shared, for a bounded number of pages
//! at a time. A thread whose pages are refused ([`LoadError::Removing`]) must not wait: it may be the one that reads the
//! event.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::memory::{LoadError, Memory, Watched};
use crate::placer::PlaceError;
use crate::segment::Segment;
use crate::uapi::Userfault;
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Maximum number of base pages per call, which bounds the time for which a removal waits.
const MAX_COPY: usize = 64;
/// Number of locks of huge pages. A huge page always uses the same lock.
const LOCKS: usize = 64;

/// State for the installation of contents in private memory.
#[derive(Debug)]
pub struct PrivateMemory {
    /// Locks of huge pages: one thread loads a huge page.
    loading: [Mutex<()>; LOCKS],
    /// Huge page of zeros.
    zeros: OnceLock<Vec<u8>>,
}

impl PrivateMemory {
    pub fn new() -> Self {
        Self { loading: [const { Mutex::new(()) }; LOCKS], zeros: OnceLock::new() }
    }

    /// Returns the lock of the huge page that begins at page `first`.
    pub fn loading(&self, first: usize) -> &Mutex<()> {
        &self.loading[first / (LARGE_PAGE / SMALL_PAGE) % LOCKS]
    }

    /// Maps zeros at the pages of a range that are not present, and wakes the threads that wait for them. If the
    /// address space is changing, or without memory, only wakes them: they fault again.
    ///
    /// # Errors
    /// The error of UFFDIO_ZEROPAGE or UFFDIO_COPY, such as ESRCH if the process has exited.
    pub fn map_zeros(&self, uffd: &Userfault, start: u64, len: u64, page: u64) -> io::Result<()> {
        if page == SMALL_PAGE as u64 {
            return uffd.map_zeros(start, len);
        }
        // The kernel has no page of zeros for hugetlbfs.
        let zeros = self.zeros.get_or_init(|| vec![0; LARGE_PAGE]);
        for address in (start..start + len).step_by(zeros.len()) {
            match uffd.install(address, zeros).1 {
                Err(error) if !is_transient(&error) => return Err(error),
                _ => {}
            }
        }
        uffd.wake(start, len)
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EEXIST | libc::EAGAIN | libc::ENOMEM))
}

impl Memory {
    /// Installs the pages of `run`, which are consecutive, each with the offset of its contents. Skips pages that are
    /// present or claimed by another thread. Returns the number of pages that this thread has installed.
    pub(super) fn copy_run(&self, region: usize, run: &[(usize, usize)], contents: &[u8]) -> Result<u64, LoadError> {
        let adjacent = |one: &(usize, usize), next: &(usize, usize)| next.1 == one.1 + SMALL_PAGE;
        let mut done = 0;
        for part in run.chunk_by(adjacent).flat_map(|part| part.chunks(MAX_COPY)) {
            let from = part[0].1;
            done += self.copy_pages(region, part[0].0, &contents[from..from + part.len() * SMALL_PAGE])?;
        }
        Ok(done)
    }

    /// Installs consecutive pages from page `first` on.
    fn copy_pages(&self, region: usize, first: usize, contents: &[u8]) -> Result<u64, LoadError> {
        let (mut at, end, mut done) = (first, first + contents.len() / SMALL_PAGE, 0);
        let _no_removals = self.no_removals();
        while at < end {
            if !self.claim(at) {
                at += 1;
                continue;
            }
            let (watched, address, limit) =
                self.place(region, at, end).inspect_err(|_| self.claims.take_run(at, at + 1))?;
            let stop = (at + 1..limit).find(|&page| !self.claim(page)).unwrap_or(limit);
            let part = &contents[(at - first) * SMALL_PAGE..(stop - first) * SMALL_PAGE];
            let (copied, result) = watched.uffd.install(address, part);
            let mut installed = at + copied / SMALL_PAGE;
            let failed = match result {
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                    // A pager that was killed has installed the page.
                    let _ = watched.uffd.wake(address + copied as u64, SMALL_PAGE as u64);
                    installed += 1;
                    None
                }
                result => result.err(),
            };
            self.flags.clear_all(at, installed);
            self.claims.take_run(installed, stop);
            done += (installed - at) as u64;
            self.counters.loaded.fetch_add((installed - at) as u64, Ordering::Relaxed);
            if let Some(error) = failed {
                return Err(refused(region, (installed - self.regions[region].base, end), error));
            }
            at = installed;
        }
        Ok(done)
    }

    /// Installs the huge page `[first, end)` with these contents, unless none of its base pages is deferred. Returns
    /// the number of base pages that were deferred.
    pub(super) fn copy_huge(&self, region: usize, first: usize, contents: &[u8]) -> Result<u64, LoadError> {
        let end = first + contents.len() / SMALL_PAGE;
        let _no_removals = self.no_removals();
        let deferred = (first..end).filter(|&page| self.flags.is_set(page)).count() as u64;
        if deferred == 0 {
            return Ok(0);
        }
        let (watched, address, _) = self.place(region, first, end)?;
        match watched.uffd.install(address, contents).1 {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                let _ = watched.uffd.wake(address, contents.len() as u64);
            }
            Err(error) => return Err(refused(region, (first - self.regions[region].base, end), error)),
            Ok(()) => {}
        }
        self.flags.clear_all(first, end);
        self.counters.loaded.fetch_add(deferred, Ordering::Relaxed);
        Ok(deferred)
    }

    /// Returns the mapping of a page, the address of the page in it, and the end of the pages of `[page, end)` that the
    /// mapping contains.
    fn place(&self, region: usize, page: usize, end: usize) -> Result<(&Watched, u64, usize), LoadError> {
        let base = self.regions[region].base;
        let (page, end) = (page - base, end - base);
        let contains = |segment: &Segment| segment.region == region && segment.touches(page, page + 1);
        let found = self.watched.iter().find(|watched| contains(&watched.segment));
        let part = found.and_then(|watched| Some((watched, watched.segment.part(page, end)?)));
        let Some((watched, (address, len))) = part else {
            let error = io::Error::from_raw_os_error(libc::ENOENT);
            return Err(refused(region, (page, end), error));
        };
        let pages = usize::try_from(len).unwrap_or(usize::MAX) / SMALL_PAGE;
        Ok((watched, address, base + page + pages))
    }
}

/// Returns the error for pages of a region that the kernel did not install.
fn refused(region: usize, (first, end): (usize, usize), error: io::Error) -> LoadError {
    match error.raw_os_error() {
        Some(libc::EAGAIN) => LoadError::Removing,
        Some(libc::ESRCH) => LoadError::Exited,
        Some(libc::ENOMEM | libc::ENOSPC) => PlaceError::Memory { region, first, end, error }.into(),
        _ => LoadError::Unmapped { region, first, end, error: error.to_string() },
    }
}
