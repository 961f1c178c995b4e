//! Built-in workload: threads that rewrite self-describing pages, so that every lost, stale or torn write is detected.
//!
//! # Layout
//!
//! The whole state is in the workload's memory, and is migrated with it. All words are 64 bits, in native byte order.
//!
//! ```text
//! page 0            header: magic, layout version, sizes, options, checksum
//! page 1 ..         one page of counters per partition: tag, writes, damaged pages found, first of these,
//!                   sum of the hashes of its table entries
//! then              table: one word per body page, version << 1 | "is zeros"
//! then              body pages: checksum, number, version, seed, pseudo-random content of (seed, number, version),
//!                   or zeros if "is zeros" is set in the table entry
//! ```
//!
//! Body pages are divided evenly among *partitions* with one writer thread each, so operations require no lock. The
//! first pages of each partition are filled when the ledger is created. The remaining pages and their table entries are
//! never accessed, because reading would allocate them.
//!
//! # Detection of damage
//!
//! An operation reads a page and its table entry, writes the page with the next version, then the table entry, and then
//! the write counter and the table sum of the partition. Threads pause only between operations. In a paused ledger, the
//! following holds:
//!
//! 1. Each page contains its number, the version of its table entry, and a checksum of its contents, or is zeros.
//! 2. The sum of the versions of a partition's pages equals its write counter, which also counts the filling of
//!    each page. The sum of the hashes of its table entries equals its table sum.
//! 3. The page that operation *n* of a partition writes, and its contents, follow from (seed, partition, *n*): the
//!    whole memory is a function of the header and the counters.
//!
//! A lost page is zeros or has an older version than its table entry (1). A page torn between two versions fails its
//! checksum (1). A stale table entry does not match its page (1) or, if both are stale, its partition does not match
//! its counters (2). A stale counter does not match the sum (2). The only remaining case is memory that is consistent
//! but outdated as a whole. This case is detected by comparing [`Ledger::fingerprint`] before and after a migration.
//!
//! Operations check each page that they are about to overwrite, and count damaged pages in the counters of the
//! partition. Damage therefore cannot be overwritten unnoticed between a migration and the next [`Ledger::verify`].

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

use pageferry_engine::mapping::Mapping;
use parking_lot::Mutex;

pub use options::Options;
pub use stalls::Stalls;
pub use verify::Report;
pub use workers::State;

use layout::Layout;
use stalls::Stopwatch;
use workers::Workers;

