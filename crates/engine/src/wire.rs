//! Storage blocks over sockets: from a region's mapping to a socket, and from a socket into a region's mapping.
//!
//! A stream is a connected, blocking socket. Several streams share the pages of a round; each ends its part with a
//! barrier. Every wait is bounded: it ends when somebody cancels, or when the peer has not moved a byte for a while.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use thiserror::Error;
use xxhash_rust::xxh3::Xxh3Default;
use zerocopy::{FromZeros, IntoBytes};

use crate::block::{self, BlockError, Builder, Built, Class, Codec, Head, Header, Kind, Run};
use crate::mapping::Mapping;
use crate::pages::PageSet;
use crate::placer::{PlaceError, Placer};
use crate::uapi::check;
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Pages that a stream takes from a round at a time.
const SHARE: usize = 4 * LARGE_PAGE / SMALL_PAGE;
/// How often a blocked stream looks whether it has been cancelled.
const SLICE: Duration = Duration::from_millis(100);
/// Most buffers per `readv`.
const MAX_BUFFERS: usize = 512;

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
}

impl Progress {
    fn count(&self, class: Class, pages: usize) {
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

/// One socket with bounded waits.
#[derive(Debug)]
struct Socket {
    fd: OwnedFd,
    patience: Duration,
    cancelled: Arc<AtomicBool>,
}

impl Socket {
    fn new(fd: OwnedFd, patience: Duration, cancelled: Arc<AtomicBool>) -> io::Result<Self> {
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

    /// Calls `transfer` with what is left of `buffers` until all is moved.
    fn all(
        &self,
        buffers: &mut [libc::iovec],
        transfer: unsafe extern "C" fn(libc::c_int, *const libc::iovec, libc::c_int) -> libc::ssize_t,
    ) -> Result<(), WireError> {
        let mut rest = buffers;
        let mut since = Instant::now();
        while !rest.is_empty() {
            let count = libc::c_int::try_from(rest.len().min(MAX_BUFFERS)).unwrap_or(0);
            // SAFETY: the buffers are valid for the direction of `transfer`, by the callers in this file.
            let moved = unsafe { transfer(self.fd.as_raw_fd(), rest.as_ptr(), count) };
            if self.cancelled.load(Ordering::Relaxed) {
                return Err(WireError::Cancelled);
            }
            match usize::try_from(moved) {
                Ok(0) => return Err(WireError::Closed),
                Ok(bytes) => {
                    rest = advance(rest, bytes);
                    since = Instant::now();
                }
                Err(_) => self.excuse(since)?,
            }
        }
        Ok(())
    }

    /// Whether the last failure is only a wait that goes on.
    fn excuse(&self, since: Instant) -> Result<(), WireError> {
        let error = io::Error::last_os_error();
        match error.kind() {
            io::ErrorKind::WouldBlock if since.elapsed() > self.patience => Err(WireError::Stalled(self.patience)),
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(()),
            io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => Err(WireError::Closed),
            _ => Err(error.into()),
        }
    }

    fn write(&self, built: &Built<'_>) -> Result<usize, WireError> {
        let mut buffers = [buffer(built.head), buffer(built.payload)];
        let used = if built.payload.is_empty() { 1 } else { 2 };
        self.all(&mut buffers[..used], libc::writev)?;
        Ok(built.head.len() + built.payload.len())
    }

    fn read(&self, bytes: &mut [u8]) -> Result<(), WireError> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.all(&mut [libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() }], libc::readv)
    }
}

fn buffer(bytes: &[u8]) -> libc::iovec {
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

/// Does `work` on every stream at once. The first failure ends the others, and is the one reported.
fn on_all<S: Sync>(
    streams: &[S],
    cancelled: &AtomicBool,
    work: impl Fn(&S) -> Result<(), WireError> + Sync,
) -> Result<(), WireError> {
    let failure = Mutex::new(None);
    let guarded = |stream: &S| {
        if let Err(error) = work(stream) {
            cancelled.store(true, Ordering::Relaxed);
            failure.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(error);
        }
    };
    std::thread::scope(|scope| {
        for stream in streams.iter().skip(1) {
            scope.spawn(|| guarded(stream));
        }
        streams.iter().take(1).for_each(&guarded);
    });
    failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
}

/// Sizes and codec of the blocks to send.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// How page blocks are compressed.
    pub codec: Codec,
    /// Data bytes of a page block.
    pub unit: usize,
    /// Data bytes of a storage block.
    pub capacity: usize,
}

/// The sending end of page streams.
#[derive(Debug)]
pub struct BlockSender {
    streams: Vec<Mutex<Outgoing>>,
    cancelled: Arc<AtomicBool>,
    progress: Progress,
}

#[derive(Debug)]
struct Outgoing {
    socket: Socket,
    builder: Builder,
    sequence: u64,
}

impl BlockSender {
    /// Over connected sockets. `patience`: how long the peer may leave a stream untouched.
    pub fn new(sockets: Vec<OwnedFd>, format: Format, patience: Duration) -> io::Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let stream = |fd| {
            let socket = Socket::new(fd, patience, cancelled.clone())?;
            let builder = Builder::new(format.codec, format.unit, format.capacity);
            Ok(Mutex::new(Outgoing { socket, builder, sequence: 0 }))
        };
        let streams = sockets.into_iter().map(stream).collect::<io::Result<_>>()?;
        Ok(Self { streams, cancelled, progress: Progress::default() })
    }

