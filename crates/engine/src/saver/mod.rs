//! Lazy checkpoint (S4): saves memory as of a snapshot point while the workload keeps running.
//!
//! ```text
//! workload ── write to a protected page ──▶ trap thread ──┐ copies the block, unprotects it
//!                                                         ├──▶ staging slots ──▶ classifier ──▶ packers ──▶ writer
//! background sweep, over all other blocks ────────────────┘    (bounded)        zero, pattern,  compress    few, large
//!                                                                               duplicate, data             writes
//! ```
//!
//! Memory is write-protected through a userfaultfd in synchronous mode, while the workload runs. Blocks written before
//! the snapshot point are unprotected and recorded, so that the pause only has to protect those again. From the return
//! of [`Saver::begin`] on, every block of memory is unchanged until its state is *saved*:
//!
//! * a block is claimed for copying by one compare-and-swap, by a trap thread or by the sweep; the other one waits;
//! * only saved blocks are unprotected;
//! * a page that is a hole when its block is copied was a hole at the snapshot point, or has read as zeros since.
//!
//! With a write trace since the parent image, neither traps nor sweep are needed: see [`incremental`]. To leave a trace
//! from this snapshot point on: see [`trace_handover`].
//!
//! The saver holds the only reference to the userfaultfd. If it exits, the kernel removes every protection and wakes
//! every blocked thread. On an error (such as a full disk) or a cancellation, the saver removes all protections.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded, unbounded};
use thiserror::Error;

use crate::block::{Builder, Codec};
use crate::hole_notifications::Discards;
use crate::image::{Chain, Finished, ImageWriter, Sizes};
use crate::segment::Segment;
use crate::space::AdoptError;
use crate::trace::{Trace, Userfaults};

mod armed;
mod classify;
mod incremental;
mod output;
mod source;
mod staging;
mod state;
mod sweep;
mod trace_handover;
mod trap_blocks;
mod traps;

use armed::TraceHandover;
use classify::{Classified, Classifier};
use incremental::Rounds;
use output::Written;
pub use source::{PageOrigin, ProcessRange};
use staging::Staging;
use state::SaverState;
pub use state::Stats;
use trap_blocks::Copied;

/// Number of queued builders, in addition to those being filled.
const QUEUED: usize = 2;
/// Niceness of background threads.
const NICENESS: libc::c_int = 5;

/// Reason for which a checkpoint failed.
#[derive(Debug, Error)]
pub enum SaveError {
    /// The address space of a process of the workload could not be adopted.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// A process of the workload exited.
    #[error("a process of the workload exited during the checkpoint")]
    Gone,
    /// The image could not be written.
    #[error("cannot write the image: {0}")]
    Write(io::Error),
    /// Memory could not be read or protected.
    #[error("cannot read or protect memory of the workload: {0}")]
    Memory(io::Error),
    /// The workload discarded memory, some of which may not have been saved.
    #[error(
        "memory was discarded during the checkpoint (balloon?); retry when the discards have stopped, or with the \
         workload paused"
    )]
    Discarded,
    /// The trace since the parent cannot be used. A retry without the trace may succeed.
    #[error("{0}")]
    Untraceable(&'static str),
    /// The checkpoint was cancelled.
    #[error("cancelled")]
    Cancelled,
    /// A thread of the saver panicked.
    #[error("internal error: a thread of the saver panicked")]
    Thread,
}

/// Block sizes and limits of a checkpoint.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Codec of the page blocks.
    pub codec: Codec,
    /// Data bytes of a page block, the unit of compression.
    pub page_block: usize,
    /// Data bytes of a storage block, the unit of reading.
    pub storage_block: usize,
    /// Bytes that a trap copies and unprotects: a power of two, at least the page size of the memory.
    pub trap_block: usize,
    /// Size of the staging buffer, bytes.
    pub staging: usize,
    /// Bandwidth limit of the sweep, bytes per second; 0 means unlimited.
    pub bandwidth: u64,
    /// Number of compression threads.
    pub packers: usize,
}

