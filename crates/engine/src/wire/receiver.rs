//! Receiver of page streams: reads storage blocks and places their pages in the regions.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use zerocopy::{FromZeros, IntoBytes};

use super::socket::{Endpoint, Socket};
use super::{Progress, WireError, at_least_one, on_all};
use crate::SMALL_PAGE;
use crate::block::{self, Class, Codec, Head, Header, Kind, Run};
use crate::checksum::Checksum;
use crate::placer::Placer;

/// Number of pages without data that are placed between two checks for cancellation: about 1 ms of work.
const CHUNK: usize = 1 << 15;

/// Receiving side of a set of page streams.
#[derive(Debug)]
pub struct BlockReceiver {
    streams: Vec<Mutex<Incoming>>,
    placer: Arc<Placer>,
    cancelled: Arc<AtomicBool>,
    progress: Progress,
}

/// One incoming stream of storage blocks.
#[derive(Debug)]
pub(super) struct Incoming {
    socket: Arc<Socket>,
    sequence: u64,
    table: Vec<u8>,
    payload: Vec<u8>,
    scratch: Vec<u8>,
}

impl Incoming {
    pub(super) fn new(socket: Arc<Socket>) -> Self {
        Self { socket, sequence: 0, table: Vec::new(), payload: Vec::new(), scratch: Vec::new() }
    }

    /// Reads the header of the next block, or the barrier of the round. A timeout before the first byte is an error,
    /// unless `may_idle` returns true for the number of blocks received so far.
    pub(super) fn head(
        &mut self,
        round: u32,
        progress: &Progress,
        may_idle: impl Fn(u64) -> bool,
    ) -> Result<Head, WireError> {
        let mut header = Header::new_zeroed();
        let (first, rest) = header.as_mut_bytes().split_at_mut(1);
        while let Err(error) = self.socket.read(first) {
            if !matches!(error, WireError::Stalled(_)) || !may_idle(self.sequence) {
                return Err(error);
            }
        }
        self.socket.read(rest)?;
        let len = block::table_len(&header)?;
        self.table.resize(len, 0);
        self.socket.read(&mut self.table)?;
        let head = block::decode_head(&header, &self.table)?;
        head.check_distinct()?;
        let bytes = block::HEADER_LEN + len + head.stored_len;
        if head.round != round || head.sequence != self.sequence {
            let (got, at, expected) = (head.round, head.sequence, self.sequence);
            return Err(WireError::Order(format!("block {at} of round {got}, expected {expected} of {round}")));
        }
        match head.kind {
            Kind::Pages => progress.block(bytes),
            Kind::Barrier => drop(progress.bytes.fetch_add(bytes as u64, Ordering::Relaxed)),
        }
        self.sequence += u64::from(head.kind == Kind::Pages);
        Ok(head)
    }

    /// Reads and verifies the data pages of a block, and stores them consecutively in `contents`.
    pub(super) fn contents(&mut self, head: &Head, contents: &mut Vec<u8>) -> Result<(), WireError> {
        self.payload.resize(head.stored_len, 0);
        self.socket.read(&mut self.payload)?;
        contents.clear();
        let mut at = 0;
        for (index, record) in head.page_blocks.iter().enumerate() {
            let stored = &self.payload[at..at + record.stored_len.get() as usize];
            head.unpack(index, stored, &mut self.scratch)?;
            contents.extend_from_slice(&self.scratch);
            at += stored.len();
        }
        Ok(())
    }
}