    /// What has been sent so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Ends all that is under way, soon, with [`WireError::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Sends the pages of `sets` (one per region) over all streams, and with `barrier` the end of the round.
    pub fn send(&self, regions: &[Arc<Mapping>], sets: &[PageSet], round: u32, barrier: bool) -> Result<(), WireError> {
        let data = regions.iter().map(|mapping| data_pages(mapping)).collect::<io::Result<Vec<_>>>()?;
        let shares: Vec<(usize, usize)> = sets
            .iter()
            .enumerate()
            .flat_map(|(region, set)| (0..set.pages().div_ceil(SHARE)).map(move |share| (region, share * SHARE)))
            .filter(|&(region, start)| sets[region].runs_in(start, start + SHARE).next().is_some())
            .collect();
        let round = Round { regions, sets, data: &data, shares, next: AtomicUsize::new(0), number: round, barrier };
        on_all(&self.streams, &self.cancelled, |stream| self.send_shares(stream, &round))
    }

    fn send_shares(&self, stream: &Mutex<Outgoing>, round: &Round<'_>) -> Result<(), WireError> {
        let mut out = stream.lock().unwrap_or_else(PoisonError::into_inner);
        let mut current = 0;
        while let Some(&(region, start)) = round.shares.get(round.next.fetch_add(1, Ordering::Relaxed)) {
            if region != current {
                self.flush(&mut out, current, round.number)?;
                current = region;
            }
            for (first, last) in round.sets[region].runs_in(start, start + SHARE) {
                self.send_run(&mut out, round, region, first, last)?;
            }
        }
        self.flush(&mut out, current, round.number)?;
        if round.barrier {
            let Outgoing { socket, builder, sequence } = &mut *out;
            let bytes = socket.write(&builder.barrier(round.number, *sequence))?;
            self.progress.bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Sends a run of pages: those in memory as what they hold, the others as absent.
    fn send_run(
        &self,
        out: &mut Outgoing,
        round: &Round<'_>,
        region: usize,
        first: usize,
        last: usize,
    ) -> Result<(), WireError> {
        let mut at = first;
        for (start, end) in round.data[region].runs_in(first, last).chain(std::iter::once((last, last))) {
            if at < start {
                self.make_room(out, region, round.number)?;
                out.builder.push_run(at, start - at, Class::Absent, 0);
                self.progress.count(Class::Absent, start - at);
            }
            for page in start..end {
                self.make_room(out, region, round.number)?;
                let before = out.builder.raw_len();
                // SAFETY: the page is within the mapping (`page` asserts it).
                unsafe { out.builder.push_page(page, round.regions[region].page(page)) };
                let class = if out.builder.raw_len() > before { Class::Data } else { Class::Zero };
                self.progress.count(class, 1);
            }
            at = end;
        }
        Ok(())
    }

    fn make_room(&self, out: &mut Outgoing, region: usize, round: u32) -> Result<(), WireError> {
        if out.builder.is_full() { self.flush(out, region, round) } else { Ok(()) }
    }

    fn flush(&self, out: &mut Outgoing, region: usize, round: u32) -> Result<(), WireError> {
        let Outgoing { socket, builder, sequence } = out;
        if builder.is_empty() {
            return Ok(());
        }
        let region = u32::try_from(region).map_err(|_| WireError::Order(format!("region {region}")))?;
        let bytes = socket.write(&builder.build(region, round, *sequence))?;
        *sequence += 1;
        self.progress.block(bytes);
        Ok(())
    }
}

struct Round<'a> {
    regions: &'a [Arc<Mapping>],
    sets: &'a [PageSet],
    data: &'a [PageSet],
    shares: Vec<(usize, usize)>,
    next: AtomicUsize,
    number: u32,
    barrier: bool,
}

fn data_pages(mapping: &Mapping) -> io::Result<PageSet> {
    let mut data = PageSet::new(mapping.pages());
    for (start, end) in mapping.data_ranges()? {
        data.insert(start / SMALL_PAGE, end.div_ceil(SMALL_PAGE));
    }
    Ok(data)
}

/// The receiving end of page streams.
#[derive(Debug)]
pub struct BlockReceiver {
    streams: Vec<Mutex<Incoming>>,
    placer: Arc<Placer>,
    cancelled: Arc<AtomicBool>,
    progress: Progress,
}

#[derive(Debug)]
struct Incoming {
    socket: Socket,
    sequence: u64,
    table: Vec<u8>,
    payload: Vec<u8>,
    scratch: Vec<u8>,
}

impl BlockReceiver {
    /// Over connected sockets, into the placer's regions.
    pub fn new(sockets: Vec<OwnedFd>, placer: Arc<Placer>, patience: Duration) -> io::Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let stream = |fd| {
            let socket = Socket::new(fd, patience, cancelled.clone())?;
            let (table, payload, scratch) = (Vec::new(), Vec::new(), Vec::new());
            Ok(Mutex::new(Incoming { socket, sequence: 0, table, payload, scratch }))
        };
        let streams = sockets.into_iter().map(stream).collect::<io::Result<_>>()?;
        Ok(Self { streams, placer, cancelled, progress: Progress::default() })
    }

