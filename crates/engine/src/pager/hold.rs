//! Others at the workload's page tables while contents are still to come: a migration, a checkpoint (S8).
//!
//! Memory is registered with one userfaultfd at a time, and that must stay ours: without it missing pages would be
//! zeros. So who needs a write trace (S2) puts it on by ours, which is asynchronous for that. Meanwhile we do not end,
//! and pages whose contents come are mapped write-protected: they are as they were saved until somebody writes to them.
//! Whatever else we map counts as written, so that nothing can be missed; and so does everything once protections go.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use parking_lot::MutexGuard;

use super::memory::{Memory, Watched};
use super::{Pager, Shared};
use crate::uapi::{REGISTER_MODE_MINOR, REGISTER_MODE_MISSING, REGISTER_MODE_WP};

/// Whether somebody else works on the page tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Nobody: it ends when everything is there.
    No,
    /// Somebody: it waits.
    Yes,
    /// Nobody can any more: it ends.
    Ending,
}

impl Shared {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock()
    }

    /// Whether it may end now that everything is there; from then on nobody can hold it.
    pub(super) fn may_end(&self) -> bool {
        let mut held = self.held();
        if *held == Held::No {
            *held = Held::Ending;
        }
        *held == Held::Ending
    }

    /// Whether there is no use in looking whether everything is there.
    pub(super) fn is_held(&self) -> bool {
        *self.held() == Held::Yes
    }
}

impl Pager {
    /// Lets somebody put write traces on the watched memory, by [`Pager::userfaults`], until [`Pager::release`]. False:
    /// everything is there, and the memory is, or will soon be, registered no more.
    ///
    /// # Errors
    /// EBUSY when somebody else does so already, EINVAL where the kernel cannot, ESRCH when a process has ended.
    pub fn hold(&self) -> io::Result<bool> {
        let memory = &self.shared.memory;
        let mut held = self.shared.held();
        match *held {
            Held::Ending => return Ok(false),
            Held::Yes => return Err(io::Error::from_raw_os_error(libc::EBUSY)),
            Held::No => {}
        }
        for Watched { segment, uffd } in &memory.watched {
            // Takes the place of the registration that is there: in between nothing is without one.
            let mode = REGISTER_MODE_MISSING | REGISTER_MODE_MINOR | REGISTER_MODE_WP;
            uffd.register(segment.address, segment.len, mode)?;
        }
        memory.protecting.store(true, Ordering::Release);
        *held = Held::Yes;
        Ok(true)
    }

    /// Takes the traces off, and ends when everything is there.
    pub fn release(&self) {
        let mut held = self.shared.held();
        if *held == Held::Yes {
            self.shared.memory.protecting.store(false, Ordering::Release);
            unprotect(&self.shared.memory);
            *held = Held::No;
        }
    }

    /// Our userfaultfd of each process.
    pub fn userfaults(&self) -> Vec<(libc::pid_t, RawFd)> {
        let number = |Watched { segment, uffd }: &Watched| (segment.space.pid(), uffd.as_raw_fd());
        self.shared.memory.watched.iter().map(number).collect()
    }
}

/// Takes off whatever protections there are. An error is of a process that has ended, or of memory without any.
pub fn unprotect(memory: &Memory) {
    for Watched { segment, uffd } in &memory.watched {
        let _ = uffd.write_protect(segment.address, segment.len, false);
    }
}
