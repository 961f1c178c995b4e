//! Memory accesses and system calls for feature probes.
//!
//! None of these functions requires the GIL: a thread that waits for a fault must not block the thread that resolves
//! the fault.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, OwnedFd};

use crate::uapi::{UFFD_FLAGS, UFFD_USER_MODE_ONLY, owned};

/// Creates a userfaultfd with userfaultfd(2), without features and without the fallbacks of
/// [`Userfault::own`](crate::uapi::Userfault::own).
///
/// # Errors
/// The error of userfaultfd(2).
pub fn userfaultfd(user_mode_only: bool) -> io::Result<OwnedFd> {
    let flags = if user_mode_only { UFFD_FLAGS | UFFD_USER_MODE_ONLY } else { UFFD_FLAGS };
    // SAFETY: userfaultfd takes no pointers; the descriptor it returns is new and has no other owner.
    unsafe { owned(libc::syscall(libc::SYS_userfaultfd, flags)) }
}

/// Returns a copy of `len` bytes at an address of this process. May wait until another thread resolves a fault.
///
/// # Safety
/// `[address, address + len)` must be mapped and readable.
pub unsafe fn read_memory(address: u64, len: usize) -> Vec<u8> {
    let mut contents = vec![0; len];
    // SAFETY: the caller guarantees that the range is mapped and readable; `contents` has `len` bytes, and is new, so
    // the ranges do not overlap.
    unsafe { std::ptr::copy_nonoverlapping(address as *const u8, contents.as_mut_ptr(), len) };
    contents
}

/// Writes `contents` to an address of this process. May wait until another thread resolves a fault.
///
/// # Safety
/// The range must be mapped writable, and no Rust reference to it may exist.
pub unsafe fn write_memory(address: u64, contents: &[u8]) {
    // SAFETY: the caller guarantees that the range is mapped writable and not referenced, so it does not overlap
    // `contents`.
    unsafe { std::ptr::copy_nonoverlapping(contents.as_ptr(), address as *mut u8, contents.len()) };
}

/// Makes the kernel read a byte at an address.
///
/// # Errors
/// EFAULT if the byte cannot be read; otherwise the error of pipe(2).
pub fn kernel_reads(address: u64) -> io::Result<()> {
    let (_reading, writing) = pipe()?;
    // SAFETY: write(2) only reads the byte, and the kernel checks the address.
    let written = unsafe { libc::write(writing.as_raw_fd(), address as *const libc::c_void, 1) };
    if written < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the kernel write `contents`, up to 4 KiB, to an address. Returns the number of bytes written.
///
/// # Errors
/// EFAULT if no byte can be written; otherwise the error of pipe(2) or write(2).
///
/// # Safety
/// If the range is mapped, no Rust reference to it may exist.
pub unsafe fn kernel_writes(address: u64, contents: &[u8]) -> io::Result<usize> {
    let (reading, mut writing) = pipe()?;
    writing.write_all(contents)?;
    // SAFETY: the kernel checks the address; the caller guarantees that the range may be overwritten.
    let read = unsafe { libc::read(reading.as_raw_fd(), address as *mut libc::c_void, contents.len()) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Returns the read end and the write end of a pipe.
fn pipe() -> io::Result<(File, File)> {
    let (reading, writing) = io::pipe()?;
    Ok((File::from(OwnedFd::from(reading)), File::from(OwnedFd::from(writing))))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernel_accesses_report_bad_addresses() {
        let mut memory = [0_u8; 4];
        let address = memory.as_mut_ptr() as u64;
        // SAFETY: the array has space for the three bytes, and is not accessed during the call.
        assert_eq!(unsafe { kernel_writes(address, b"abc") }.expect("a write"), 3);
        assert_eq!(&memory, b"abc\0");
        kernel_reads(address).expect("a read");
        assert_eq!(kernel_reads(0).map_err(|error| error.raw_os_error()), Err(Some(libc::EFAULT)));
    }
}
