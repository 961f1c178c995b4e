//! Activity of huge pages (S3): the base pages of a huge page that a workload accesses within a window.
//!
//! Only the PMD *mapping* of a huge page is split for the window; the page stays whole. The method depends on the
//! memory:
//!
//! * Shared memory: protecting one base page (userfaultfd, asynchronous) replaces the PMD mapping by an empty page
//!   table. The marker left in it keeps later faults from mapping more than one page, and a registered range is not
//!   mapped around a fault either. Pages present at the end of the window have been read or written.
//! * Private memory: after the split, the base pages stay mapped. MADV_COLD clears their accessed bits and flushes the
//!   TLB, so that the processor sets them again; `Referenced` in smaps then counts them. Each registered huge page is a
//!   separate mapping, so that smaps reports one count per huge page.
//!
//! The workload is never blocked, and no write is undone. If the sampler exits, its descriptor is closed, and the
//! kernel removes every protection. Split mappings then stay split until khugepaged or another sample collapses them.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::mapping::scan;
use crate::space::{AdoptError, Space};
use crate::uapi::{self, Userfault};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE, trace};

/// Number of attempts to collapse a mapping that is pinned or isolated from the LRU.
const ATTEMPTS: usize = 5;

/// Base pages of a huge page, as a bitmap: page n is bit n % 64 of word n / 64.
pub type Touched = [u64; SLOTS / 64];

/// Huge pages of one address space, registered for sampling. Dropping it restores them.
#[derive(Debug)]
pub struct Sampler {
    space: Arc<Space>,
    uffd: Userfault,
    held: Mutex<Vec<Held>>,
}

#[derive(Debug, Clone, Copy)]
struct Held {
    address: u64,
    split: bool,
}

impl Sampler {
    /// Adopts the process for any number of windows.
    ///
    /// # Errors
    /// If the process cannot be adopted.
    pub fn new(space: Arc<Space>) -> Result<Self, AdoptError> {
        let uffd = space.userfault(trace::FEATURES)?;
        Ok(Self { space, uffd, held: Mutex::default() })
    }

    fn held(&self) -> parking_lot::MutexGuard<'_, Vec<Held>> {
        self.held.lock()
    }

    /// Registers huge pages (given by their addresses), which makes each one a separate mapping without splitting it.
    /// Returns those that are no longer mapped.
    ///
    /// # Errors
    /// EBUSY if a page is registered with another userfaultfd. Pages registered before the error are restored on drop.
    pub fn hold(&self, pages: &[u64]) -> io::Result<Vec<u64>> {
        let (mut held, mut gone) = (self.held(), Vec::new());
        for &address in pages {
            match self.uffd.register(address, LARGE_PAGE as u64, uapi::REGISTER_MODE_WP) {
                Ok(()) => held.push(Held { address, split: false }),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => gone.push(address),
                Err(error) => return Err(error),
            }
        }
        Ok(gone)
    }

    /// Splits the mappings of registered pages. In shared memory (`marked`), the marker stays until they are restored.
    ///
    /// # Errors
    /// The error of UFFDIO_WRITEPROTECT; `InvalidInput` if a page is not registered.
    pub fn split(&self, pages: &[u64], marked: bool) -> io::Result<()> {
        let mut held = self.held();
        for &address in pages {
            let Some(page) = held.iter_mut().find(|held| held.address == address) else {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidInput,
                    format!("cannot split {address:#x}: not registered"),
                ));
            };
            page.split = true;
            self.uffd.write_protect(address, SMALL_PAGE as u64, true)?;
            if !marked {
                self.uffd.write_protect(address, SMALL_PAGE as u64, false)?;
            }
        }
        Ok(())
    }

    /// Clears the accessed bits of pages and flushes the TLB (MADV_COLD). Has no effect on locked memory.
    ///
    /// # Errors
    /// The error of process_madvise(2), other than EINVAL and ENOMEM.
    pub fn cool(&self, pages: &[u64]) -> io::Result<()> {
        for &address in pages {
            match self.space.cool(address, LARGE_PAGE as u64) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Returns which base pages of each page are mapped.
    ///
    /// # Errors
    /// The error of PAGEMAP_SCAN.
    pub fn touched(&self, pages: &[u64]) -> io::Result<Vec<Touched>> {
        pages.iter().map(|&address| self.touched_in(address)).collect()
    }

    fn touched_in(&self, address: u64) -> io::Result<Touched> {
        let mut bits = Touched::default();
        let end = address + LARGE_PAGE as u64;
        scan(self.space.pagemap(), address, end, 0, uapi::PAGE_IS_PRESENT, |start, end| {
            let slot = |at: u64| usize::try_from((at - address) / SMALL_PAGE as u64).unwrap_or(0);
            (slot(start)..slot(end)).for_each(|slot| bits[slot / 64] |= 1 << (slot % 64));
        })?;
        Ok(bits)
    }

    /// Unregisters all pages and maps those that were split as huge pages again. Returns those that stay split, and
    /// why.
    pub fn restore(&self) -> Vec<(u64, io::Error)> {
        let held = std::mem::take(&mut *self.held());
        let mut small = Vec::new();
        for Held { address, split } in held {
            // Fails if the mapping is gone or the process has exited; the collapse then reports it.
            let _ = self.uffd.unregister(address, LARGE_PAGE as u64);
            if split && let Err(error) = self.collapse(address) {
                small.push((address, error));
            }
        }
        small
    }

    fn collapse(&self, address: u64) -> io::Result<()> {
        let mut result = self.space.collapse(address, LARGE_PAGE as u64);
        for _ in 1..ATTEMPTS {
            match &result {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EBUSY)) => {
                    std::thread::yield_now();
                    result = self.space.collapse(address, LARGE_PAGE as u64);
                }
                _ => break,
            }
        }
        result
    }
}

impl Drop for Sampler {
    fn drop(&mut self) {
        self.restore();
    }
}
