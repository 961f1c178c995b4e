//! Transfer of storage blocks over sockets, from and into the mappings of memory regions.
//!
//! A stream is a connected socket, either unencrypted or under [TLS](tls). Several streams share the pages of a round;
//! each of them ends the round with a barrier. Every wait is bounded: it ends on cancellation, or if the peer has not
//! transferred a byte within the timeout.
//!
//! After the switch-over of a post-copy migration, a [`PageServer`] at the source sends the remaining pages. It pushes
//! them over separate streams. On another connection, it replies immediately to the requests of a [`PeerSource`] at the
//! destination. A [`Relay`] forwards the contents of a disk, which QEMU sends itself.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use thiserror::Error;

use crate::block::{BlockError, Class};
use crate::placer::PlaceError;

mod pace;
mod peer;
mod receiver;
mod relay;
mod request;
mod sender;
mod server;
mod socket;
pub mod tls;

pub use peer::PeerSource;
pub use receiver::BlockReceiver;
pub use relay::Relay;
pub use request::{MAX_REQUEST, Request};
pub use sender::{BlockSender, Format};
pub use server::PageServer;
pub use socket::Endpoint;

/// Round number of the blocks that are sent after the switch-over. No earlier round has this number.
pub const POSTCOPY: u32 = u32::MAX;

/// Reason why a stream ended.
#[derive(Debug, Error)]
pub enum WireError {
    /// The transfer was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// The peer closed the connection.
    #[error("the peer closed the page stream")]
    Closed,
    /// The peer did not transfer a byte within the timeout.
    #[error("the peer has not transferred a byte on the page stream for {0:?}")]
    Stalled(Duration),
    /// A socket operation failed.
    #[error("page stream: {0}")]
    Io(#[from] io::Error),
    /// A TLS handshake or record was rejected.
    #[error("page stream: {0}")]
    Tls(#[from] tls::TlsError),
    /// A block is malformed or damaged.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A block does not fit the regions.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A block or barrier was received out of order, or a request is invalid.
    #[error("unexpected message on a page stream: {0}")]
    Order(String),
}

/// Counters of a sender or receiver, readable during a round.
#[derive(Debug, Default)]
pub struct Progress {
    /// Number of bytes transferred, headers included.
    pub bytes: AtomicU64,
    /// Number of storage blocks transferred.
    pub blocks: AtomicU64,
    /// Number of pages with data.
    pub data: AtomicU64,
    /// Number of zero pages.
    pub zero: AtomicU64,
    /// Number of absent pages (holes).
    pub absent: AtomicU64,
    /// Number of storage blocks that adaptive compression sent uncompressed, including trials.
    pub uncompressed: AtomicU64,
}

impl Progress {
    pub(crate) fn count(&self, class: Class, pages: usize) {
        let counter = match class {
            Class::Absent => &self.absent,
            Class::Zero => &self.zero,
            _ => &self.data,
        };
        counter.fetch_add(pages as u64, Ordering::Relaxed);
    }

    fn block(&self, bytes: usize) {
        self.blocks.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

/// Runs `work` on every stream in parallel. On the first failure, cancels the other streams and returns the error.
fn on_all<S: Sync>(
    streams: &[S],
    cancelled: &AtomicBool,
    work: impl Fn(&S) -> Result<(), WireError> + Sync,
) -> Result<(), WireError> {
    let failure = Mutex::new(None);
    let fail = |error: WireError| {
        // Record the error before the flag is set: otherwise, a stream that fails because of the flag could record its
        // error first.
        failure.lock().get_or_insert(error);
        cancelled.store(true, Ordering::Release);
    };
    let guarded = |stream: &S| work(stream).unwrap_or_else(&fail);
    std::thread::scope(|scope| {
        for stream in streams.iter().skip(1) {
            if let Err(error) = std::thread::Builder::new().spawn_scoped(scope, || guarded(stream)) {
                fail(error.into());
            }
        }
        streams.iter().take(1).for_each(&guarded);
    });
    failure.into_inner().map_or(Ok(()), Err)
}

/// Sets a TCP option. Ignores errors, because sockets of other families reject the option.
fn tune(socket: &OwnedFd, option: libc::c_int, value: libc::c_int) {
    let len = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(4);
    // SAFETY: `value` is an integer that lives through the call, and `len` is its size.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), len) };
}

/// Returns `streams`, or `InvalidInput` if the list is empty: a round without streams would end without a transfer.
fn at_least_one<S>(streams: Vec<S>) -> io::Result<Vec<S>> {
    if streams.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "cannot create page streams: no sockets given"));
    }
    Ok(streams)
}
