//! Socket with bounded waits, with or without TLS.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::WireError;
use super::tls::{Records, Session};
use crate::uapi::check;

/// Interval at which a blocked stream checks for cancellation.
const SLICE: Duration = Duration::from_millis(100);
/// Maximum number of buffers per call; the kernel's limit is 1024.
const MAX_BUFFERS: usize = 512;

/// Connected socket, and the TLS session established on it, if any.
#[derive(Debug)]
pub struct Endpoint {
    /// Descriptor of the connected socket.
    pub fd: OwnedFd,
    /// TLS session; `None` if the stream is unencrypted.
    pub session: Option<Session>,
}

impl From<OwnedFd> for Endpoint {
    fn from(fd: OwnedFd) -> Self {
        Self { fd, session: None }
    }
}

/// Connected stream socket. Every wait ends on cancellation, or when the peer has been silent for the timeout.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    timeout: Duration,
    cancelled: Arc<AtomicBool>,
    records: Option<Records>,
}

#[derive(Debug, Clone, Copy)]
enum Direction {
    In,
    Out,
}

impl Socket {
    pub(super) fn new(endpoint: Endpoint, timeout: Duration, cancelled: Arc<AtomicBool>) -> io::Result<Self> {
        let Endpoint { fd, session } = endpoint;
        let records = session.map(Session::into_records).transpose().map_err(io::Error::other)?;
        for option in [libc::SO_RCVTIMEO, libc::SO_SNDTIMEO] {
            let time = libc::timeval {
                tv_sec: 0,
                tv_usec: libc::suseconds_t::try_from(SLICE.as_micros()).map_err(io::Error::other)?,
            };
            let len = libc::socklen_t::try_from(size_of_val(&time)).map_err(io::Error::other)?;
            // SAFETY: `time` is a timeval that lives through the call, and `len` is its size.
            check(unsafe {
                libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, (&raw const time).cast(), len)
            })?;
        }
        Ok(Self { fd, timeout, cancelled, records })
    }

    /// Writes all bytes of `parts`, in order.
    pub(super) fn write(&self, parts: [&[u8]; 2]) -> Result<(), WireError> {
        if let Some(records) = &self.records {
            return records.write(&parts, |batch| self.write_batch(batch));
        }
        let mut buffers = parts.map(outgoing);
        let used = buffers.iter().take_while(|buffer| buffer.iov_len > 0).count();
        // SAFETY: the buffers point to slices that live through the call, and sending only reads them.
        unsafe { self.all(&mut buffers[..used], Direction::Out) }
    }

    fn write_batch(&self, batch: &[Vec<u8>]) -> Result<(), WireError> {
        let mut buffers: Vec<_> = batch.iter().map(|record| outgoing(record)).collect();
        // SAFETY: the buffers point to vectors that live through the call, and sending only reads them.
        unsafe { self.all(&mut buffers, Direction::Out) }
    }

    /// Fills `bytes` from the socket.
    pub(super) fn read(&self, bytes: &mut [u8]) -> Result<(), WireError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: the buffer points to an exclusively borrowed slice that lives through the call.
        unsafe { self.read_into(&mut [buffer]) }
    }

    /// Fills all of `buffers`. Advances the buffers past the bytes read.
    ///
    /// # Safety
    /// Every buffer must be non-empty and valid for writing.
    pub(super) unsafe fn read_into(&self, buffers: &mut [libc::iovec]) -> Result<(), WireError> {
        match &self.records {
            // SAFETY: the caller guarantees that the buffers are valid for writing.
            None => unsafe { self.all(buffers, Direction::In) },
            // SAFETY: the caller guarantees that the buffers are valid for writing.
            Some(records) => unsafe { records.read(buffers, |bytes| self.read_some(bytes)) },
        }
    }

    /// Reads up to `bytes.len()` bytes that are available, after waiting for at least one. Returns their number.
    pub(super) fn read_available(&self, bytes: &mut [u8]) -> Result<usize, WireError> {
        match &self.records {
            None => self.read_some(bytes),
            Some(records) => records.read_available(bytes, |bytes| self.read_some(bytes)),
        }
    }

    /// Ends one direction of the connection, or both (shutdown(2)). Blocked calls then return.
    pub(super) fn shut_down(&self, how: libc::c_int) {
        // SAFETY: the descriptor is open. An error means that the connection has ended.
        unsafe { libc::shutdown(self.fd.as_raw_fd(), how) };
    }

    /// Reads the available bytes, after waiting for at least one. Returns their number.
    fn read_some(&self, bytes: &mut [u8]) -> Result<usize, WireError> {
        let mut buffer = [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }];
        // SAFETY: the buffer points to an exclusively borrowed slice that lives through the call.
        unsafe { self.once(&mut buffer, Direction::In, 0) }
    }

    /// Transfers the complete contents of `buffers`.
    ///
    /// # Safety
    /// The buffers must be valid for the direction of the transfer.
    unsafe fn all(&self, buffers: &mut [libc::iovec], direction: Direction) -> Result<(), WireError> {
        let mut rest = buffers;
        while !rest.is_empty() {
            // SAFETY: the caller guarantees valid buffers, and `advance` keeps them within their bounds.
            let bytes = unsafe { self.once(rest, direction, libc::MSG_WAITALL) }?;
            rest = advance(rest, bytes);
        }
        Ok(())
    }

    /// Transfers at least one byte. Returns the number of bytes.
    ///
    /// # Safety
    /// The buffers must be valid for the direction of the transfer.
    unsafe fn once(
        &self,
        buffers: &mut [libc::iovec],
        direction: Direction,
        waiting: libc::c_int,
    ) -> Result<usize, WireError> {
        let since = Instant::now();
        loop {
            // SAFETY: the caller guarantees valid buffers.
            let moved = unsafe { self.some(buffers, direction, waiting) };
            let error = io::Error::last_os_error();
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(WireError::Cancelled);
            }
            match usize::try_from(moved) {
                Ok(0) => return Err(WireError::Closed),
                Ok(bytes) => return Ok(bytes),
                Err(_) => self.retry_after(error, since, direction)?,
            }
        }
    }

    /// Makes one system call to transfer bytes. Returns -1 and sets errno on failure. `waiting` contains the flags for
    /// recvmsg(2).
    ///
    /// # Safety
    /// The buffers must be valid for the direction of the transfer.
    unsafe fn some(&self, buffers: &mut [libc::iovec], direction: Direction, waiting: libc::c_int) -> libc::ssize_t {
        // SAFETY: all fields of msghdr are integers or pointers, for which zero is valid.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = buffers.as_mut_ptr();
        message.msg_iovlen = buffers.len().min(MAX_BUFFERS);
        match direction {
            // SAFETY: the message refers to the buffers, which the caller guarantees to be valid.
            Direction::In => unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, waiting) },
            // MSG_NOSIGNAL: a closed peer must not raise SIGPIPE, regardless of the signal's disposition.
            // SAFETY: the message refers to the buffers, which the caller guarantees to be valid.
            Direction::Out => unsafe { libc::sendmsg(self.fd.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) },
        }
    }

    /// Returns `Ok` if the caller must retry the transfer after this error. Waits first if the socket was not ready.
    fn retry_after(&self, error: io::Error, since: Instant, direction: Direction) -> Result<(), WireError> {
        match error.kind() {
            io::ErrorKind::WouldBlock if since.elapsed() > self.timeout => Err(WireError::Stalled(self.timeout)),
            io::ErrorKind::WouldBlock => {
                self.wait(direction);
                Ok(())
            }
            io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(WireError::Closed),
            _ => Err(error.into()),
        }
    }

    /// Waits until the socket is ready, for at most `SLICE`. The wait is required for sockets in non-blocking mode.
    fn wait(&self, direction: Direction) {
        let events = match direction {
            Direction::In => libc::POLLIN,
            Direction::Out => libc::POLLOUT,
        };
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events, revents: 0 };
        // SAFETY: the pollfd lives through the call, and the count is 1. The result is not needed, because the transfer
        // is retried.
        unsafe { libc::poll(&raw mut poll, 1, libc::c_int::try_from(SLICE.as_millis()).unwrap_or(0)) };
    }
}

fn outgoing(bytes: &[u8]) -> libc::iovec {
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Advances the buffers past `bytes` transferred bytes.
fn advance(mut buffers: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    while bytes > 0 {
        let first = &mut buffers[0];
        if bytes < first.iov_len {
            // SAFETY: `bytes` is less than the length, so the pointer stays within the buffer.
            first.iov_base = unsafe { first.iov_base.cast::<u8>().add(bytes) }.cast();
            first.iov_len -= bytes;
            return buffers;
        }
        bytes -= first.iov_len;
        buffers = &mut buffers[1..];
    }
    buffers
}
