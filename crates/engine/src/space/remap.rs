//! Replacement of shared memory of another process by a private mapping of a base file.

use super::{AdoptError, Space};

impl Space {
    /// Replaces the mappings of `[address, address + len)` by a private mapping of a file. The mapping is not
    /// accessible until [`Space::make_writable`] is called. `fd` is a descriptor of the process, `offset` the start of
    /// the range in the file.
    ///
    /// Nothing is read from the file: an access to a hole of the file through a mapping that no userfaultfd covers would
    /// fill the hole with zeros, for all processes that map the file.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn map_private(&self, address: u64, len: u64, fd: libc::c_int, offset: u64) -> Result<(), AdoptError> {
        let flags = libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let (protection, flags) = (u64::from(libc::PROT_NONE.cast_unsigned()), u64::from(flags.cast_unsigned()));
        let arguments = [address, len, protection, flags, u64::from(fd.cast_unsigned()), offset];
        self.inject(libc::SYS_mmap, arguments).map(drop)
    }

    /// Makes a mapping readable and writable.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`].
    pub fn make_writable(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        let protection = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
        self.inject(libc::SYS_mprotect, [address, len, protection, 0, 0, 0]).map(drop)
    }

    /// Locks the pages of a range when they are accessed (MLOCK_ONFAULT), without populating them. From then on, the
    /// process cannot discard pages of the range: MADV_DONTNEED fails with EINVAL.
    ///
    /// # Errors
    /// The same errors as [`Space::madvise`]: EPERM or ENOMEM if RLIMIT_MEMLOCK of the process is too low.
    pub fn lock_on_fault(&self, address: u64, len: u64) -> Result<(), AdoptError> {
        let flags = u64::from(libc::MLOCK_ONFAULT);
        self.inject(libc::SYS_mlock2, [address, len, flags, 0, 0, 0]).map(drop)
    }
}
