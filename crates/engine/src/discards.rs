//! Memory that is given back while it is saved or sent: a balloon punches a hole into the file. No trap and no trace
//! tells of that, and a page that is read after it is one of zeros; but the file system tells that the file was
//! changed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};

use crate::uapi::{check, owned};

/// Watches files for changes that are not made through mappings (inotify, IN_MODIFY).
///
/// A memfd does not report what is done by the descriptor that `memfd_create` returned: arenas open theirs again, and map
/// that. Of any other memfd, its own program must not punch holes into it during the operation.
#[derive(Debug)]
pub(crate) struct Discards(OwnedFd);

impl Discards {
    pub(crate) fn watch(files: impl Iterator<Item = RawFd>) -> io::Result<Self> {
        // SAFETY: takes no pointers; the descriptor is new.
        let inotify = unsafe { owned(libc::c_long::from(libc::inotify_init1(libc::IN_CLOEXEC | libc::IN_NONBLOCK))) }?;
        for file in files {
            let path = format!("/proc/self/fd/{file}\0");
            // SAFETY: the path is NUL-terminated and lives through the call.
            check(unsafe { libc::inotify_add_watch(inotify.as_raw_fd(), path.as_ptr().cast(), libc::IN_MODIFY) })?;
        }
        Ok(Self(inotify))
    }

    /// Whether there were any since the last call.
    pub(crate) fn seen(&self) -> io::Result<bool> {
        let (mut events, mut any) = ([0u8; 4096], false);
        loop {
            // SAFETY: the buffer has the length given.
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
