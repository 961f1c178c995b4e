//! Sender of page streams: reads the pages of a round from the mappings and sends them in storage blocks.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::pace::{Adaptive, RateLimit};
use super::relay::Relay;
use super::socket::{Endpoint, Socket};
use super::{Progress, WireError, at_least_one, on_all};
use crate::block::{Builder, Class, Codec};
use crate::hole_notifications::Discards;
use crate::mapping::Mapping;
use crate::pages::PageSet;
use crate::saver::PageOrigin;
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Maximum number of pages that a stream takes from a round at a time.
const SHARE: usize = 4 * LARGE_PAGE / SMALL_PAGE;
/// Maximum number of pages that are copied from another process at a time.
const COPIED: usize = 64;

/// Block sizes, codec and bandwidth limit of a sender.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// Codec of the page blocks.
    pub codec: Codec,
    /// Whether blocks are left uncompressed while the link is faster than the codec.
    pub adaptive: bool,
    /// Bandwidth limit in bytes per second of all streams together; 0 means unlimited.
    pub bandwidth: u64,
    /// Number of data bytes of a page block.
    pub page_block: usize,
    /// Maximum number of data bytes of a storage block.
    pub storage_block: usize,
}

/// Sending side of a set of page streams.
#[derive(Debug)]
pub struct BlockSender {
    streams: Vec<Mutex<Outgoing>>,
    limit: Arc<RateLimit>,
    cancelled: Arc<AtomicBool>,
    progress: Progress,
    /// For each region, the pages whose contents the peer holds.
    held: Mutex<Vec<PageSet>>,
    /// Inotify watch that reports discards in the regions, created at the first send; `None` if it cannot be created.
    discards: OnceLock<Option<Discards>>,
}

/// One outgoing stream of storage blocks.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) socket: Socket,
    builder: Builder,
    sequence: u64,
    adaptive: Adaptive,
    limit: Arc<RateLimit>,
    /// Whether blocks count towards the bandwidth limit without waiting for it.
    urgent: bool,
    cancelled: Arc<AtomicBool>,
}

impl Outgoing {
    pub(super) fn new(socket: Socket, format: Format, limit: &Arc<RateLimit>, cancelled: &Arc<AtomicBool>) -> Self {
        let builder = Builder::new(format.codec, format.page_block, format.storage_block);
        let adaptive = Adaptive::new(format.codec, format.adaptive);
        let (limit, cancelled) = (limit.clone(), cancelled.clone());
        Self { socket, builder, sequence: 0, adaptive, limit, urgent: false, cancelled }
    }

    /// Makes the blocks of this stream count towards the bandwidth limit without waiting for it.
    pub(super) fn urgent(self) -> Self {
        Self { urgent: true, ..self }
    }

    /// Returns whether the current block may lack space for another page or run.
    pub(super) fn is_full(&self) -> bool {
        self.builder.is_full()
    }

    /// Adds a page that is present in memory, as a data page or as a zero page.
    pub(super) fn push_page(&mut self, mapping: &Mapping, page: usize, progress: &Progress) {
        // SAFETY: `Mapping::page` asserts that the page lies within the mapping, which is readable and lives through
        // the call.
        unsafe { self.push_contents(page, mapping.page(page), progress) };
    }

    /// Adds a copy of a page, as a data page or as a zero page.
    fn push_copy(&mut self, page: usize, contents: &[u8], progress: &Progress) {
        assert!(contents.len() == SMALL_PAGE, "a page of {} bytes", contents.len());
        // SAFETY: the slice has the length of a page, by the assertion.
        unsafe { self.push_contents(page, contents.as_ptr(), progress) };
    }

    /// # Safety
    /// `contents` must be valid for reading a page.
    unsafe fn push_contents(&mut self, page: usize, contents: *const u8, progress: &Progress) {
        let before = self.builder.raw_len();
        // SAFETY: guaranteed by the caller.
        unsafe { self.builder.push_page(page, contents) };
        let class = if self.builder.raw_len() > before { Class::Data } else { Class::Zero };
        progress.count(class, 1);
    }

    /// Adds a run of holes.
    pub(super) fn push_absent(&mut self, first: usize, count: usize, progress: &Progress) {
        self.builder.push_run(first, count, Class::Absent, 0);
        progress.count(Class::Absent, count);
    }

