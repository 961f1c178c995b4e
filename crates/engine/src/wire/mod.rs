//! Storage blocks over sockets: from a region's mapping to a socket, and from a socket into a region's mapping.
//!
//! A stream is a connected, blocking socket, in the clear or under [TLS](tls). Several streams share the pages of a
//! round; each ends its part with a barrier. Every wait is bounded: it ends when somebody cancels, or when the peer has
//! not moved a byte for a while.
//!
//! After the switch-over of a post-copy migration the blocks come from a [`PageServer`] at the source, which pushes
//! them over streams of their own, and answers on one more, at once, what a [`PeerSource`] at the destination asks for.

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
mod request;
mod sender;
mod server;
mod socket;
pub mod tls;

pub use peer::PeerSource;
pub use receiver::BlockReceiver;
pub use request::{MAX_REQUEST, Request};
pub use sender::{BlockSender, Format};
pub use server::PageServer;
pub use socket::Endpoint;

/// The round of blocks that are sent after the switch-over: no round before has that number.
pub const POSTCOPY: u32 = u32::MAX;

/// Why a stream ended.
#[derive(Debug, Error)]
pub enum WireError {
    /// Somebody asked for it.
    #[error("cancelled")]
    Cancelled,
    /// The peer closed the connection.
    #[error("the peer closed the page stream")]
    Closed,
    /// Nothing moved.
    #[error("the peer has not moved a byte on the page stream for {0:?}")]
    Stalled(Duration),
    /// The network's words.
    #[error("page stream: {0}")]
    Io(#[from] io::Error),
    /// What came over a secure stream is not from the peer, or not what TLS allows.
    #[error("page stream: {0}")]
    Tls(#[from] tls::TlsError),
    /// A block that is not as it must be.
    #[error(transparent)]
    Block(#[from] BlockError),
    /// A block that does not fit the regions.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// A barrier or block out of order.
    #[error("page stream out of step: {0}")]
    Order(String),
}

/// Counters that can be read while a round is under way.
#[derive(Debug, Default)]
pub struct Progress {
    /// Bytes on the wire.
    pub bytes: AtomicU64,
    /// Storage blocks.
    pub blocks: AtomicU64,
    /// Pages with contents.
    pub data: AtomicU64,
    /// Pages of zeros.
    pub zero: AtomicU64,
    /// Pages that are not in memory.
    pub absent: AtomicU64,
    /// Storage blocks sent without the codec that was asked for, because the link was faster.
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

/// Does `work` on every stream at once. The first failure ends the others, and is the one reported.
fn on_all<S: Sync>(
    streams: &[S],
    cancelled: &AtomicBool,
    work: impl Fn(&S) -> Result<(), WireError> + Sync,
) -> Result<(), WireError> {
    let failure = Mutex::new(None);
    let fail = |error: WireError| {
        // First kept, then made known: what the others end with because of it must not come before it.
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

/// Sets an option of TCP; other sockets do not know it, and need it not.
fn tune(socket: &OwnedFd, option: libc::c_int, value: libc::c_int) {
    let len = libc::socklen_t::try_from(size_of_val(&value)).unwrap_or(4);
    // SAFETY: `value` is an integer of the length given.
    unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, option, (&raw const value).cast(), len) };
}

/// No stream at all would be a round that ends at once, with nothing sent or received.
fn at_least_one<S>(streams: Vec<S>) -> io::Result<Vec<S>> {
    if streams.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no sockets to make page streams of"));
    }
    Ok(streams)
}
