//! One socket with bounded waits, plain or under TLS.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::WireError;
use super::tls::{Records, Session};
use crate::uapi::check;

/// How often a blocked stream looks whether it has been cancelled.
const SLICE: Duration = Duration::from_millis(100);
/// Most buffers per call (the kernel's limit is 1024).
const MAX_BUFFERS: usize = 512;

/// A connected socket, and under TLS the session that was established on it.
#[derive(Debug)]
pub struct Endpoint {
    /// The socket.
    pub fd: OwnedFd,
    /// None: bytes go in the clear.
    pub session: Option<Session>,
}

impl From<OwnedFd> for Endpoint {
    fn from(fd: OwnedFd) -> Self {
        Self { fd, session: None }
    }
}

/// A connected stream socket. Every wait on it ends when somebody cancels, or when nothing moves for too long.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    patience: Duration,
    cancelled: Arc<AtomicBool>,
    records: Option<Records>,
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    In,
    Out,
}

impl Socket {
    pub(super) fn new(endpoint: Endpoint, patience: Duration, cancelled: Arc<AtomicBool>) -> io::Result<Self> {
        let Endpoint { fd, session } = endpoint;
        let records = session.map(Session::into_records).transpose().map_err(io::Error::other)?;
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
        Ok(Self { fd, patience, cancelled, records })
    }

    /// Writes all of `parts`, one after the other.
    pub(super) fn write(&self, parts: [&[u8]; 2]) -> Result<(), WireError> {
        if let Some(records) = &self.records {
            return records.write(&parts, |batch| self.write_batch(batch));
        }
        let mut buffers = parts.map(outgoing);
        let used = buffers.iter().take_while(|buffer| buffer.iov_len > 0).count();
        // SAFETY: the buffers are slices that live through the call, and writing only reads them.
        unsafe { self.all(&mut buffers[..used], Direction::Out) }
    }

    fn write_batch(&self, batch: &[Vec<u8>]) -> Result<(), WireError> {
        let mut buffers: Vec<_> = batch.iter().map(|record| outgoing(record)).collect();
        // SAFETY: the buffers are vectors that live through the call, and writing only reads them.
        unsafe { self.all(&mut buffers, Direction::Out) }
    }

    /// Fills `bytes`.
    pub(super) fn read(&self, bytes: &mut [u8]) -> Result<(), WireError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the buffer is a slice that lives through the call and is ours to write to.
        unsafe { self.read_into(&mut [buffer]) }
    }

    /// Fills all of `buffers`, which are used up by it.
    ///
    /// # Safety
    /// All of them, none empty, must be valid for writing.
    pub(super) unsafe fn read_into(&self, buffers: &mut [libc::iovec]) -> Result<(), WireError> {
        match &self.records {
            // SAFETY: by this function's contract.
            None => unsafe { self.all(buffers, Direction::In) },
            // SAFETY: as above.
            Some(records) => unsafe { records.read(buffers, |bytes| self.read_some(bytes)) },
        }
    }

    /// Reads what there is, at least one byte.
    fn read_some(&self, bytes: &mut [u8]) -> Result<usize, WireError> {
        let mut buffer = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: the buffer is a slice that lives through the call and is ours to write to.
        unsafe { self.once(&mut buffer, Direction::In, 0) }
    }

    /// Moves bytes until nothing is left of `buffers`.
    ///
    /// # Safety
    /// The buffers must be valid for the direction.
    unsafe fn all(&self, buffers: &mut [libc::iovec], direction: Direction) -> Result<(), WireError> {
        let mut rest = buffers;
        while !rest.is_empty() {
            // SAFETY: by this function's contract; `advance` keeps the buffers within what they were.
            let bytes = unsafe { self.once(rest, direction, libc::MSG_WAITALL) }?;
            rest = advance(rest, bytes);
        }
        Ok(())
    }

    /// Moves at least one byte; how many is the result.
    ///
    /// # Safety
    /// As for `all`.
    unsafe fn once(
        &self,
        buffers: &mut [libc::iovec],
        direction: Direction,
        waiting: libc::c_int,
    ) -> Result<usize, WireError> {
        let since = Instant::now();
        loop {
            // SAFETY: by this function's contract.
            let moved = unsafe { self.some(buffers, direction, waiting) };
            let error = io::Error::last_os_error();
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(WireError::Cancelled);
            }
            match usize::try_from(moved) {
                Ok(0) => return Err(WireError::Closed),
                Ok(bytes) => return Ok(bytes),
                Err(_) => self.excuse(error, since, direction)?,
            }
        }
    }

    /// One call that moves what it can; -1 with errno when that is nothing. `waiting`: flags of a call that receives.
    ///
    /// # Safety
    /// As for `all`.
    unsafe fn some(&self, buffers: &mut [libc::iovec], direction: Direction, waiting: libc::c_int) -> libc::ssize_t {
        // SAFETY: all fields are numbers or may be null.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = buffers.as_mut_ptr();
        message.msg_iovlen = buffers.len().min(MAX_BUFFERS);
        match direction {
            // SAFETY: the message describes the buffers, which are valid by this function's contract.
            Direction::In => unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, waiting) },
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

fn outgoing(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
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
