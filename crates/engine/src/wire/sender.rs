//! Pages of a round, from the mappings of the regions to the sockets.

use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::pace::{Adaptive, Limit};
use super::socket::{Endpoint, Socket};
use super::{Progress, WireError, at_least_one, on_all};
use crate::block::{Builder, Class, Codec};
use crate::discards::Discards;
use crate::mapping::Mapping;
use crate::pages::PageSet;
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Pages that a stream takes from a round at a time.
const SHARE: usize = 4 * LARGE_PAGE / SMALL_PAGE;

/// Sizes and codec of the blocks to send, and how fast they may leave.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// How page blocks are compressed.
    pub codec: Codec,
    /// Whether to leave the codec out while the link is faster.
    pub adaptive: bool,
    /// Most bytes per second, over all streams; 0: as fast as they go.
    pub bandwidth: u64,
    /// Data bytes of a page block.
    pub page_block: usize,
    /// Most data bytes of a storage block.
    pub storage_block: usize,
}

/// The sending end of page streams.
#[derive(Debug)]
pub struct BlockSender {
    streams: Vec<Mutex<Outgoing>>,
    cancelled: Arc<AtomicBool>,
    progress: Progress,
    /// Per region, the pages that the peer holds contents of.
    held: Mutex<Vec<PageSet>>,
    /// Of the regions, from the first pages on; none where they cannot be watched.
    discards: OnceLock<Option<Discards>>,
}

/// One stream of blocks.
#[derive(Debug)]
pub(super) struct Outgoing {
    pub(super) socket: Socket,
    builder: Builder,
    sequence: u64,
    adaptive: Adaptive,
    limit: Arc<Limit>,
    /// Blocks count for the limit, and do not wait for it.
    urgent: bool,
    cancelled: Arc<AtomicBool>,
}

impl Outgoing {
    pub(super) fn new(socket: Socket, format: Format, limit: &Arc<Limit>, cancelled: &Arc<AtomicBool>) -> Self {
        let builder = Builder::new(format.codec, format.page_block, format.storage_block);
        let adaptive = Adaptive::new(format.codec, format.adaptive);
        let (limit, cancelled) = (limit.clone(), cancelled.clone());
        Self { socket, builder, sequence: 0, adaptive, limit, urgent: false, cancelled }
    }

    /// Of blocks that count for the limit, and do not wait for it.
    pub(super) fn urgent(self) -> Self {
        Self { urgent: true, ..self }
    }

    /// Whether another page or run may not fit.
    pub(super) fn is_full(&self) -> bool {
        self.builder.is_full()
    }

    /// Adds a page that is in memory.
    pub(super) fn push_page(&mut self, mapping: &Mapping, page: usize, progress: &Progress) {
        let before = self.builder.raw_len();
        // SAFETY: the page is within the mapping (`page` asserts it).
        unsafe { self.builder.push_page(page, mapping.page(page)) };
        let class = if self.builder.raw_len() > before { Class::Data } else { Class::Zero };
        progress.count(class, 1);
    }

    /// Adds pages that are not in memory.
    pub(super) fn push_absent(&mut self, first: usize, count: usize, progress: &Progress) {
        self.builder.push_run(first, count, Class::Absent, 0);
        progress.count(Class::Absent, count);
    }

    /// Sends what there is of a block.
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
        self.adaptive.note(raw, packed - begin, packed.elapsed());
        self.sequence += 1;
        progress.block(bytes);
        if self.adaptive.left_out(codec) && raw > 0 {
            progress.uncompressed.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until something may leave: what is taken up now leaves at once.
    pub(super) fn turn(&self) -> Result<(), WireError> {
        self.limit.wait_for_turn(&self.cancelled)
    }

    /// Ends a round.
    pub(super) fn barrier(&mut self, round: u32, progress: &Progress) -> Result<(), WireError> {
        let built = self.builder.barrier(round, self.sequence);
        self.socket.write([built.head, built.payload])?;
        progress.bytes.fetch_add(built.head.len() as u64, Ordering::Relaxed);
        Ok(())
    }
}

impl BlockSender {
    /// Over connected sockets. `patience`: how long the peer may leave a stream untouched.
    ///
    /// # Errors
    /// InvalidInput without any socket, or what the kernel says about one.
    pub fn new(sockets: Vec<impl Into<Endpoint>>, format: Format, patience: Duration) -> io::Result<Self> {
        let (cancelled, limit) = (Arc::new(AtomicBool::new(false)), Arc::new(Limit::new(format.bandwidth)));
        let stream = |socket: Endpoint| {
            let socket = Socket::new(socket, patience, cancelled.clone())?;
            Ok(Mutex::new(Outgoing::new(socket, format, &limit, &cancelled)))
        };
        let streams = at_least_one(sockets.into_iter().map(Into::into).map(stream).collect::<io::Result<_>>()?)?;
        Ok(Self {
            streams,
            cancelled,
            progress: Progress::default(),
            held: Mutex::default(),
            discards: OnceLock::new(),
        })
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
    ///
    /// Pages that were sent before and have become holes since, or were holes and are zeros now, are sent as such too:
    /// freeing a page is no write, so no trace fires for it.
    pub fn send(&self, regions: &[Arc<Mapping>], sets: &[PageSet], round: u32, barrier: bool) -> Result<(), WireError> {
        // Before anything is read: what is discarded later is heard of by the next call.
        let files = || regions.iter().map(|mapping| mapping.as_fd().as_raw_fd());
        let discards = self.discards.get_or_init(|| Discards::watch(files()).ok());
        let discarded = discards.as_ref().is_none_or(|discards| discards.seen().unwrap_or(true));
        let data = regions.iter().map(|mapping| data_pages(mapping)).collect::<io::Result<Vec<_>>>()?;
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

    /// The sets with what the peer holds and is a hole here now, and if memory was `discarded`, what is zeros; from
    /// then on the peer holds what they leave it with.
    fn with_freed(
        &self,
        regions: &[Arc<Mapping>],
        sets: &[PageSet],
        data: &[PageSet],
        discarded: bool,
    ) -> Vec<PageSet> {
        let mut held = self.held.lock();
        let known = held.len();
        held.extend(data.iter().skip(known).map(|data| PageSet::new(data.pages())));
        let grow = |(((held, set), data), mapping): (((&mut PageSet, &PageSet), &PageSet), &Arc<Mapping>)| {
            let mut grown = held.clone();
            grown.subtract(data);
            grown.union(set);
            if discarded {
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
                self.flush_full(out, region, round.number)?;
                out.push_absent(at, start - at, &self.progress);
            }
            for page in start..end {
                self.flush_full(out, region, round.number)?;
                out.push_page(&round.regions[region], page, &self.progress);
            }
            at = end;
        }
        Ok(())
    }

    fn flush_full(&self, out: &mut Outgoing, region: usize, round: u32) -> Result<(), WireError> {
        if out.is_full() { out.flush(region, round, &self.progress) } else { Ok(()) }
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

pub(super) fn data_pages(mapping: &Mapping) -> io::Result<PageSet> {
    let mut data = PageSet::new(mapping.pages());
    for (start, end) in mapping.data_ranges()? {
        data.insert(start / SMALL_PAGE, end.div_ceil(SMALL_PAGE));
    }
    Ok(data)
}
