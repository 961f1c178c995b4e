//! Address spaces: what is mapped, large mappings, and calls made inside other processes.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::mapping::scan;
use crate::uapi::{self, Userfault, check, owned};

mod inject;
mod rseq;

pub use inject::AdoptError;

/// Faults that a userfaultfd is needed for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Faults {
    /// All that wait for us, those of system calls and of KVM too. One for faults of user mode only would not do: system
    /// calls would fail (EFAULT) where the program's own accesses wait.
    All,
    /// Only faults that the kernel resolves itself (asynchronous write traces): one for user mode only will do.
    Resolved,
}

/// The address space of a process, ours or another's.
#[derive(Debug)]
pub struct Space {
    pid: libc::pid_t,
    pidfd: OwnedFd,
    pagemap: File,
}

impl Space {
    /// Opens the address space of `pid`. Nothing is done to the process.
    ///
    /// # Errors
    /// ESRCH when there is no such process, EACCES without the right to trace it.
    pub fn open(pid: libc::pid_t) -> io::Result<Self> {
        // SAFETY: takes no pointers; the descriptor is new.
        let pidfd = unsafe { owned(libc::syscall(libc::SYS_pidfd_open, pid, 0)) }?;
        let pagemap = File::open(format!("/proc/{pid}/pagemap"))?;
        Ok(Self { pid, pidfd, pagemap })
    }

    /// The process.
    pub fn pid(&self) -> libc::pid_t {
        self.pid
    }

    /// Its pagemap, for PAGEMAP_SCAN.
    pub fn pagemap(&self) -> &File {
        &self.pagemap
    }

    fn is_own(&self) -> bool {
        u32::try_from(self.pid).is_ok_and(|pid| pid == std::process::id())
    }

    /// A userfaultfd of this address space with `features`, held by us alone: when we die, what is registered with it
    /// is released.
    ///
    /// Ours is simply made. Another process is stopped for less than a millisecond (one thread of it, by ptrace), makes
    /// the descriptor itself and closes it again once we hold a copy.
    pub fn userfault(&self, features: u64) -> Result<Userfault, AdoptError> {
        let uffd = if self.is_own() {
            Userfault::own().map_err(|error| self.refused(error))?
        } else {
            inject::on_stopped(self.pid, |stopped| self.userfault_in(stopped))?
        };
        uffd.enable(features)?;
        Ok(uffd)
    }

    /// As `userfault`, but never one for which system calls of the process fail (EFAULT) where its own accesses wait.
    ///
    /// # Errors
    /// [`AdoptError::NoFaults`] where the process may not have such a userfaultfd.
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

