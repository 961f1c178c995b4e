//! Address spaces of processes: mappings, huge pages, and system calls inside other processes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::mapping::scan;
use crate::uapi::{self, Userfault, check, owned};

pub(crate) mod apart;
mod calls;
mod inject;
mod remap;
mod rseq;

pub use calls::Advice;
pub use inject::AdoptError;

/// Faults that a userfaultfd must handle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// All faults that user space resolves, including those of system calls and of KVM. With a userfaultfd for
    /// user-mode faults only, a system call would fail with EFAULT where a user-mode access waits.
    All,
    /// Only faults that the kernel resolves (asynchronous write traces), for which user-mode faults suffice.
    Resolved,
}

/// Address space of a process, our own or another one.
#[derive(Debug)]
pub struct Space {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    pagemap: File,
}

impl Space {
    /// Opens the address space of `pid`, without affecting the process.
    ///
    /// # Errors
    /// ESRCH if there is no such process, EACCES without permission to trace it.
    pub fn open(pid: libc::pid_t) -> io::Result<Self> {
        // SAFETY: pidfd_open takes no pointers; the descriptor it returns is new and has no other owner.
        let pidfd = unsafe { owned(libc::syscall(libc::SYS_pidfd_open, pid, 0)) }?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { pid, pidfd, pagemap })
    }

    /// Returns the process ID.
    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Returns the pagemap, for PAGEMAP_SCAN.
    pub fn pagemap(&self) -> &File {
        &self.pagemap
    }

    fn is_own(&self) -> bool {
        u32::try_from(self.pid).is_ok_and(|pid| pid == std::process::id())
    }

    /// Creates a userfaultfd of this address space with `features`. Our process holds the only reference: when our
    /// process exits, the kernel removes all registrations.
    ///
    /// In another process, ptrace stops one thread for less than a millisecond. The thread creates the descriptor, and
    /// closes it after our process has duplicated it.
    ///
    /// # Errors
    /// [`AdoptError`] if the process cannot be adopted or is not permitted to create a userfaultfd.
    pub fn userfault(&self, features: u64) -> Result<Userfault, AdoptError> {
        let uffd = if self.is_own() {
            Userfault::own().map_err(|error| self.refused(error))?
        } else {
            inject::on_stopped(self.pid, |stopped| self.userfault_in(stopped))?
        };
        uffd.enable(features)?;
        Ok(uffd)
    }

    /// Like `userfault`, but the userfaultfd always handles faults in kernel mode as well. With a userfaultfd for
    /// user-mode faults only, system calls of the process would fail with EFAULT.
    ///
    /// # Errors
    /// [`AdoptError`] if the process cannot be adopted; [`AdoptError::NoFaults`] if it is not permitted to create such
    /// a userfaultfd.
    pub fn full_userfault(&self, features: u64) -> Result<Userfault, AdoptError> {
        let uffd = if self.is_own() {
            Userfault::own_full().map_err(|error| self.refused(error))?
        } else {
            inject::on_stopped(self.pid, |stopped| {
                let (ours, remote) = self.make_userfault(stopped, Faults::All)?;
                stopped.call(libc::SYS_close, [remote, 0, 0, 0, 0, 0])?;
                Ok(ours)
            })?
        };
        uffd.enable(features)?;
        Ok(uffd)
    }

    fn refused(&self, error: io::Error) -> AdoptError {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES | libc::ENOSYS) => AdoptError::NoFaults(self.pid, error),
            _ => error.into(),
        }
    }

    /// Creates a userfaultfd of this address space with `features`. The process keeps a copy of the descriptor: if our
    /// process exits, threads that wait for a page stay blocked. Returns our descriptor, and the number of the copy in
    /// the process; `None` for our own process.
    ///
    /// `wanted` are additional features, enabled if the kernel supports all of them.
    ///
    /// # Errors
    /// [`AdoptError`] if the process cannot be adopted; [`AdoptError::NoFaults`] if it is not permitted to create a
    /// userfaultfd for these `faults`.
    pub fn kept_userfault(
        &self,
        features: u64,
        wanted: u64,
        faults: Faults,
    ) -> Result<(Userfault, Option<u64>), AdoptError> {
        // A rejected UFFDIO_API leaves the descriptor unchanged.
        let enable = |uffd: &Userfault| uffd.enable(features | wanted).or_else(|_| uffd.enable(features));
        if self.is_own() {
            let made = if faults == Faults::All { Userfault::own_full() } else { Userfault::own() };
            let uffd = made.map_err(|error| self.refused(error))?;
            enable(&uffd)?;
            return Ok((uffd, None));
        }
        inject::on_stopped(self.pid, |stopped| {
            let (uffd, remote) = self.make_userfault(stopped, faults)?;
            if let Err(error) = enable(&uffd) {
                stopped.call(libc::SYS_close, [remote, 0, 0, 0, 0, 0])?;
                return Err(error.into());
            }
            Ok((uffd, Some(remote)))
        })
    }

    fn userfault_in(&self, stopped: &inject::Stopped) -> Result<Userfault, AdoptError> {
        let (ours, remote) = self.make_userfault(stopped, Faults::Resolved)?;
        stopped.call(libc::SYS_close, [remote, 0, 0, 0, 0, 0])?;
        Ok(ours)
    }

    /// Makes the stopped process create a userfaultfd for these faults. Returns our copy, and the number of the
    /// descriptor in the process.
    fn make_userfault(&self, stopped: &inject::Stopped, faults: Faults) -> Result<(Userfault, u64), AdoptError> {
        self.check_alive()?;
        let flags = u64::from(uapi::UFFD_FLAGS.cast_unsigned());
        let made = stopped.call(libc::SYS_userfaultfd, [flags, 0, 0, 0, 0, 0]).or_else(|error| match error {
            AdoptError::Call(error) => {
                let limited = flags | u64::from(uapi::UFFD_USER_MODE_ONLY.cast_unsigned());
                let other = match stopped.userfault_of_device(flags) {
                    Err(AdoptError::Call(_)) if faults == Faults::Resolved => {
                        stopped.call(libc::SYS_userfaultfd, [limited, 0, 0, 0, 0, 0])
                    }
                    other => other,
                };
                other.map_err(|other| if matches!(other, AdoptError::Call(_)) { self.refused(error) } else { other })
            }
            error => Err(error),
        });
        let remote = made?;
        // SAFETY: pidfd_getfd takes no pointers; the descriptor it returns is new and has no other owner.
        match unsafe { owned(libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), remote, 0)) } {
            Ok(ours) => Ok((Userfault::from_fd(ours), remote)),
            Err(error) => {
                stopped.call(libc::SYS_close, [remote, 0, 0, 0, 0, 0])?;
                Err(error.into())
            }
        }
    }

    /// Fails if the process has exited, because another process may have reused its ID. A stopped process keeps its ID.
    fn check_alive(&self) -> Result<(), AdoptError> {
        let mut poll = libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        loop {
            // SAFETY: the pollfd lives through the call, and the count is 1.
            match check(unsafe { libc::poll(&raw mut poll, 1, 0) }) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(AdoptError::Gone(self.pid)),
                // A signal to our process has interrupted the call.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Returns the parts of a range that are mapped as huge pages, as (start, end).
    ///
    /// # Errors
    /// The error of PAGEMAP_SCAN.
    pub fn large_mapped(&self, address: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
        self.pages_in(address, len, uapi::PAGE_IS_HUGE | uapi::PAGE_IS_PRESENT)
    }

    /// Returns the parts of a range whose pages are mapped, as (start, end).
    ///
    /// # Errors
    /// The error of PAGEMAP_SCAN.
    pub fn present(&self, address: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
        self.pages_in(address, len, uapi::PAGE_IS_PRESENT)
    }

    fn pages_in(&self, address: u64, len: u64, categories: u64) -> io::Result<Vec<(u64, u64)>> {
        let mut runs = Vec::new();
        scan(&self.pagemap, address, address + len, 0, categories, |start, end| runs.push((start, end)))?;
        Ok(runs)
    }

    /// Returns a duplicate of a descriptor of the process.
    ///
    /// # Errors
    /// The error of pidfd_getfd(2).
    pub fn descriptor(&self, fd: libc::c_int) -> io::Result<OwnedFd> {
        // SAFETY: pidfd_getfd takes no pointers; the descriptor it returns is new and has no other owner.
        unsafe { owned(libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), fd, 0)) }
    }
}