/// Write traces shared with earlier and later checkpoints.
#[derive(Debug)]
pub enum Traces {
    /// No traces.
    Without,
    /// Leave traces on these userfaultfds from the snapshot point on.
    Leave(Userfaults),
    /// Use the traces on these userfaultfds since the parent, and leave them for the next checkpoint.
    TakeUp(Userfaults),
    /// Install traces on these userfaultfds now, and leave them from the snapshot point on. For workloads with direct
    /// I/O, which could pin a page while its synchronous protection is replaced by a trace.
    Begin(Userfaults),
    /// Install traces on the userfaultfds of an acquired pager, which keeps them: contents are deferred.
    Borrow(Userfaults),
}

/// File and parent of the image to write.
#[derive(Debug)]
pub struct NewImage {
    /// Empty file.
    pub file: OwnedFd,
    /// Random identifier.
    pub id: [u8; 16],
    /// Chain of parent images over the same regions.
    pub parent: Option<Chain>,
}

/// Protections and traces at the start of a checkpoint.
struct Installed {
    armed: Vec<armed::Armed>,
    handover: Option<TraceHandover>,
    trace: Option<Trace>,
}

/// Registers the segments for traps, or installs the trace that reports the pages to save.
fn install(traces: Traces, segments: Vec<Segment>, regions: usize) -> Result<Installed, SaveError> {
    let traced = |trace| Ok(Installed { armed: Vec::new(), handover: None, trace: Some(trace) });
    match traces {
        Traces::Without => Ok(Installed { armed: traps::register(segments)?, handover: None, trace: None }),
        Traces::Leave(userfaults) => {
            let handover = Some(TraceHandover::new(userfaults, regions));
            Ok(Installed { armed: traps::register(segments)?, handover, trace: None })
        }
        Traces::Begin(userfaults) => traced(Trace::begin_on(segments, &userfaults).map_err(trouble)?),
        Traces::Borrow(userfaults) => traced(Trace::install_on(segments, &userfaults).map_err(trouble)?),
        Traces::TakeUp(userfaults) => {
            let lost = |_| SaveError::Untraceable("the trace since the parent does not cover all memory");
            traced(Trace::take_up(segments, &userfaults).map_err(lost)?)
        }
    }
}

/// Method of finding the pages to save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// All pages, by traps and the sweep.
    Swept,
    /// Pages reported by a trace. All others are unchanged since the parent if `as_parent`, else holes.
    InRounds {
        /// Whether the trace is installed since the parent.
        as_parent: bool,
    },
}

/// Region to save.
#[derive(Debug, Clone)]
pub struct SavedRegion {
    /// Origin of the contents.
    pub source: PageOrigin,
    /// Page size, bytes: 4 KiB, or that of hugetlbfs.
    pub page_size: usize,
}

/// Checkpoint in progress. Dropping it cancels the checkpoint; the workload keeps running.
#[derive(Debug)]
pub struct Saver {
    shared: Arc<SaverState>,
    start: Option<Sender<()>>,
    pages: Pages,
    rounds: Option<Rounds>,
    leaves: bool,
    threads: Vec<JoinHandle<()>>,
    classifier: Option<JoinHandle<Classified>>,
    writer: Option<JoinHandle<Written>>,
    arm_time: Duration,
}

