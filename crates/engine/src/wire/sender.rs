//! Pages of a round, from the mappings of the regions to the sockets.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::socket::Socket;
use super::{Progress, WireError, at_least_one, on_all};
use crate::block::{Builder, Class, Codec};
use crate::mapping::Mapping;
use crate::pages::PageSet;
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Pages that a stream takes from a round at a time.
const SHARE: usize = 4 * LARGE_PAGE / SMALL_PAGE;

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
    /// Per region, the pages that the peer holds contents of.
    held: Mutex<Vec<PageSet>>,
}

#[derive(Debug)]
struct Outgoing {
    socket: Socket,
    builder: Builder,
    sequence: u64,
}

impl BlockSender {
    /// Over connected sockets. `patience`: how long the peer may leave a stream untouched.
    ///
    /// # Errors
    /// InvalidInput without any socket, or what the kernel says about one.
    pub fn new(sockets: Vec<OwnedFd>, format: Format, patience: Duration) -> io::Result<Self> {
        let cancelled = Arc::new(AtomicBool::new(false));
        let stream = |fd| {
            let socket = Socket::new(fd, patience, cancelled.clone())?;
            let builder = Builder::new(format.codec, format.unit, format.capacity);
            Ok(Mutex::new(Outgoing { socket, builder, sequence: 0 }))
        };
        let streams = at_least_one(sockets.into_iter().map(stream).collect::<io::Result<_>>()?)?;
        Ok(Self { streams, cancelled, progress: Progress::default(), held: Mutex::default() })
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
    /// Pages that were sent before and have become holes are sent as such too: freeing a page is no write, so no trace
    /// fires for it.
    pub fn send(&self, regions: &[Arc<Mapping>], sets: &[PageSet], round: u32, barrier: bool) -> Result<(), WireError> {
        let data = regions.iter().map(|mapping| data_pages(mapping)).collect::<io::Result<Vec<_>>>()?;
        let sets = &self.with_freed(sets, &data);
        let shares: Vec<(usize, usize)> = sets
            .iter()
            .enumerate()
            .flat_map(|(region, set)| (0..set.pages().div_ceil(SHARE)).map(move |share| (region, share * SHARE)))
            .filter(|&(region, start)| sets[region].runs_in(start, start + SHARE).next().is_some())
            .collect();
        let round = Round { regions, sets, data: &data, shares, next: AtomicUsize::new(0), number: round, barrier };
        on_all(&self.streams, &self.cancelled, |stream| self.send_shares(stream, &round))
    }

    /// The sets with what the peer holds and is a hole here now; from then on the peer holds what they leave it with.
    fn with_freed(&self, sets: &[PageSet], data: &[PageSet]) -> Vec<PageSet> {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let known = held.len();
        held.extend(data.iter().skip(known).map(|data| PageSet::new(data.pages())));
        let grow = |((held, set), data): ((&mut PageSet, &PageSet), &PageSet)| {
            let mut grown = held.clone();
            grown.subtract(data);
            grown.union(set);
            held.union(set);
            held.intersect(data);
            grown
        };
        held.iter_mut().zip(sets).zip(data).map(grow).collect()
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
            let built = builder.barrier(round.number, *sequence);
            socket.write([built.head, built.payload])?;
            self.progress.bytes.fetch_add(built.head.len() as u64, Ordering::Relaxed);
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
        let built = builder.build(region, round, *sequence);
        socket.write([built.head, built.payload])?;
        *sequence += 1;
        self.progress.block(built.head.len() + built.payload.len());
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