impl BlockReceiver {
    /// Creates a receiver that reads from connected sockets and places pages through `placer`. A stream fails if the
    /// peer has not sent a byte for `timeout`.
    ///
    /// # Errors
    /// `InvalidInput` if `sockets` is empty; otherwise the error of the socket operation that failed.
    pub fn new(sockets: Vec<impl Into<Endpoint>>, placer: Arc<Placer>, timeout: Duration) -> io::Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let stream = |socket: Endpoint| {
            let socket = Socket::new(socket, timeout, cancelled.clone())?;
            Ok(Mutex::new(Incoming::new(Arc::new(socket))))
        };
        let streams = at_least_one(sockets.into_iter().map(Into::into).map(stream).collect::<io::Result<_>>()?)?;
        Ok(Self { streams, placer, cancelled, progress: Progress::default() })
    }

    /// Returns the counters of the received pages.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Cancels all transfers; they fail with [`WireError::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Receives and places blocks until every stream has delivered the barrier of `round`.
    ///
    /// # Errors
    /// The first error of any stream; the other streams are cancelled.
    pub fn receive(&self, round: u32) -> Result<(), WireError> {
        on_all(&self.streams, &self.cancelled, |stream| self.receive_stream(stream, round))
    }

    fn receive_stream(&self, stream: &Mutex<Incoming>, round: u32) -> Result<(), WireError> {
        let mut input = stream.lock();
        loop {
            let head = input.head(round, &self.progress, |_| false)?;
            if head.kind == Kind::Barrier {
                return Ok(());
            }
            // Check every run first, so that a block is placed either completely or not at all.
            head.runs.iter().try_for_each(|run| self.placer.check(head.region as usize, run.first, run.count))?;
            self.read_pages(&mut input, &head)?;
        }
    }

    fn read_pages(&self, input: &mut Incoming, head: &Head) -> Result<(), WireError> {
        let data = |run: &&Run| run.class == Class::Data;
        let mut slots = Vec::new();
        for run in head.runs.iter().filter(data) {
            let start = self.placer.slots(head.region as usize, run.first, run.count)?;
            slots.push(libc::iovec { iov_base: start.cast(), iov_len: run.count * SMALL_PAGE });
        }
        if head.codec == Codec::None {
            read_in_place(&input.socket, head, slots)?;
        } else {
            read_packed(input, head, &slots)?;
        }
        for run in &head.runs {
            match run.class {
                Class::Data => self.placer.placed(head.region as usize, run.first, run.count)?,
                class => self.place_empty(head.region as usize, run, class)?,
            }
            self.progress.count(run.class, run.count);
        }
        Ok(())
    }

    fn place_empty(&self, region: usize, run: &Run, class: Class) -> Result<(), WireError> {
        let end = run.first + run.count;
        for first in (run.first..end).step_by(CHUNK) {
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(WireError::Cancelled);
            }
            self.placer.place_empty(region, first, CHUNK.min(end - first), class)?;
        }
        Ok(())
    }
}

/// Reads uncompressed pages into their slots and verifies them in place. The workload does not use the memory before
/// the source has committed, and a failed checksum ends the migration before the commit.
fn read_in_place(socket: &Socket, head: &Head, slots: Vec<libc::iovec>) -> Result<(), WireError> {
    if slots.is_empty() {
        return Ok(());
    }
    let mut buffers = slots.clone();
    // SAFETY: the slots lie in a mapping of the placer, which is writable and has allocated their memory. No slot is
    // empty, because a run has at least one page.
    unsafe { socket.read_into(&mut buffers) }?;
    let mut rest = SlotCursor::new(&slots);
    for (index, record) in head.page_blocks.iter().enumerate() {
        let mut hash = Checksum::new();
        rest.take(record.raw_len.get() as usize, |chunk, len| {
            // SAFETY: the chunk lies in a slot that the placer has allocated. A valid source sends a page once per
            // round, so no other stream writes to the chunk. If an invalid source sends a page over two streams, the
            // bytes may change while they are hashed. Any bytes are valid, so only the checksum is affected.
            hash.update(unsafe { std::slice::from_raw_parts(chunk, len) });
        });
        head.verify(index, hash.digest())?;
    }
    Ok(())
}

/// Reads compressed page blocks, verifies them, and then copies them into their slots.
fn read_packed(input: &mut Incoming, head: &Head, slots: &[libc::iovec]) -> Result<(), WireError> {
    input.payload.resize(head.stored_len, 0);
    input.socket.read(&mut input.payload)?;
    let (mut rest, mut at) = (SlotCursor::new(slots), 0);
    for (index, record) in head.page_blocks.iter().enumerate() {
        let stored = &input.payload[at..at + record.stored_len.get() as usize];
        head.unpack(index, stored, &mut input.scratch)?;
        let mut done = 0;
        rest.take(input.scratch.len(), |chunk, len| {
            // SAFETY: the chunk has `len` bytes and lies in a slot that the placer has allocated. The scratch buffer
            // holds `len` bytes from `done` on, and does not overlap the slot.
            unsafe { std::ptr::copy_nonoverlapping(input.scratch[done..].as_ptr(), chunk, len) };
            done += len;
        });
        at += stored.len();
    }
    Ok(())
}

/// Cursor over the bytes of several slots.
struct SlotCursor<'a> {
    slots: &'a [libc::iovec],
    offset: usize,
}

impl<'a> SlotCursor<'a> {
    fn new(slots: &'a [libc::iovec]) -> Self {
        Self { slots, offset: 0 }
    }

    /// Calls `chunk` for each contiguous part of the next `len` bytes.
    fn take(&mut self, mut len: usize, mut chunk: impl FnMut(*mut u8, usize)) {
        while len > 0 {
            let Some(slot) = self.slots.first() else { return };
            let part = len.min(slot.iov_len - self.offset);
            chunk(slot.iov_base.cast::<u8>().wrapping_add(self.offset), part);
            self.offset += part;
            len -= part;
            if self.offset == slot.iov_len {
                self.slots = &self.slots[1..];
                self.offset = 0;
            }
        }
    }
}