    /// What has been received so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Ends all that is under way, soon, with [`WireError::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Receives and places blocks until every stream has seen the barrier of `round`.
    pub fn receive(&self, round: u32) -> Result<(), WireError> {
        on_all(&self.streams, &self.cancelled, |stream| self.receive_stream(stream, round))
    }

    fn receive_stream(&self, stream: &Mutex<Incoming>, round: u32) -> Result<(), WireError> {
        let mut input = stream.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let head = self.read_head(&mut input)?;
            if head.round != round || head.sequence != input.sequence {
                let (got, at) = (head.round, head.sequence);
                let expected = input.sequence;
                return Err(WireError::Order(format!("block {at} of round {got}, expected {expected} of {round}")));
            }
            if head.kind == Kind::Barrier {
                return Ok(());
            }
            input.sequence += 1;
            self.read_pages(&mut input, &head)?;
        }
    }

    fn read_head(&self, input: &mut Incoming) -> Result<Head, WireError> {
        let mut header = Header::new_zeroed();
        input.socket.read(header.as_mut_bytes())?;
        let len = block::table_len(&header)?;
        input.table.resize(len, 0);
        input.socket.read(&mut input.table)?;
        let head = block::decode_head(&header, &input.table)?;
        let bytes = block::HEADER_LEN + len + head.stored_len;
        match head.kind {
            Kind::Pages => self.progress.block(bytes),
            Kind::Barrier => drop(self.progress.bytes.fetch_add(bytes as u64, Ordering::Relaxed)),
        }
        Ok(head)
    }

    fn read_pages(&self, input: &mut Incoming, head: &Head) -> Result<(), WireError> {
        let data = |run: &&Run| run.class == Class::Data;
        let mut slots = Vec::new();
        for run in head.runs.iter().filter(data) {
            let start = self.placer.slots(head.region, run.first, run.count)?;
            slots.push(libc::iovec { iov_base: start.cast(), iov_len: run.count * SMALL_PAGE });
        }
        if head.codec == Codec::None {
            read_in_place(&input.socket, head, slots)?;
        } else {
            read_packed(input, head, &slots)?;
        }
        for run in &head.runs {
            match run.class {
                Class::Data => self.placer.placed(head.region, run.first, run.count)?,
                class => self.placer.place_empty(head.region, run.first, run.count, class)?,
            }
            self.progress.count(run.class, run.count);
        }
        Ok(())
    }
}