    /// Sends the current block, unless it is empty.
    pub(super) fn flush(&mut self, region: usize, round: u32, progress: &Progress) -> Result<(), WireError> {
        if self.builder.is_empty() {
            return Ok(());
        }
        let region = u32::try_from(region).map_err(|_| WireError::Order(format!("region {region}")))?;
        let (raw, codec, begin) = (self.builder.raw_len(), self.adaptive.codec(), Instant::now());
        let built = self.builder.build_with(codec, region, round, self.sequence);
        let (bytes, packed) = (built.head.len() + built.payload.len(), Instant::now());
        self.limit.wait(bytes, self.urgent, &self.cancelled)?;
        self.socket.write([built.head, built.payload])?;
        self.adaptive.record(raw, packed - begin, packed.elapsed());
        self.sequence += 1;
        progress.block(bytes);
        if self.adaptive.is_bypassed_by(codec) && raw > 0 {
            progress.uncompressed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until the bandwidth limit allows a send, so that pages taken after this call are sent without delay.
    pub(super) fn wait_for_turn(&self) -> Result<(), WireError> {
        self.limit.wait_for_turn(&self.cancelled)
    }

    /// Sends the barrier of a round.
    pub(super) fn barrier(&mut self, round: u32, progress: &Progress) -> Result<(), WireError> {
        let built = self.builder.barrier(round, self.sequence);
        self.socket.write([built.head, built.payload])?;
        progress.bytes.fetch_add(built.head.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl BlockSender {
    /// Creates a sender over connected sockets. A stream fails if the peer has not read a byte for `timeout`.
    ///
    /// # Errors
    /// `InvalidInput` if `sockets` is empty; otherwise the error of the socket operation that failed.
    pub fn new(sockets: Vec<impl Into<Endpoint>>, format: Format, timeout: Duration) -> io::Result<Self> {
        let (cancelled, limit) = (Arc::new(AtomicBool::new(false)), Arc::new(RateLimit::new(format.bandwidth)));
        let stream = |socket: Endpoint| {
            let socket = Socket::new(socket, timeout, cancelled.clone())?;
            Ok(Mutex::new(Outgoing::new(socket, format, &limit, &cancelled)))
        };
        let streams = at_least_one(sockets.into_iter().map(Into::into).map(stream).collect::<io::Result<_>>()?)?;
        Ok(Self {
            streams,
            limit,
            cancelled,
            progress: Progress::default(),
            held: Mutex::default(),
            discards: OnceLock::new(),
        })
    }

    /// Returns the counters of the pages sent so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Starts a relay between `local` and the connection `remote`. Its bytes share the bandwidth limit of the pages.
    ///
    /// # Errors
    /// The error of the socket operation or of the thread creation that failed.
    pub fn relay(&self, local: impl Into<Endpoint>, remote: impl Into<Endpoint>) -> io::Result<Relay> {
        Relay::with_limit(local, remote, Some(self.limit.clone()))
    }

    /// Cancels all transfers; they fail with [`WireError::Cancelled`].
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// Sends the pages of `sets` (one set per region) over all streams; with `barrier`, ends the round.
    ///
    /// Also sends pages that were freed since they were sent: as holes, or as zero pages if they have been allocated
    /// again. Freeing a page is not a write, so no trace reports it. The pages of a clone are never freed.
    ///
    /// # Errors
    /// The error of lseek(2) or PAGEMAP_SCAN on a region, of a read of another process, or the first error of any
    /// stream; the other streams are then cancelled.
    pub fn send<R>(&self, regions: &[R], sets: &[PageSet], round: u32, barrier: bool) -> Result<(), WireError>
    where
        R: Clone + Into<PageOrigin>,
    {
        let regions: &Vec<PageOrigin> = &regions.iter().cloned().map(Into::into).collect();
        // Read the notifications before the memory: the next call then sees the notification of any later discard.
        let discarded = regions.iter().any(|region| region.file().is_some()) && {
            let files = || regions.iter().filter_map(PageOrigin::file);
            let discards = self.discards.get_or_init(|| Discards::watch(files()).ok());
            discards.as_ref().is_none_or(|discards| discards.seen().unwrap_or(true))
        };
        let data = regions.iter().map(PageOrigin::data_pages).collect::<io::Result<Vec<_>>>()?;
        let sets = &self.with_freed(regions, sets, &data, discarded);
        let shares: Vec<(usize, usize)> = sets
            .iter()
            .enumerate()
            .flat_map(|(region, set)| (0..set.pages().div_ceil(SHARE)).map(move |share| (region, share * SHARE)))
            .filter(|&(region, start)| sets[region].runs_in(start, start + SHARE).next().is_some())
            .collect();
        let round = Round { regions, sets, data: &data, shares, next: AtomicUsize::new(0), number: round, barrier };
        on_all(&self.streams, &self.cancelled, |stream| self.send_shares(stream, &round))
    }

    /// Extends the sets by pages that the peer holds and that have since become holes or, after a discard, zeros.
    /// Records the result as the contents of the peer.
    fn with_freed(&self, regions: &[PageOrigin], sets: &[PageSet], data: &[PageSet], discarded: bool) -> Vec<PageSet> {
        let mut held = self.held.lock();
        let known = held.len();
        held.extend(data.iter().skip(known).map(|data| PageSet::new(data.pages())));
        let grow = |(((held, set), data), region): (((&mut PageSet, &PageSet), &PageSet), &PageOrigin)| {
            let mut grown = held.clone();
            grown.subtract(data);
            grown.union(set);
            if discarded && let PageOrigin::Shared(mapping) = region {
                let mut kept = held.clone();
                kept.subtract(&grown);
                let zeros = |page: &usize| mapping.is_zero(*page);
                kept.runs()
                    .flat_map(|(start, end)| start..end)
                    .filter(zeros)
                    .for_each(|page| grown.insert(page, page + 1));
            }
            held.union(set);
            held.intersect(data);
            grown
        };
        held.iter_mut().zip(sets).zip(data).zip(regions).map(grow).collect()
    }

    fn send_shares(&self, stream: &Mutex<Outgoing>, round: &Round<'_>) -> Result<(), WireError> {
        let mut out = stream.lock();
        let mut current = 0;
        while let Some(&(region, start)) = round.shares.get(round.next.fetch_add(1, Ordering::Relaxed)) {
            if region != current {
                out.flush(current, round.number, &self.progress)?;
                current = region;
            }
            for (first, last) in round.sets[region].runs_in(start, start + SHARE) {
                self.send_run(&mut out, round, region, first, last)?;
            }
        }
        out.flush(current, round.number, &self.progress)?;
        if round.barrier { out.barrier(round.number, &self.progress) } else { Ok(()) }
    }

    /// Sends a run of pages: present pages with their contents, all other pages as holes.
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
                self.flush_full(out, region, round.number)?;
                out.push_absent(at, start - at, &self.progress);
            }
            if let PageOrigin::Shared(mapping) = &round.regions[region] {
                for page in start..end {
                    self.flush_full(out, region, round.number)?;
                    out.push_page(mapping, page, &self.progress);
                }
            } else {
                self.send_copies(out, round, region, start, end)?;
            }
            at = end;
        }
        Ok(())
    }

    /// Sends pages that are not in a file mapped by this process.
    fn send_copies(
        &self,
        out: &mut Outgoing,
        round: &Round<'_>,
        region: usize,
        start: usize,
        end: usize,
    ) -> Result<(), WireError> {
        let mut copies = Vec::new();
        for first in (start..end).step_by(COPIED) {
            copies.resize((end - first).min(COPIED) * SMALL_PAGE, 0);
            round.regions[region].fetch(first * SMALL_PAGE, &mut copies)?;
            for (page, contents) in (first..).zip(copies.chunks(SMALL_PAGE)) {
                self.flush_full(out, region, round.number)?;
                out.push_copy(page, contents, &self.progress);
            }
        }
        Ok(())
    }

    fn flush_full(&self, out: &mut Outgoing, region: usize, round: u32) -> Result<(), WireError> {
        if out.is_full() { out.flush(region, round, &self.progress) } else { Ok(()) }
    }
}

struct Round<'a> {
    regions: &'a [PageOrigin],
    sets: &'a [PageSet],
    data: &'a [PageSet],
    shares: Vec<(usize, usize)>,
    next: AtomicUsize,
    number: u32,
    barrier: bool,
}
