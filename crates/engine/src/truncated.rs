//! Memory files that their workload makes shorter: what is mapped beyond the end cannot be read, and each access ends in
//! SIGBUS (BUS_ADRERR).
//!
//! No check before a read can help, because the file may be truncated after it, and to copy every page by a system call
//! before it is looked at costs a copy of all memory. To replace the pages by zeros would be worse than to end: zeros of
//! ours must never be taken for contents. So a process of ours that works for one workload ends, with a message and an exit code,
//! which is safe at every point: before commit the workload is its source's, an image without its index is none, and a
//! workload whose pager ends waits for the next one.

use std::io;
use std::mem::zeroed;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicI32, Ordering};

use crate::uapi::check;

const MESSAGE: &[u8] =
    b"pageferry: error: memory of the workload cannot be read: its file was truncated, by the workload \
or a process that shares it; start the workload again\n";
/// An access beyond the end of a file.
const BUS_ADRERR: libc::c_int = 2;

static EXIT_CODE: AtomicI32 = AtomicI32::new(1);

/// Has this process end with a message and `code` when it accesses memory whose file was truncated.
///
/// # Errors
/// What the kernel says about the handler.
pub fn end_with(code: i32) -> io::Result<()> {
    EXIT_CODE.store(code, Ordering::Relaxed);
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = end;
    // SAFETY: zeros are an empty mask and no flags; the handler calls async-signal-safe functions only.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO;
        check(libc::sigaction(libc::SIGBUS, &raw const action, null_mut()))?;
    }
    Ok(())
}

extern "C" fn end(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid structure; write, _exit and signal are async-signal-safe, and the message is
    // static.
    unsafe {
        if (*info).si_code == BUS_ADRERR {
            libc::write(2, MESSAGE.as_ptr().cast(), MESSAGE.len());
            libc::_exit(EXIT_CODE.load(Ordering::Relaxed));
        }
        // Of another kind (memory that is broken, or cannot be loaded): as without us, when the access is tried again.
        libc::signal(libc::SIGBUS, libc::SIG_DFL);
    }
}