/// Reads uncompressed pages into their slots and verifies them there. Nobody but us uses the memory until the source
/// has committed, and a block that fails its checksum ends the migration before that.
fn read_in_place(socket: &Socket, head: &Head, slots: Vec<libc::iovec>) -> Result<(), WireError> {
    if slots.is_empty() {
        return Ok(());
    }
    let mut buffers = slots.clone();
    socket.all(&mut buffers, libc::readv)?;
    let mut rest = Pieces::new(&slots);
    for (index, record) in head.page_blocks.iter().enumerate() {
        let mut hash = Xxh3Default::new();
        rest.take(record.raw_len.get() as usize, |piece, len| {
            // SAFETY: a piece of a slot that the placer gave out; nobody writes to it while we verify.
            hash.update(unsafe { std::slice::from_raw_parts(piece, len) });
        });
        verify(head, index, hash.digest() == record.checksum.get())?;
    }
    Ok(())
}

fn verify(head: &Head, index: usize, good: bool) -> Result<(), BlockError> {
    let first = head.runs.iter().find(|run| run.class == Class::Data).map_or(0, |run| run.first as u64);
    if good { Ok(()) } else { Err(BlockError::PayloadChecksum { index, page: first, region: head.region }) }
}

/// Reads compressed page blocks, verifies them, and only then lets them reach their slots.
fn read_packed(input: &mut Incoming, head: &Head, slots: &[libc::iovec]) -> Result<(), WireError> {
    input.payload.resize(head.stored_len, 0);
    input.socket.read(&mut input.payload)?;
    let (mut rest, mut at) = (Pieces::new(slots), 0);
    for (index, record) in head.page_blocks.iter().enumerate() {
        let stored = &input.payload[at..at + record.stored_len.get() as usize];
        verify(head, index, block::checksum(stored) == record.checksum.get())?;
        input.scratch.resize(record.raw_len.get() as usize, 0);
        block::decompress(head.codec, stored, &mut input.scratch).map_err(|reason| BlockError::Decompress {
            index,
            region: head.region,
            reason,
        })?;
        let mut done = 0;
        rest.take(input.scratch.len(), |piece, len| {
            // SAFETY: a piece of a slot that the placer gave out, and as many bytes of the scratch buffer.
            unsafe { std::ptr::copy_nonoverlapping(input.scratch[done..].as_ptr(), piece, len) };
            done += len;
        });
        at += stored.len();
    }
    Ok(())
}

/// Walks over slots as if they were one stretch of memory.
struct Pieces<'a> {
    slots: &'a [libc::iovec],
    offset: usize,
}

impl<'a> Pieces<'a> {
    fn new(slots: &'a [libc::iovec]) -> Self {
        Self { slots, offset: 0 }
    }

    /// Calls `piece` for the next `len` bytes, as far as they lie together.
    fn take(&mut self, mut len: usize, mut piece: impl FnMut(*mut u8, usize)) {
        while len > 0 {
            let Some(slot) = self.slots.first() else { return };
            let part = len.min(slot.iov_len - self.offset);
            piece(slot.iov_base.cast::<u8>().wrapping_add(self.offset), part);
            self.offset += part;
            len -= part;
            if self.offset == slot.iov_len {
                self.slots = &self.slots[1..];
                self.offset = 0;
            }
        }
    }
}