impl Saver {
    /// Write-protects `segments` while the workload runs, and prepares everything for [`begin`](Self::begin).
    ///
    /// Pages that `parent` (a chain over the same regions) holds are not stored again. Without segments nothing is
    /// protected, and the workload must stay paused until the end. With [`Traces::TakeUp`], [`Traces::Begin`] or
    /// [`Traces::Borrow`], [`scan`](Self::scan) must be called before `begin`.
    ///
    /// # Errors
    /// If a process cannot be adopted, or if a segment is registered with another userfaultfd (EBUSY).
    /// [`SaveError::Untraceable`], here or from [`begin`](Self::begin), if the trace since the parent cannot be used.
    pub fn arm(
        regions: Vec<SavedRegion>,
        segments: Vec<Segment>,
        image: NewImage,
        traces: Traces,
        options: &Options,
    ) -> Result<Self, SaveError> {
        let NewImage { file, id, parent } = image;
        let sizes = Sizes { page_block: options.page_block, storage_block: options.storage_block };
        let image = ImageWriter::new(file, id, sizes).map_err(SaveError::Write)?;
        let areas = trap_blocks::areas(regions, options.trap_block);
        let slot = areas.iter().map(|area| area.trap_block).max().unwrap_or(options.trap_block);
        let staging = Staging::new(slot, options.staging.div_ceil(slot));
        let leaves = matches!(traces, Traces::TakeUp(_) | Traces::Begin(_));
        let as_parent = matches!(traces, Traces::TakeUp(_));
        if as_parent && parent.is_none() {
            return Err(SaveError::Untraceable("cannot use the trace since the parent: no parent image given"));
        }
        let Installed { armed, handover, trace } = install(traces, segments, areas.len())?;
        let files = areas.iter().filter_map(|area| area.source.file());
        let discards = Discards::watch(files).map_err(SaveError::Memory)?;
        let live = trace.is_some() || !armed.is_empty();
        let shared = Arc::new(SaverState::new(areas, armed, staging, discards, handover, live));
        let pages = if trace.is_some() { Pages::InRounds { as_parent } } else { Pages::Swept };
        let mut saver = Self {
            shared,
            start: None,
            pages,
            rounds: None,
            leaves,
            threads: Vec::new(),
            classifier: None,
            writer: None,
            arm_time: Duration::ZERO,
        };
        let begin = Instant::now();
        if let Some(trace) = trace {
            let since = parent.clone().filter(|_| as_parent);
            let slots = saver.spawn(image, parent, options)?;
            saver.rounds = Some(Rounds::new(saver.shared.clone(), trace, since, slots));
        } else {
            saver.spawn(image, parent, options)?;
            saver.shared.protect_all().map_err(SaveError::Memory)?;
        }
        saver.arm_time = begin.elapsed();
        Ok(saver)
    }

    /// Returns how pages to save are found.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// Collects the pages written since the trace was installed or last collected, and protects them again. Returns the
    /// number of pages to copy.
    ///
    /// # Errors
    /// [`SaveError::Untraceable`] if the trace no longer covers all memory, and errors of the memory.
    pub fn collect(&mut self) -> Result<usize, SaveError> {
        self.rounds()?.collect()
    }

    /// Scans for present pages, and for pages that have lost their contents without a write. Returns the number of pages
    /// to copy.
    ///
    /// # Errors
    /// [`SaveError::Untraceable`] if huge pages were discarded, and errors of the memory.
    pub fn scan(&mut self) -> Result<usize, SaveError> {
        self.rounds()?.scan()
    }

    /// Copies the pages that have been collected. Waits for the staging buffer. Direct I/O must have been drained since
    /// the last collection.
    ///
    /// # Errors
    /// [`SaveError::Cancelled`], the first error of another thread, and errors of the memory.
    pub fn copy(&mut self) -> Result<(), SaveError> {
        self.rounds()?.copy()
    }

    /// Like `copy`, for the present pages among `count` pages of a region, whether or not they have been written.
    ///
    /// # Errors
    /// As for [`copy`](Self::copy).
    pub fn copy_range(&mut self, region: usize, first: usize, count: usize) -> Result<(), SaveError> {
        self.rounds()?.copy_range(region, first, count)
    }

    /// Returns whether memory has been discarded since the last call. If so, [`scan`](Self::scan) must be called again,
    /// and finds the saved pages to be copied once more.
    ///
    /// # Errors
    /// [`SaveError::Untraceable`] if huge pages were discarded.
    pub fn lost(&mut self) -> Result<bool, SaveError> {
        self.rounds()?.lost()
    }

