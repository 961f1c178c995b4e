//! Lending of the pager's userfaultfd, for write traces of memory with deferred contents (S8).
//!
//! Memory can be registered with only one userfaultfd at a time. During a restore, this must be the userfaultfd of the
//! pager, because deferred pages would otherwise read as zeros. A migration or a checkpoint therefore installs its
//! write trace (S2) through the pager's userfaultfd, which is in asynchronous mode for this purpose. While the pager is
//! acquired, it does not finish, and maps pages write-protected when it installs their contents. These pages count as
//! unchanged until the workload writes to them. All other pages that the pager maps count as written, so that no write
//! is missed. After the protections have been removed, all pages count as written.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::memory::{Installer, Memory, Watched};
use super::{Pager, PagerState};
use crate::uapi::{REGISTER_MODE_MINOR, REGISTER_MODE_MISSING, REGISTER_MODE_WP};

/// Whether the pager is acquired, that is, whether its userfaultfd is used for a write trace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Not acquired: the pager finishes when all pages are loaded.
    No,
    /// Acquired: the pager keeps running.
    Yes,
    /// Unavailable: the pager is finishing or has finished.
    Ending,
}

impl PagerState {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }

    /// Returns whether the pager may finish, because it is not acquired. If so, it can no longer be acquired.
    pub(super) fn may_end(&self) -> bool {
        let mut held = self.held();
        if *held == Held::No {
            *held = Held::Ending;
        }
        *held == Held::Ending
    }

    /// Returns whether the pager is acquired and therefore cannot finish.
    pub(super) fn is_held(&self) -> bool {
        *self.held() == Held::Yes
    }
}

impl Pager {
    /// Acquires the pager. Until [`Pager::release`], write traces can be installed on the watched memory through
    /// [`Pager::userfaults`]. Returns false if the pager is finishing or has finished, because the memory is then
    /// unregistered.
    ///
    /// # Errors
    /// EBUSY if the pager is already acquired, EINVAL if the kernel cannot write-protect the memory or if the memory is
    /// private, ESRCH if a process has exited.
    pub fn hold(&self) -> io::Result<bool> {
        let memory = &self.shared.loader.memory;
        if matches!(memory.installer, Installer::Private(_)) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let mut held = self.shared.held();
        match *held {
            Held::Ending => return Ok(false),
            Held::Yes => return Err(io::Error::from_raw_os_error(libc::EBUSY)),
            Held::No => {}
        }
        for Watched { segment, uffd } in &memory.watched {
            // This extends the existing registration, so that memory is registered at all times.
            let mode = REGISTER_MODE_MISSING | REGISTER_MODE_MINOR | REGISTER_MODE_WP;
            uffd.register(segment.address, segment.len, mode)?;
        }
        memory.protecting.store(true, Ordering::Release);
        *held = Held::Yes;
        Ok(true)
    }

    /// Releases the pager: removes the write protections, and allows the pager to finish when all pages are loaded.
    pub fn release(&self) {
        let mut held = self.shared.held();
        if *held == Held::Yes {
            self.shared.loader.memory.protecting.store(false, Ordering::Release);
            unprotect(&self.shared.loader.memory);
            *held = Held::No;
        }
    }

    /// Returns the process ID and the pager's userfaultfd of that process, for each watched segment.
    pub fn userfaults(&self) -> Vec<(libc::pid_t, RawFd)> {
        let number = |Watched { segment, uffd }: &Watched| (segment.space.pid(), uffd.as_raw_fd());
        self.shared.loader.memory.watched.iter().map(number).collect()
    }
}

/// Removes all write protections. Ignores errors, which occur only for exited processes and for memory that is not
/// registered for write protection.
pub fn unprotect(memory: &Memory) {
    for Watched { segment, uffd } in &memory.watched {
        let _ = uffd.write_protect(segment.address, segment.len, false);
    }
}
