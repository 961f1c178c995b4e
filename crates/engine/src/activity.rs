//! Activity of huge pages (S3): the base pages of a huge page that a workload accesses within a window.
//!
//! Only the PMD *mapping* of a huge page is split for the window; the page stays whole. The method depends on the type
//! of memory:
//!
//! * Shared memory: protecting one base page (userfaultfd, asynchronous) replaces the PMD mapping with a page table
//!   that contains only a marker for the protected page. The marker prevents a later fault from mapping more than one
//!   page. Fault-around maps no other pages either, because the range is registered. Pages that are mapped at the end
//!   of the window have been read or written.
//! * Private memory: after the split, the base pages stay mapped. MADV_COLD clears their accessed bits and flushes the
//!   TLB, so the processor sets the bit of each page that is accessed later. `Referenced` in smaps counts these pages.
//!   Each registered huge page is a separate mapping, so smaps reports one count per huge page.
//!
//! The workload is never blocked, and no write is lost. If the process of the sampler exits, the kernel closes the
//! userfaultfd and removes every protection. Split mappings then stay split until khugepaged or another sampler
//! collapses them.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::mapping::scan;
use crate::space::{AdoptError, Space};
use crate::uapi::{self, Userfault};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE, trace};

/// Maximum number of attempts to collapse a mapping whose pages are pinned or isolated from the LRU list.
const ATTEMPTS: usize = 5;

/// Base pages of a huge page, as a bitmap: page n is bit n % 64 of word n / 64.
pub type Touched = [u64; SLOTS / 64];

/// Huge pages of one address space, registered for sampling. Dropping the sampler unregisters them and collapses the
/// split mappings.
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
    /// Creates a sampler for any number of windows. Adopts the process of the address space.
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

    /// Registers huge pages, given by their addresses. Each huge page becomes a separate mapping; its PMD mapping is
    /// not split. Returns the addresses that are no longer mapped.
    ///
    /// # Errors
    /// EBUSY if a page is registered with another userfaultfd; otherwise the error of UFFDIO_REGISTER. Pages registered
    /// before the error are restored on drop.
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

    /// Splits the PMD mappings of registered huge pages. If `marked` is true, the marker of the protected page stays
    /// until [`restore`](Self::restore), as shared memory requires.
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

    /// Clears the accessed bits of huge pages and flushes the TLB (MADV_COLD). Has no effect on locked or unmapped
    /// memory.
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

    /// Returns the mapped base pages of each huge page.
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

    /// Unregisters all huge pages, and collapses the mappings that were split. Returns the addresses of the mappings
    /// that stay split, with the errors.
    pub fn restore(&self) -> Vec<(u64, io::Error)> {
        let held = std::mem::take(&mut *self.held());
        let mut small = Vec::new();
        for Held { address, split } in held {
            // This fails if the range is no longer mapped or the process has exited; the collapse then reports the
            // error.
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
