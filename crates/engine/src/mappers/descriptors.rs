//! Search of a process's descriptors for those with which it has one of several files open for writing.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use super::{FileId, status_at};

/// Size in bytes of the buffer for directory entries: enough for about a thousand descriptors.
const BUFFER: usize = 32 << 10;
/// Offsets of the length and of the name in `struct linux_dirent64`.
const LENGTH: usize = 16;
const NAME: usize = 19;

/// Reader of the directories `/proc/PID/fd`, with a buffer that is reused.
#[derive(Debug, Default)]
pub struct Listing {
    buffer: Vec<u8>,
}

impl Listing {
    /// Calls `found` with the index of the file and the number of the descriptor, for each descriptor of `files` that is
    /// open for writing. Ignores descriptors that are closed during the call.
    ///
    /// # Errors
    /// If the directory cannot be read, or if memory is lacking.
    pub fn writable(
        &mut self,
        directory: &File,
        files: &[FileId],
        mut found: impl FnMut(usize, i32),
    ) -> io::Result<()> {
        self.buffer.resize(BUFFER, 0);
        loop {
            // SAFETY: the kernel writes at most `BUFFER` bytes to the buffer.
            let read = unsafe {
                libc::syscall(libc::SYS_getdents64, directory.as_raw_fd(), self.buffer.as_mut_ptr(), self.buffer.len())
            };
            let len = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
            if len == 0 {
                return Ok(());
            }
            let mut rest = &self.buffer[..len];
            while let Some((name, others)) = next_name(rest) {
                rest = others;
                if let Some(file) = open_for_writing(directory, name, files)?
                    && let Some(number) = name.to_str().ok().and_then(|text| text.parse().ok())
                {
                    found(file, number);
                }
            }
        }
    }
}

/// Splits the first entry off a buffer of directory entries.
fn next_name(entries: &[u8]) -> Option<(&CStr, &[u8])> {
    let length = usize::from(u16::from_ne_bytes(entries.get(LENGTH..LENGTH + 2)?.try_into().ok()?));
    let name = CStr::from_bytes_until_nul(entries.get(NAME..length)?).ok()?;
    Some((name, &entries[length..]))
}

/// Returns the index in `files` of the file to which a descriptor refers. Returns `None` if the file is not among
/// `files`, or if the descriptor is not open for writing.
///
/// # Errors
/// ENOMEM. All other errors are ignored. They concern descriptors that were closed during the scan, or files of other
/// file systems, because the files that are searched for can be inspected.
fn open_for_writing(directory: &File, name: &CStr, files: &[FileId]) -> io::Result<Option<usize>> {
    let inspected = |flags, mask| match status_at(directory.as_raw_fd(), name, flags, mask) {
        Ok(status) => Ok(Some(status)),
        Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => Err(error),
        Err(_) => Ok(None),
    };
    let Some(status) = inspected(0, libc::STATX_INO)? else { return Ok(None) };
    let device = libc::makedev(status.stx_dev_major, status.stx_dev_minor);
    let Some(file) = files.iter().position(|file| (file.device, file.inode) == (device, status.stx_ino)) else {
        return Ok(None);
    };
    // The permissions of the link show the mode in which the file is open.
    let Some(link) = inspected(libc::AT_SYMLINK_NOFOLLOW, libc::STATX_MODE)? else { return Ok(None) };
    Ok((link.stx_mode & 0o200 != 0).then_some(file))
}