    fn rounds(&mut self) -> Result<&mut Rounds, SaveError> {
        let none = || SaveError::Memory(io::Error::other("cannot save in rounds without a trace"));
        self.rounds.as_mut().ok_or_else(none)
    }

    /// Starts all threads. Returns the channel for blocks that are copied in rounds.
    fn spawn(
        &mut self,
        image: ImageWriter,
        parent: Option<Chain>,
        options: &Options,
    ) -> Result<Sender<Copied>, SaveError> {
        let pages = self.pages;
        let all = self.shared.clone();
        let shared = &all;
        let (slots, filled) = unbounded();
        let (free, builders) = unbounded();
        let (full, to_pack) = unbounded();
        let (packed, to_write) = bounded(QUEUED);
        let (spare, buffers) = unbounded();
        for _ in 0..2 + QUEUED + options.packers {
            let _ = free.send(Builder::new(options.codec, options.page_block, options.storage_block));
        }
        for _ in 0..QUEUED + 1 + options.packers {
            let _ = spare.send(Vec::new());
        }
        let (start, started) = bounded::<()>(1);
        let wakeups = self.spawn_traps(&slots)?;
        let (swept, bandwidth, rounds) = (shared.clone(), options.bandwidth, slots.clone());
        self.threads.push(background(&all, "pf-sweep", move || {
            if started.recv().is_ok() && pages == Pages::Swept {
                sweep::run(&swept, &slots, bandwidth);
            }
            swept.release_all();
            drop((slots, wakeups)); // ends the trap threads, and with them the threads that process their blocks
        })?);
        let as_parent = pages == Pages::InRounds { as_parent: true };
        let classifier = Classifier::new(shared.clone(), parent, as_parent, builders, full)?;
        self.classifier = Some(background(&all, "pf-classify", move || classifier.run(&filled))?);
        for number in 0..options.packers.max(1) {
            let (to_pack, free, packed, buffers) = (to_pack.clone(), free.clone(), packed.clone(), buffers.clone());
            let pack = move || output::pack(&to_pack, &free, &buffers, &packed);
            self.threads.push(background(&all, &format!("pf-pack-{number}"), pack)?);
        }
        let shared = shared.clone();
        self.writer = Some(background(&all, "pf-write", move || output::write(&shared, image, &to_write, &spare))?);
        self.start = Some(start);
        Ok(rounds)
    }

    /// Starts one trap thread per process. Returns the sockets whose closing ends them.
    fn spawn_traps(&mut self, slots: &Sender<Copied>) -> Result<Vec<UnixStream>, SaveError> {
        let mut wakeups = Vec::new();
        for (number, uffd) in traps::processes(&self.shared.armed).into_iter().enumerate() {
            let (wakeup, woken) = UnixStream::pair().map_err(SaveError::Memory)?;
            wakeups.push(wakeup);
            let (shared, slots) = (self.shared.clone(), slots.clone());
            self.threads.push(thread(&self.shared, &format!("pf-trap-{number}"), move || {
                traps::serve(&shared, &uffd, &woken, &slots)
            })?);
        }
        Ok(wakeups)
    }

    /// Sets the snapshot point. The workload must be paused, and may resume when this returns. Returns the duration of
    /// the call.
    ///
    /// # Errors
    /// As for [`arm`](Self::arm) and [`copy`](Self::copy).
    pub fn begin(&mut self) -> Result<Duration, SaveError> {
        let begin = Instant::now();
        match self.rounds.take() {
            Some(rounds) => rounds.end()?,
            None => self.shared.protect_released().map_err(SaveError::Memory)?,
        }
        Ok(begin.elapsed())
    }

    /// Starts the sweep, after [`begin`](Self::begin). Traps are served without it, so that the caller can leave the
    /// CPUs to the workload until it has resumed.
    pub fn sweep(&mut self) {
        if let Some(start) = self.start.take() {
            let _ = start.send(());
        }
    }

