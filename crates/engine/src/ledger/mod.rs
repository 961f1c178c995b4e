//! The built-in workload: threads that rewrite self-describing pages, so that a lost, stale or torn write shows.
//!
//! # Layout
//!
//! All of it lies in the workload's memory and travels with it. Everything is native-endian 64-bit words.
//!
//! ```text
//! page 0            header: magic, layout version, sizes, options, checksum
//! page 1 ..         one page of counters per partition (own cache lines): tag, writes, bad pages met, first of them,
//!                   sum of the hashes of its table entries
//! then              table: one word per body page, version << 1 | "is zeros"
//! then              body pages: checksum, number, version, seed, pseudo-random content of (seed, number, version),
//!                   or nothing but zeros where the table says so
//! ```
//!
//! Body pages are shared out evenly to *partitions*, one writer thread each, so no operation needs a lock. The first
//! part of each partition is filled when the ledger is made; the rest is never touched, neither its body pages nor
//! its part of the table, because reading it would allocate it.
//!
//! # Why damage shows
//!
//! An operation reads a page and its table entry, writes the page with the next version, then the table entry, then
//! the counters of writes and of the table. Threads are paused only between operations, so of a paused ledger all of this holds:
//!
//! 1. each page carries the number of its place, the version in the table, and a checksum over all of it (or is zeros);
//! 2. the versions of a partition's pages add up to its counter of writes (filling a page is its write number 1), and
//!    the hashes of its table entries to the sum beside it;
//! 3. which page operation *n* of a partition writes, and with what, follows from (seed, partition, *n*): the whole
//!    content is a function of the header and the counters.
//!
//! A page that was lost is zeros or carries an old version against the table (1). A page torn between two versions
//! fails its checksum (1). A stale table entry disagrees with its page (1), or, when both are stale, the sum
//! disagrees with the counter (2). A stale counter disagrees with the sum (2). What remains is memory that is as a
//! whole an older instant of itself; that is found by comparing [`Ledger::fingerprint`] across a move.
//!
//! Operations check the page they are about to overwrite, and count what they find in the partition's counters:
//! damage cannot be written over unnoticed between a move and the next [`Ledger::verify`].

mod layout;
mod options;
mod page;
mod stalls;
mod verify;
mod workers;
mod writer;

use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use parking_lot::Mutex;

pub use options::Options;
pub use stalls::Stalls;
pub use verify::Report;
pub use workers::State;

use crate::mapping::Mapping;
use layout::Layout;
use stalls::Stopwatch;
use workers::Workers;

