//! Memory files that are truncated during an operation: accesses to mapped pages beyond the end raise SIGBUS
//! (BUS_ADRERR).
//!
//! A check before each read does not help, because the file may be truncated after the check. Reading every page with a
//! system call would copy all memory. Zeros must not be substituted, because they would be taken for contents. A
//! process of pageferry that serves one workload therefore exits with a message and a given exit code. This is safe at
//! every point: before the commit the source owns the workload, an image without its index is incomplete, and a
//! workload whose pager exits waits for the next pager.

use std::io;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::uapi::check;

const MESSAGE: &[u8] =
    b"pageferry: error: cannot read memory of the workload: its file was truncated, by the workload or a process \
that shares it; start the workload again\n";
/// si_code of an access beyond the end of a file.
const BUS_ADRERR: libc::c_int = 2;

static EXIT_CODE: AtomicI32 = AtomicI32::new(1);

/// Installs a SIGBUS handler that prints a message and exits with `code` on an access to truncated memory.
///
/// # Errors
/// The error of sigaction(2).
pub fn end_with(code: i32) -> io::Result<()> {
    EXIT_CODE.store(code, Ordering::Relaxed);
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = end;
    // SAFETY: an all-zero sigaction is valid: an empty mask and no flags. It lives through the call, which does not
    // return the old action. The handler has the signature for SA_SIGINFO, and only calls async-signal-safe functions.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        check(libc::sigaction(libc::SIGBUS, &raw const action, null_mut()))?;
    }
    Ok(())
}

extern "C" fn end(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo; write, _exit and signal are async-signal-safe, and the message is
    // static.
    unsafe {
        if (*info).si_code == BUS_ADRERR {
            libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(EXIT_CODE.load(Ordering::Relaxed));
        }
        // For other causes (hardware errors, pages that cannot be loaded), the access is retried, and SIGBUS then takes
        // its default action.
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}
