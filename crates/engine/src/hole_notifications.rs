//! Notifications of holes punched into memory files, for example by a balloon. After such a discard, the pages read as
//! zeros. Neither faults nor traces report the discard, but the file system reports a modification of the file.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::uapi::{check, owned};

/// Inotify instance that reports file modifications (IN_MODIFY), except those through mappings.
///
/// Inotify does not report modifications through the descriptor that memfd_create(2) returned. An arena therefore
/// reopens its memfd, and maps the new descriptor. The owner of any other memfd must not punch holes into it during the
/// operation.
#[derive(Debug)]
pub(crate) struct Discards(OwnedFd);

impl Discards {
    /// Starts to watch files, given by their descriptors.
    pub(crate) fn watch(files: impl Iterator<Item = RawFd>) -> io::Result<Self> {
        // SAFETY: inotify_init1 takes no pointers; the descriptor it returns is new and has no other owner.
        let inotify = unsafe { owned(libc::c_long::from(libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK))) }?;
        for file in files {
            let path = format!("/proc/self/fd/{file}\0");
            // SAFETY: the path is NUL-terminated and lives through the call.
            check(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr().cast(), libc::IN_MODIFY) })?;
        }
        Ok(Self(inotify))
    }

    /// Returns whether any of the watched files has been modified since the last call.
    pub(crate) fn seen(&self) -> io::Result<bool> {
        let (mut events, mut any) = ([0u8; 4096], false);
        loop {
            // SAFETY: the buffer is valid for writing and has the given length.
            let got = unsafe { libc::read(self.0.as_raw_fd(), events.as_mut_ptr().cast(), events.len()) };
            if got > 0 {
                any = true;
                continue;
            }
            let error = io::Error::last_os_error();
            if got == 0 || error.kind() == io::ErrorKind::WouldBlock {
                return Ok(any);
            }
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
    }
}