/// Error of an operation on a ledger.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// An option is out of range.
    #[error("{0}")]
    BadOption(String),
    /// The memory is too small for a header, counters and one body page per thread.
    #[error("cannot create a ledger of {threads} threads: the memory of {length} bytes is too small")]
    TooSmall {
        /// Size of the memory in bytes.
        length: usize,
        /// Number of threads requested.
        threads: usize,
    },
    /// The memory does not start with a valid header of a ledger.
    #[error("not a ledger: {0}")]
    NoLedger(&'static str),
    /// Some of the requested partitions do not exist.
    #[error("invalid partitions {first}..{end}: the ledger has {threads} partitions")]
    NoSuchPartition {
        /// First partition requested.
        first: usize,
        /// Partition after the last requested one.
        end: usize,
        /// Number of partitions of the ledger.
        threads: usize,
    },
    /// The operation is not allowed in the current state of the threads.
    #[error("invalid operation: the threads are {0}")]
    WrongState(State),
    /// A thread exited unexpectedly.
    #[error("internal error: a ledger thread exited unexpectedly")]
    ThreadDied,
    /// The operation was cancelled.
    #[error("interrupted")]
    Interrupted,
    /// A system call failed.
    #[error(transparent)]
    Kernel(#[from] io::Error),
}

/// Ledger in a mapping, and the threads of this object, which run a share of its partitions.
#[derive(Debug)]
pub struct Ledger {
    layout: Arc<Layout>,
    share: Range<usize>,
    workers: Mutex<Option<Workers>>,
    stalls: Arc<Vec<Stopwatch>>,
}

impl Ledger {
    /// Creates a ledger: fills its pages with one thread per partition, and writes the header last.
    ///
    /// With `large_fraction`, only about that fraction of the 2 MiB units may be backed by huge pages. The memory
    /// should not have been accessed before; filling overwrites its contents. Setting `cancel` stops the filling.
    ///
    /// # Errors
    /// [`LedgerError::BadOption`] if an option is out of range; [`LedgerError::TooSmall`] if the memory is too small;
    /// [`LedgerError::Interrupted`] if `cancel` was set; [`LedgerError::Kernel`] with the error of madvise(2).
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

    /// Opens an existing ledger, to run `threads` partitions from `first` on; `None` means all partitions from `first`
    /// on.
    ///
    /// # Errors
    /// [`LedgerError::NoLedger`] if the header is invalid or belongs to memory of another size;
    /// [`LedgerError::NoSuchPartition`] if the ledger does not have these partitions.
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

    /// Returns the options with which the ledger was created.
    pub fn options(&self) -> &Options {
        &self.layout.options
    }

    /// Returns the number of body pages.
    pub fn pages(&self) -> usize {
        self.layout.pages
    }

    /// Returns the number of filled body pages. All other body pages are never accessed.
    pub fn filled(&self) -> usize {
        (0..self.layout.options.threads).map(|partition| self.layout.filled(partition)).sum()
    }

    /// Returns the partitions that this object runs.
    pub fn share(&self) -> Range<usize> {
        self.share.clone()
    }

    /// Returns the state of the threads of this object.
    pub fn state(&self) -> State {
        self.locked(|workers| workers.as_ref().map_or(State::Stopped, Workers::state))
    }

    /// Starts the threads, which write at once or, if `paused`, wait for [`Ledger::resume`].
    ///
    /// # Errors
    /// [`LedgerError::WrongState`] if the threads have already been started; otherwise the error of starting a thread.
    pub fn start(&self, paused: bool) -> Result<(), LedgerError> {
        self.locked(|slot| match slot {
            Some(workers) => Err(LedgerError::WrongState(workers.state())),
            None => {
                *slot = Some(Workers::start(&self.layout, self.share.clone(), &self.stalls, paused)?);
                Ok(())
            }
        })
    }

    /// Pauses the threads between two operations. Returns `Ok(false)` after `timeout`: the threads then pause after
    /// their current operations, and another call continues to wait.
    ///
    /// # Errors
    /// [`LedgerError::WrongState`] if there are no threads, [`LedgerError::ThreadDied`] if a thread has exited.
    pub fn pause(&self, timeout: Duration) -> Result<bool, LedgerError> {
        self.running(|workers| workers.pause(timeout))
    }

    /// Resumes paused threads.
    ///
    /// # Errors
    /// [`LedgerError::WrongState`] if there are no threads.
    pub fn resume(&self) -> Result<(), LedgerError> {
        self.running(|workers| {
            workers.resume();
            Ok(())
        })
    }

    /// Stops the threads between two operations, and joins them. Does nothing if there are no threads. The ledger can
    /// be started again.
    pub fn stop(&self) {
        self.locked(|slot| drop(slot.take()));
    }

    /// Returns the kernel thread IDs of the threads, in the order of their partitions; empty if stopped.
    pub fn tids(&self) -> Vec<i32> {
        self.locked(|workers| workers.as_ref().map_or_else(Vec::new, Workers::tids))
    }

    /// Returns the number of writes to each partition as recorded in the memory. Writes that fill pages are included.
    pub fn writes(&self) -> Vec<u64> {
        (0..self.layout.options.threads).map(|partition| self.layout.counters(partition).writes()).collect()
    }

    /// Returns the durations of the operations of all threads of this object, since the last reset. If `reset` is true,
    /// clears them.
    pub fn stalls(&self, reset: bool) -> Stalls {
        Stalls::of(self.stalls.iter(), reset)
    }

    /// Verifies all filled pages, with `threads` threads. The ledger must be paused in every process that runs it.
    ///
    /// # Errors
    /// [`LedgerError::Interrupted`] if `cancel` was set.
    pub fn verify(&self, threads: usize, cancel: &AtomicBool) -> Result<Report, LedgerError> {
        verify::verify(&self.layout, threads, cancel)
    }

    /// Returns a hash of the header, the counters, the table and all filled pages of a paused ledger.
    ///
    /// # Errors
    /// [`LedgerError::Interrupted`] if `cancel` was set.
    pub fn digest(&self, threads: usize, cancel: &AtomicBool) -> Result<u64, LedgerError> {
        verify::digest(&self.layout, threads, cancel)
    }

    /// Returns a hash of the header and the counters, which include a sum over the table. The hash identifies the
    /// contents of a paused ledger, although only the header and the counters are read. [`Ledger::table_agrees`] checks
    /// that the table matches the counters.
    pub fn fingerprint(&self) -> u64 {
        verify::fingerprint(&self.layout)
    }

    /// Reads the whole table, and returns whether it matches the counters.
    pub fn table_agrees(&self) -> bool {
        verify::table_agrees(&self.layout)
    }

    /// Returns the offset in bytes of body page `number` in the mapping, or `None` if there is no such page.
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
