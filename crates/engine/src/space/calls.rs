//! Single system calls in an address space. They are made directly in our own process, and injected into another
//! process.

use std::io;
use std::os::fd::AsRawFd;

use super::{AdoptError, Space, inject};
use crate::uapi::check;

/// Advice about a range of memory, named as in madvise(2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "documented by madvise(2)")]
pub enum Advice {
    Cold,
    Collapse,
    Dofork,
    Dontdump,
    Dontfork,
    Hugepage,
    Mergeable,
    Nohugepage,
    Pageout,
    PopulateRead,
    PopulateWrite,
    Unmergeable,
}

impl Advice {
    fn number(self) -> libc::c_int {
        match self {
            Self::Cold => libc::MADV_COLD,
            Self::Collapse => libc::MADV_COLLAPSE,
            Self::Dofork => libc::MADV_DOFORK,
            Self::Dontdump => libc::MADV_DONTDUMP,
            Self::Dontfork => libc::MADV_DONTFORK,
            Self::Hugepage => libc::MADV_HUGEPAGE,
            Self::Mergeable => libc::MADV_MERGEABLE,
            Self::Nohugepage => libc::MADV_NOHUGEPAGE,
            Self::Pageout => libc::MADV_PAGEOUT,
            Self::PopulateRead => libc::MADV_POPULATE_READ,
            Self::PopulateWrite => libc::MADV_POPULATE_WRITE,
            Self::Unmergeable => libc::MADV_UNMERGEABLE,
        }
    }

    /// Returns whether process_madvise(2) accepts the advice for another process.
    fn is_remote(self) -> bool {
        matches!(self, Self::Cold | Self::Collapse | Self::Pageout)
    }
}

impl Space {
    /// Advises the kernel about a range. For another process, `Cold`, `Collapse` and `Pageout` use process_madvise(2),
    /// which does not stop the process; the process itself executes all other advice.
    ///
    /// # Errors
    /// [`AdoptError::Call`] or [`AdoptError::Io`] with the errno of the call; other errors if the call could not be
    /// executed.
    pub fn madvise(&self, address: u64, len: u64, advice: Advice) -> Result<(), AdoptError> {
        if advice.is_remote() && !self.is_own() {
            return self.process_madvise(address, len, advice).map_err(Into::into);
        }
        self.execute_madvise(address, len, advice.number())
    }

    /// Backs `[address, address + len)` by huge pages (MADV_COLLAPSE). Existing huge pages are only mapped by PMD
    /// entries; base pages are copied. Does not stop the process.
    ///
    /// # Errors
    /// The error of process_madvise(2).
    pub fn collapse(&self, address: u64, len: u64) -> io::Result<()> {
        self.process_madvise(address, len, Advice::Collapse)
    }

    /// Clears the accessed bits of a range and flushes the TLB (MADV_COLD). Does not stop the process.
    ///
    /// # Errors
    /// The error of process_madvise(2).
    pub fn cool(&self, address: u64, len: u64) -> io::Result<()> {
        self.process_madvise(address, len, Advice::Cold)
    }

    fn process_madvise(&self, address: u64, len: u64, advice: Advice) -> io::Result<()> {
        let range = libc::iovec {
            iov_base: address as *mut libc::c_void,
            iov_len: usize::try_from(len).map_err(io::Error::other)?,
        };
        let (pidfd, number, flags) = (self.pidfd.as_raw_fd(), advice.number(), libc::c_uint::MIN);
        // SAFETY: the iovec lives through the call. The kernel interprets the address in the other address space; this
        // advice does not change contents.
        let result =
            unsafe { libc::syscall(libc::SYS_process_madvise, pidfd, &raw const range, 1usize, number, flags) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Removes the pages of a range of shared memory from the page tables of the process (MADV_DONTNEED_LOCKED). The
    /// contents are not affected.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn unmap_pages(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        self.execute_madvise(address, len, libc::MADV_DONTNEED_LOCKED)
    }

    /// Maps the pages of a range of shared memory in the process, as if the process had read them (MADV_POPULATE_READ).
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn populate_read(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        self.execute_madvise(address, len, libc::MADV_POPULATE_READ)
    }

    fn execute_madvise(&self, address: u64, len: u64, advice: libc::c_int) -> Result<(), AdoptError> {
        if !self.is_own() {
            let advice = u64::from(advice.unsigned_abs());
            return self.inject(libc::SYS_madvise, [address, len, advice, 0, 0, 0]).map(drop);
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: no `Advice` changes contents, and neither does unmapping shared memory.
        check(unsafe { libc::madvise(address as *mut libc::c_void, len, advice) })?;
        Ok(())
    }

    /// Makes a mapping read-only.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn make_read_only(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        if !self.is_own() {
            let protection = u64::from(libc::PROT_READ.unsigned_abs());
            return self.inject(libc::SYS_mprotect, [address, len, protection, 0, 0, 0]).map(drop);
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: mprotect does not change contents; a later write raises SIGSEGV.
        check(unsafe { libc::mprotect(address as *mut libc::c_void, len, libc::PROT_READ) })?;
        Ok(())
    }

    /// Maps `len` bytes of private memory at an address that the kernel chooses. Returns the address.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn mmap(&self, len: u64) -> Result<u64, AdoptError> {
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        if !self.is_own() {
            let (protection, flags) = (u64::from(protection.unsigned_abs()), u64::from(flags.unsigned_abs()));
            return self.inject(libc::SYS_mmap, [0, len, protection, flags, u64::MAX, 0]);
        }
        let len = usize::try_from(len).map_err(io::Error::other)?;
        // SAFETY: mmap creates a new mapping at an address chosen by the kernel, so no existing mapping is affected.
        let address = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, -1, 0) };
        if address == libc::MAP_FAILED { Err(io::Error::last_os_error().into()) } else { Ok(address as u64) }
    }

    /// Unmaps a range of another process.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn munmap(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        self.inject(libc::SYS_munmap, [address, len, 0, 0, 0, 0]).map(drop)
    }

    /// Makes another process call ioctl(2). `argument` is a number, or an address in that process. Returns the result.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn ioctl(&self, fd: libc::c_int, request: u64, argument: u64) -> Result<u64, AdoptError> {
        self.inject(libc::SYS_ioctl, [u64::from(fd.cast_unsigned()), request, argument, 0, 0, 0])
    }

    /// Closes a descriptor of another process.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn close_fd(&self, fd: libc::c_int) -> Result<(), AdoptError> {
        self.inject(libc::SYS_close, [u64::from(fd.cast_unsigned()), 0, 0, 0, 0, 0]).map(drop)
    }

    /// Makes another process execute getppid(2), which verifies that system calls can be injected. Returns the result.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn getppid(&self) -> Result<u64, AdoptError> {
        self.inject(libc::SYS_getppid, [0; 6])
    }

    /// Makes another process execute a system call, given by its number and arguments.
    pub(super) fn inject(&self, number: libc::c_long, arguments: [u64; 6]) -> Result<u64, AdoptError> {
        inject::on_stopped(self.pid, |stopped| {
            self.check_alive()?;
            stopped.call(number, arguments)
        })
    }
}