    /// A userfaultfd of this address space with `features`, of which the process keeps its own copy (its number there
    /// is the second value; none for our own process): when we die, whoever waits for a page goes on waiting.
    ///
    /// `wanted`: features that it has where the kernel has all of them.
    ///
    /// # Errors
    /// [`AdoptError::NoFaults`] where the process may not have one for these `faults`.
    pub fn kept_userfault(
        &self,
        features: u64,
        wanted: u64,
        faults: Faults,
    ) -> Result<(Userfault, Option<u64>), AdoptError> {
        // A refusal leaves it as it was.
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

    /// Has the stopped process create a userfaultfd for these faults. Returns our copy of it, and its number there.
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
        // SAFETY: takes no pointers; the descriptor is new.
        match unsafe { owned(libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), remote, 0)) } {
            Ok(ours) => Ok((Userfault::from_fd(ours), remote)),
            Err(error) => {
                stopped.call(libc::SYS_close, [remote, 0, 0, 0, 0, 0])?;
                Err(error.into())
            }
        }
    }

    /// Makes a system call in the process, as it would itself: `call` with up to six plain arguments.
    ///
    /// # Errors
    /// [`AdoptError::Call`] with the errno the call ended in, the others when it could not be made.
    pub fn call(&self, number: libc::c_long, arguments: [u64; 6]) -> Result<u64, AdoptError> {
        inject::on_stopped(self.pid, |stopped| {
            self.check_alive()?;
            stopped.call(number, arguments)
        })
    }

    /// Refuses a process that merely got the number of one that ended. Once stopped by us it keeps its number.
    fn check_alive(&self) -> Result<(), AdoptError> {
        let mut poll = libc::pollfd { fd: self.pidfd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        loop {
            // SAFETY: one pollfd that lives through the call.
            match check(unsafe { libc::poll(&raw mut poll, 1, 0) }) {
                Ok(0) => return Ok(()),
                Ok(_) => return Err(AdoptError::Gone(self.pid)),
                // A signal of ours that came just now.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Puts `[address, address + len)` on large pages (MADV_COLLAPSE): what already stands on a large page is only
    /// mapped as one, the rest is copied to one. Works on the process from outside.
    pub fn collapse(&self, address: u64, len: u64) -> io::Result<()> {
        self.advise(address, len, libc::MADV_COLLAPSE)
    }

    /// Advises on a range from outside: MADV_COLD, PAGEOUT, WILLNEED or COLLAPSE; others are EINVAL.
    pub fn advise(&self, address: u64, len: u64, advice: libc::c_int) -> io::Result<()> {
        // Of others' memory the kernel takes no other advice; of our own, some kernels take any.
        if !matches!(advice, libc::MADV_COLD | libc::MADV_PAGEOUT | libc::MADV_WILLNEED | libc::MADV_COLLAPSE) {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        let range = libc::iovec {
            iov_base: address as *mut libc::c_void,
            iov_len: usize::try_from(len).map_err(io::Error::other)?,
        };
        let flags: libc::c_uint = 0;
        // SAFETY: the address is only looked up in the other address space; these advices keep contents.
        let result = unsafe {
            libc::syscall(libc::SYS_process_madvise, self.pidfd.as_raw_fd(), &raw const range, 1usize, advice, flags)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Takes the mappings of a range of shared memory away, from the page tables of this process alone; contents stay.
    ///
    /// # Errors
    /// As for [`Space::call`].
    pub fn unmap_pages(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        if !self.is_own() {
            let advice = libc::MADV_DONTNEED_LOCKED.unsigned_abs();
            return self.call(libc::SYS_madvise, [address, len, u64::from(advice), 0, 0, 0]).map(drop);
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: of shared memory no byte changes, by this function's contract.
        check(unsafe { libc::madvise(address as *mut libc::c_void, len, libc::MADV_DONTNEED_LOCKED) })?;
        Ok(())
    }

    /// Maps the pages of a range of shared memory in the process, as if it had read them (MADV_POPULATE_READ).
    ///
    /// # Errors
    /// As for [`Space::call`].
    pub fn populate_read(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        if !self.is_own() {
            let advice = u64::from(libc::MADV_POPULATE_READ.unsigned_abs());
            return self.call(libc::SYS_madvise, [address, len, advice, 0, 0, 0]).map(drop);
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: maps pages, changes no byte.
        check(unsafe { libc::madvise(address as *mut libc::c_void, len, libc::MADV_POPULATE_READ) })?;
        Ok(())
    }

    /// The parts of a range that are mapped as large pages, as (start, end).
    pub fn large_mapped(&self, address: u64, len: u64) -> io::Result<Vec<(u64, u64)>> {
        let mut runs = Vec::new();
        let categories = uapi::PAGE_IS_HUGE | uapi::PAGE_IS_PRESENT;
        scan(&self.pagemap, address, address + len, 0, categories, |start, end| runs.push((start, end)))?;
        Ok(runs)
    }

    /// A duplicate of a descriptor of the process.
    pub fn descriptor(&self, fd: libc::c_int) -> io::Result<OwnedFd> {
        // SAFETY: takes no pointers; the descriptor is new.
        unsafe { owned(libc::syscall(libc::SYS_pidfd_getfd, self.pidfd.as_raw_fd(), fd, 0)) }
    }
}