/// What can be wrong with a ledger, or with what was asked of it.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// An option out of its range.
    #[error("{0}")]
    BadOption(String),
    /// The memory has no room for a header, counters and at least one body page per thread.
    #[error("{length} bytes are too few for a ledger of {threads} threads")]
    TooSmall {
        /// Bytes of memory.
        length: usize,
        /// Threads asked for.
        threads: usize,
    },
    /// The memory does not start with an intact header of a ledger.
    #[error("this memory holds no ledger: {0}")]
    NoLedger(&'static str),
    /// Partitions that do not exist.
    #[error("partitions {first}..{end} of a ledger that has {threads}")]
    NoSuchPartition {
        /// First partition asked for.
        first: usize,
        /// One past the last.
        end: usize,
        /// Partitions there are.
        threads: usize,
    },
    /// A call that does not fit what the threads are doing.
    #[error("the threads are {0}")]
    WrongState(State),
    /// A thread ended by itself.
    #[error("a ledger thread has ended by itself")]
    ThreadDied,
    /// Given up on request.
    #[error("interrupted")]
    Interrupted,
    /// The kernel refused something.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

/// A ledger in a mapping, and the threads that run a share of its partitions.
#[derive(Debug)]
pub struct Ledger {
    layout: Arc<Layout>,
    share: Range<usize>,
    workers: Mutex<Option<Workers>>,
    stalls: Arc<Vec<Stopwatch>>,
}

impl Ledger {
    /// Makes a new ledger: fills its pages (one thread per partition) and writes the header last.
    ///
    /// With `large_fraction` only about that part of the 2 MiB units may stand on large pages, whatever the file
    /// system would give. The memory should be fresh; what it held is overwritten where pages are filled. Setting
    /// `cancel` ends the filling early.
    ///
    /// # Errors
    /// Options out of range, memory too small, [`LedgerError::Interrupted`], or `madvise` refused.
    pub fn create(
        mapping: Arc<Mapping>,
        options: &Options,
        large_fraction: Option<f64>,
        cancel: &AtomicBool,
    ) -> Result<Self, LedgerError> {
        options.check()?;
        let layout = Layout::new(mapping, options)?;
        if let Some(fraction) = large_fraction {
            layout.forbid_large_pages(fraction)?;
        }
        writer::fill(&layout, cancel)?;
        layout.write_header();
        let share = 0..layout.options.threads;
        Ok(Self::over(layout, share))
    }

    /// Takes up a ledger that the memory holds already, to run `threads` partitions from `first` on (`None`: all).
    ///
    /// # Errors
    /// [`LedgerError::NoLedger`] when the header is not intact or not of this memory's size.
    pub fn attach(mapping: Arc<Mapping>, first: usize, threads: Option<usize>) -> Result<Self, LedgerError> {
        let layout = Layout::read(mapping)?;
        let all = layout.options.threads;
        let end = threads.map_or(all, |threads| first.saturating_add(threads));
        if first > end || end > all {
            return Err(LedgerError::NoSuchPartition { first, end, threads: all });
        }
        Ok(Self::over(layout, first..end))
    }

    fn over(layout: Layout, share: Range<usize>) -> Self {
        let stalls = share.clone().map(|_| Stopwatch::default()).collect();
        Self { layout: Arc::new(layout), share, workers: Mutex::new(None), stalls: Arc::new(stalls) }
    }

    /// The options that the ledger was made with.
    pub fn options(&self) -> &Options {
        &self.layout.options
    }

    /// Body pages, all partitions.
    pub fn pages(&self) -> usize {
        self.layout.pages
    }

    /// Body pages that are written at all; the others are never touched.
    pub fn filled(&self) -> usize {
        (0..self.layout.options.threads).map(|partition| self.layout.filled(partition)).sum()
    }

    /// The partitions that this object runs.
    pub fn share(&self) -> Range<usize> {
        self.share.clone()
    }

    /// What the threads of this object do.
    pub fn state(&self) -> State {
        self.locked(|workers| workers.as_ref().map_or(State::Stopped, Workers::state))
    }

    /// Starts the threads, which write at once, or, if `paused`, wait for [`Ledger::resume`].
    ///
    /// # Errors
    /// [`LedgerError::WrongState`] when they were started already, or no thread could be made.
    pub fn start(&self, paused: bool) -> Result<(), LedgerError> {
        self.locked(|slot| match slot {
            Some(workers) => Err(LedgerError::WrongState(workers.state())),
            None => {
                *slot = Some(Workers::start(&self.layout, self.share.clone(), &self.stalls, paused)?);
                Ok(())
            }
        })
    }

    /// Asks the threads to park between two operations, and waits for it. `Ok(false)` when `patience` ran out first:
    /// they park as soon as they can, and calling again goes on waiting.
    ///
    /// # Errors
    /// [`LedgerError::WrongState`] when there are no threads, [`LedgerError::ThreadDied`].
    pub fn pause(&self, patience: Duration) -> Result<bool, LedgerError> {
        self.running(|workers| workers.pause(patience))
    }

    /// Lets parked threads go on.
    ///
    /// # Errors
    /// [`LedgerError::WrongState`] when there are no threads.
    pub fn resume(&self) -> Result<(), LedgerError> {
        self.running(|workers| {
            workers.resume();
            Ok(())
        })
    }

    /// Ends the threads between two operations and waits for them; no threads is fine. They can be started again.
    pub fn stop(&self) {
        self.locked(|slot| drop(slot.take()));
    }

    /// Kernel thread ids of the threads, in the order of their partitions; empty when stopped.
    pub fn tids(&self) -> Vec<i32> {
        self.locked(|workers| workers.as_ref().map_or_else(Vec::new, Workers::tids))
    }

    /// Writes done so far per partition (filling included), as the memory has it.
    pub fn writes(&self) -> Vec<u64> {
        (0..self.layout.options.threads).map(|partition| self.layout.counters(partition).writes()).collect()
    }

    /// How long operations of this object's threads took, all threads taken together, since the last reset.
    pub fn stalls(&self, reset: bool) -> Stalls {
        Stalls::of(self.stalls.iter(), reset)
    }

    /// Checks every page that was ever written, with `threads` threads. The ledger must be paused, by all who run it.
    ///
    /// # Errors
    /// [`LedgerError::Interrupted`] when `cancel` was set meanwhile.
    pub fn verify(&self, threads: usize, cancel: &AtomicBool) -> Result<Report, LedgerError> {
        verify::verify(&self.layout, threads, cancel)
    }

    /// A hash of the header, the counters, the table and every page that was ever written, as of a paused ledger.
    ///
    /// # Errors
    /// [`LedgerError::Interrupted`] when `cancel` was set meanwhile.
    pub fn digest(&self, threads: usize, cancel: &AtomicBool) -> Result<u64, LedgerError> {
        verify::digest(&self.layout, threads, cancel)
    }

    /// A hash of the header and the counters, and so of the table that these add up: names the paused instant by a
    /// handful of pages. Whether the table is the one that was added up says [`Ledger::table_agrees`].
    pub fn fingerprint(&self) -> u64 {
        verify::fingerprint(&self.layout)
    }

    /// Whether the table is the one that the counters have added up. Reads all of it.
    pub fn table_agrees(&self) -> bool {
        verify::table_agrees(&self.layout)
    }

    /// Where body page `number` lies in the mapping, bytes; `None` past the last.
    pub fn page_offset(&self, number: usize) -> Option<usize> {
        (number < self.layout.pages).then(|| self.layout.body_offset(number))
    }

    fn locked<T>(&self, action: impl FnOnce(&mut Option<Workers>) -> T) -> T {
        action(&mut self.workers.lock())
    }

    fn running<T>(&self, action: impl FnOnce(&Workers) -> Result<T, LedgerError>) -> Result<T, LedgerError> {
        self.locked(|slot| slot.as_ref().map_or(Err(LedgerError::WrongState(State::Stopped)), action))
    }
}

#[cfg(test)]
mod tests;
