//! Activity of large pages (S3): which of their small pages a workload accesses within a window.
//!
//! Only the *mapping* of a large page is split for the window; the page itself stays whole. How accesses show depends
//! on what is behind it:
//!
//! * Shared memory: protecting one small page (userfaultfd, asynchronous) replaces the large mapping by an empty page
//!   table, and the mark left in it keeps later faults from mapping more than they were asked for; a registered range
//!   is not mapped ahead either. What is present at the end of the window has been accessed, reads and writes alike.
//! * Private memory: splitting keeps the small pages mapped. MADV_COLD over all of it clears their accessed bits, and
//!   flushes, so that the processor sets them again; `Referenced` in smaps then counts them. A registered page is a
//!   mapping of its own there, which is what makes it a count per large page.
//!
//! Nothing that a workload writes is ever held up or undone. When we die the descriptor goes, and with it every
//! protection; the mappings that were split then stay small until khugepaged, or another sample, finds them.

use std::io;
use std::sync::Arc;

use parking_lot::Mutex;

use crate::mapping::scan;
use crate::space::{AdoptError, Space};
use crate::uapi::{self, Userfault};
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE, trace};

/// How often to try to get a large mapping back while something (a pin, the LRU) is in the way.
const ATTEMPTS: usize = 5;

/// The small pages of a large one, as bits: page n is bit n % 64 of word n / 64.
pub type Touched = [u64; SLOTS / 64];

/// Large pages of one address space, held for sampling. Dropping it restores them.
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
    /// Adopts the process, once for any number of windows.
    ///
    /// # Errors
    /// When the process cannot be adopted.
    pub fn new(space: Arc<Space>) -> Result<Self, AdoptError> {
        let uffd = space.userfault(trace::FEATURES)?;
        Ok(Self { space, uffd, held: Mutex::default() })
    }

    fn held(&self) -> parking_lot::MutexGuard<'_, Vec<Held>> {
        self.held.lock()
    }

    /// Makes each page (addresses at 2 MiB boundaries) a mapping of its own. Its large mapping stays. Returns those
    /// that cannot be held because they are not mapped any more.
    ///
    /// # Errors
    /// EBUSY when somebody else's userfaultfd has it. What was held before the error is held, and restored.
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

    /// Splits the mappings of held pages. On shared memory (`marked`) the mark stays until they are restored.
    ///
    /// # Errors
    /// Those of the kernel; InvalidInput for a page that is not held.
    pub fn split(&self, pages: &[u64], marked: bool) -> io::Result<()> {
        let mut held = self.held();
        for &address in pages {
            let Some(page) = held.iter_mut().find(|held| held.address == address) else {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("{address:#x} is not held")));
            };
            page.split = true;
            self.uffd.write_protect(address, SMALL_PAGE as u64, true)?;
            if !marked {
                self.uffd.write_protect(address, SMALL_PAGE as u64, false)?;
            }
        }
        Ok(())
    }

    /// Clears the accessed bits of pages, and makes the processors notice (MADV_COLD). Locked memory keeps them.
    pub fn cool(&self, pages: &[u64]) -> io::Result<()> {
        for &address in pages {
            match self.space.advise(address, LARGE_PAGE as u64, libc::MADV_COLD) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOMEM)) => {}
                other => other?,
            }
        }
        Ok(())
    }

    /// Which small pages of each page are mapped.
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

    /// Lets go of all pages and maps those that were split as large ones again. Returns those that stay small, and why.
    pub fn restore(&self) -> Vec<(u64, io::Error)> {
        let held = std::mem::take(&mut *self.held());
        let mut small = Vec::new();
        for Held { address, split } in held {
            // Fails when the mapping, or the process, is gone: then collapse says so.
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
