//! One socket with bounded waits.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::WireError;
use crate::uapi::check;

/// How often a blocked stream looks whether it has been cancelled.
const SLICE: Duration = Duration::from_millis(100);
/// Most buffers per call (the kernel's limit is 1024).
const MAX_BUFFERS: usize = 512;

/// A connected stream socket. Every wait on it ends when somebody cancels, or when nothing moves for too long.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    patience: Duration,
    cancelled: Arc<AtomicBool>,
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    In,
    Out,
}

impl Socket {
    pub(super) fn new(fd: OwnedFd, patience: Duration, cancelled: Arc<AtomicBool>) -> io::Result<Self> {
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let time = libc::timeval {
                tv_sec: 0,
                tv_usec: libc::suseconds_t::try_from(SLICE.as_micros()).map_err(io::Error::other)?,
            };
            let len = libc::socklen_t::try_from(size_of_val(&time)).map_err(io::Error::other)?;
            // SAFETY: `time` is a timeval of the length given.
            check(unsafe {
                libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const time).cast(), len)
            })?;
        }
        Ok(Self { fd, patience, cancelled })
    }

    /// Writes all of `parts`, one after the other.
    pub(super) fn write(&self, parts: [&[u8]; 2]) -> Result<(), WireError> {
        let mut buffers =
            parts.map(|bytes| libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() });
        let used = buffers.iter().take_while(|buffer| buffer.iov_len > 0).count();
        // SAFETY: the buffers are slices that live through the call, and writing only reads them.
        unsafe { self.all(&mut buffers[..used], Direction::Out) }
    }

    /// Fills `bytes`.
    pub(super) fn read(&self, bytes: &mut [u8]) -> Result<(), WireError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the buffer is a slice that lives through the call and is ours to write to.
        unsafe { self.all(&mut [buffer], Direction::In) }
    }

    /// Fills all of `buffers`, which are used up by it.
    ///
    /// # Safety
    /// All of them, none empty, must be valid for writing.
    pub(super) unsafe fn read_into(&self, buffers: &mut [libc::iovec]) -> Result<(), WireError> {
        // SAFETY: by this function's contract.
        unsafe { self.all(buffers, Direction::In) }
    }

    /// Moves bytes until nothing is left of `buffers`.
    ///
    /// # Safety
    /// The buffers must be valid for the direction.
    unsafe fn all(&self, buffers: &mut [libc::iovec], direction: Direction) -> Result<(), WireError> {
        let mut rest = buffers;
        let mut since = Instant::now();
        while !rest.is_empty() {
            // SAFETY: by this function's contract; `advance` keeps the buffers within what they were.
            let moved = unsafe { self.some(rest, direction) };
            let error = io::Error::last_os_error();
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(WireError::Cancelled);
            }
            match usize::try_from(moved) {
                Ok(0) => return Err(WireError::Closed),
                Ok(bytes) => {
                    rest = advance(rest, bytes);
                    since = Instant::now();
                }
                Err(_) => self.excuse(error, since, direction)?,
            }
        }
        Ok(())
    }

    /// One call that moves what it can; -1 with errno when that is nothing.
    ///
    /// # Safety
    /// As for `all`.
    unsafe fn some(&self, buffers: &mut [libc::iovec], direction: Direction) -> libc::ssize_t {
        // SAFETY: all fields are numbers or may be null.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = buffers.as_mut_ptr();
        message.msg_iovlen = buffers.len().min(MAX_BUFFERS);
        match direction {
            // SAFETY: the message describes the buffers, which are valid by this function's contract.
            Direction::In => unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, libc::MSG_WAITALL) },
            // No signal where the peer is gone, whatever the program does about SIGPIPE.
            // SAFETY: as above.
            Direction::Out => unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) },
        }
    }

    /// Whether a failure is only a wait that goes on.
    fn excuse(&self, error: io::Error, since: Instant, direction: Direction) -> Result<(), WireError> {
        match error.kind() {
            io::ErrorKind::WouldBlock if since.elapsed() > self.patience => Err(WireError::Stalled(self.patience)),
            io::ErrorKind::WouldBlock => {
                self.wait(direction);
                Ok(())
            }
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(WireError::Closed),
            _ => Err(error.into()),
        }
    }

    /// Sleeps until something may move, a slice at the most: the socket may be one that never blocks.
    fn wait(&self, direction: Direction) {
        let events = match direction {
            Direction::In => libc::POLLIN,
            Direction::Out => libc::POLLOUT,
        };
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 };
        // SAFETY: one pollfd that lives through the call. What it finds is found again by the next transfer.
        unsafe { libc::poll(&raw mut poll, 1, libc::c_int::try_from(SLICE.as_millis()).unwrap_or(0)) };
    }
}

/// Steps over bytes that have been moved.
fn advance(mut buffers: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    while bytes > 0 {
        let first = &mut buffers[0];
        if bytes < first.iov_len {
            // SAFETY: stays within the buffer.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(bytes) }.cast();
            first.iov_len -= bytes;
            return buffers;
        }
        bytes -= first.iov_len;
        buffers = &mut buffers[1..];
    }
    buffers
}