    /// Returns whether, after `finish`, traces cover all memory since the snapshot point.
    pub fn leaves_traces(&self) -> bool {
        self.leaves || self.shared.follow.as_ref().is_some_and(TraceHandover::whole)
    }

    /// Returns how long it took to protect all memory.
    pub fn arm_time(&self) -> Duration {
        self.arm_time
    }

    /// Returns a handle for use by other threads.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// Waits for all threads, adds `sections`, and writes the index. The image is then complete and synced.
    ///
    /// # Errors
    /// The first error of the checkpoint. The image file is then unusable.
    pub fn finish(&mut self, sections: &[(u32, Vec<u8>)]) -> Result<Finished, SaveError> {
        if self.start.is_some() && !self.shared.failed() {
            // Without the sweep, blocks that were not written would silently be missing.
            return Err(SaveError::Memory(io::Error::other("cannot finish a checkpoint before its sweep")));
        }
        let (classified, written) = self.join()?;
        if let Some(error) = self.shared.error() {
            return Err(error);
        }
        let (mut image, page_map) = (written.image, classified.page_map(&written.numbers));
        self.shared.stats.recount(&page_map);
        for (kind, contents) in sections {
            image.section(*kind, contents).map_err(SaveError::Write)?;
        }
        image.finish(self.shared.areas.len(), &page_map).map_err(SaveError::Write)
    }

    /// Cancels the checkpoint if it is in progress, and waits for its threads.
    ///
    /// # Errors
    /// [`SaveError::Thread`] if a thread panicked.
    pub fn close(&mut self) -> Result<(), SaveError> {
        self.shared.fail(SaveError::Cancelled);
        match self.join() {
            Err(SaveError::Thread) => Err(SaveError::Thread),
            _ => Ok(()), // joined
        }
    }

    fn join(&mut self) -> Result<(Classified, Written), SaveError> {
        drop((self.start.take(), self.rounds.take()));
        for thread in self.threads.drain(..) {
            thread.join().map_err(|_| SaveError::Thread)?;
        }
        let classified = self.classifier.take().ok_or(SaveError::Cancelled)?.join().map_err(|_| SaveError::Thread)?;
        let written = self.writer.take().ok_or(SaveError::Cancelled)?.join().map_err(|_| SaveError::Thread)?;
        Ok((classified, written))
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        let _ = self.close();
    }
}

/// Handle to a checkpoint, to observe or cancel it.
#[derive(Debug, Clone)]
pub struct Handle(Arc<SaverState>);

impl Handle {
    /// Returns the counters.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// Waits up to `time` until everything is written or has failed. Returns whether that is the case.
    pub fn wait(&self, time: Duration) -> bool {
        self.0.wait(time)
    }

    /// Cancels the checkpoint. All memory is unprotected at once.
    pub fn cancel(&self) {
        self.0.fail(SaveError::Cancelled);
    }
}

/// Guard that fails the checkpoint if its thread panics, so that the workload does not block forever.
struct Watchdog(Arc<SaverState>);

impl Drop for Watchdog {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(SaveError::Thread);
        }
    }
}

fn thread<T: Send + 'static>(
    shared: &Arc<SaverState>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, SaveError> {
    let watchdog = Watchdog(shared.clone());
    let watched = move || {
        let _watchdog = watchdog;
        work()
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(watched).map_err(SaveError::Memory)
}

fn trouble(error: io::Error) -> SaveError {
    if armed::is_gone(&error) { SaveError::Gone } else { SaveError::Memory(error) }
}

/// Starts a thread with a lower priority than the workload and the trap threads.
fn background<T: Send + 'static>(
    shared: &Arc<SaverState>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, SaveError> {
    let workload_runs = shared.live;
    thread(shared, name, move || {
        if workload_runs {
            // SAFETY: setpriority takes no pointers. Process 0 means the calling thread. A failure only affects
            // priorities.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
        }
        work()
    })
}
