//! File systems of memory files: their types, and detached mounts.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use crate::uapi::{check, owned};

/// Creates a detached tmpfs mount of up to `size` bytes, with `huge=always`. Returns its root directory, for
/// `O_TMPFILE` files.
///
/// The mount exists while a descriptor of the directory or of a file in it is open.
///
/// # Errors
/// EPERM without CAP_SYS_ADMIN; otherwise the error of fsopen(2), fsconfig(2) or fsmount(2).
pub fn large_tmpfs(size: u64) -> io::Result<OwnedFd> {
    detached_mount("tmpfs", &[("huge", "always"), ("size", &size.to_string()), ("mode", "0700")])
}

/// Like [`large_tmpfs`], but creates a hugetlbfs mount with pages of 2 MiB.
///
/// # Errors
/// The same errors as [`large_tmpfs`].
pub fn hugetlbfs(size: u64) -> io::Result<OwnedFd> {
    detached_mount("hugetlbfs", &[("pagesize", "2M"), ("size", &size.to_string()), ("mode", "0700")])
}

fn detached_mount(kind: &str, options: &[(&str, &str)]) -> io::Result<OwnedFd> {
    const FSCONFIG_SET_STRING: libc::c_uint = 1;
    const FSCONFIG_CMD_CREATE: libc::c_uint = 6;
    /// Value of FSOPEN_CLOEXEC and of FSMOUNT_CLOEXEC.
    const CLOEXEC: libc::c_uint = 1;
    /// MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV and MOUNT_ATTR_NOEXEC.
    const ATTRIBUTES: libc::c_uint = 2 | 4 | 8;
    let null = std::ptr::null::<libc::c_char>();
    let kind = CString::new(kind)?;
    // SAFETY: the name is NUL-terminated; the returned descriptor is new and has no other owner.
    let context = unsafe { owned(libc::syscall(libc::SYS_fsopen, kind.as_ptr(), CLOEXEC)) }?;
    let configure = |command: libc::c_uint, key: *const libc::c_char, value: *const libc::c_char| {
        // SAFETY: both strings are NUL-terminated, or null for a command without them, and live through the call.
        let result = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, 0) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    };
    for (key, value) in options {
        let (key, value) = (CString::new(*key)?, CString::new(*value)?);
        configure(FSCONFIG_SET_STRING, key.as_ptr(), value.as_ptr())?;
    }
    configure(FSCONFIG_CMD_CREATE, null, null)?;
    // SAFETY: fsmount takes no pointers; the returned descriptor is new and has no other owner.
    unsafe { owned(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, ATTRIBUTES)) }
}

/// Returns the type of the file system of an open file (`f_type` of statfs(2)).
///
/// # Errors
/// The error of fstatfs(2).
pub fn file_system_type(file: BorrowedFd<'_>) -> io::Result<i64> {
    status(file).map(|status| status.f_type)
}

/// Returns the result of fstatfs(2).
pub(crate) fn status(file: BorrowedFd<'_>) -> io::Result<libc::statfs> {
    // SAFETY: all fields of statfs are integers, for which zero is valid.
    let mut found: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: `found` is a statfs that is valid for writing.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), &raw mut found) })?;
    Ok(found)
}
