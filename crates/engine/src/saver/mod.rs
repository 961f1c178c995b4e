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
//! the snapshot point are unprotected and recorded, so the pause only has to protect these blocks again. After
//! [`Saver::begin`] has returned, every block of memory is unchanged until its state is *saved*:
//!
//! * a trap thread or the sweep claims a block for copying with a compare-and-swap; a thread whose compare-and-swap
//!   fails waits until the block is saved;
//! * only saved blocks are unprotected;
//! * a page that is a hole when its block is copied was a hole at the snapshot point, or has read as zeros ever since.
//!
//! Memory of a clone consists of private pages over a base, whose image is the parent. Only private pages are saved: all
//! other pages equal the parent. A trace reports private pages that are written, and pages that become private.
//!
//! With a write trace, neither traps nor the sweep is needed (see [`incremental`]). A checkpoint by traps can leave a
//! write trace of all writes since its snapshot point (see [`trace_handover`]).
//!
//! The process of the saver holds the only reference to the userfaultfd. If the process exits, the kernel removes every
//! protection and wakes every blocked thread. On a cancellation or an error, such as a full disk, the saver removes all
//! protections.

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
pub(crate) use source::private;
pub use source::{Overlay, PageOrigin, ProcessRange};
use staging::Staging;
use state::SaverState;
pub use state::Stats;
use trap_blocks::Copied;

/// Maximum number of storage blocks that wait for compression, and of those that wait for the writer.
const QUEUED: usize = 2;
/// Niceness of background threads.
const NICENESS: libc::c_int = 5;

/// Reason why a checkpoint failed.
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
    /// The workload discarded memory during the checkpoint. Some of this memory may not have been saved.
    #[error(
        "memory was discarded during the checkpoint (balloon?); retry when the discards have stopped, or with the \
         workload paused"
    )]
    Discarded,
    /// The write trace cannot be used. A retry without the trace may succeed.
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
    /// Number of data bytes of a page block, the unit of compression.
    pub page_block: usize,
    /// Maximum number of data bytes of a storage block, the unit of reading.
    pub storage_block: usize,
    /// Number of bytes that a trap copies and unprotects; a power of two. In a region with larger pages, the page size
    /// applies.
    pub trap_block: usize,
    /// Size of the staging buffer in bytes.
    pub staging: usize,
    /// Bandwidth limit in bytes per second of the sweep and of the rounds; 0 means unlimited. The limit does not apply
    /// to copies at the snapshot point, nor to copies for writes of the workload.
    pub bandwidth: u64,
    /// Number of compression threads; 0 means 1.
    pub packers: usize,
}

/// Write traces shared with earlier and later checkpoints.
#[derive(Debug)]
pub enum Traces {
    /// No traces.
    Without,
    /// Traces that the checkpoint installs through these userfaultfds. The traces stay installed, and report all writes
    /// since the snapshot point.
    Leave(Userfaults),
    /// Existing traces, installed through these userfaultfds since the parent. They report the pages to save, and stay
    /// installed for the next checkpoint.
    TakeUp(Userfaults),
    /// Traces that [`Saver::arm`] installs through these userfaultfds. They report the pages to save, and stay
    /// installed after the snapshot point. This use is for workloads with direct I/O, which could pin a page while a
    /// trace replaces the synchronous protection of the page.
    Begin(Userfaults),
    /// Traces that [`Saver::arm`] installs through the userfaultfds of an acquired pager. This use is for memory with
    /// deferred contents.
    Borrow(Userfaults),
    /// Traces of the private pages of clones, which [`Saver::arm`] installs through the userfaultfds that the processes
    /// of the clones keep. The protections remain until the next write to each page.
    Private(Userfaults),
}

/// File and parent of the image to write.
#[derive(Debug)]
pub struct NewImage {
    /// Empty file for the image.
    pub file: OwnedFd,
    /// Random identifier of the image.
    pub id: [u8; 16],
    /// Chain of parent images over the same regions; `None` if the image has no parent.
    pub parent: Option<Chain>,
}

/// Protections and traces at the start of a checkpoint.
struct Installed {
    armed: Vec<armed::Armed>,
    handover: Option<TraceHandover>,
    trace: Option<Trace>,
}

/// Registers the segments for traps. For a checkpoint in rounds, installs or takes up the trace that reports the pages
/// to save.
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
        Traces::Private(userfaults) => {
            let cannot = |error: io::Error| match error.raw_os_error() {
                Some(libc::EPERM | libc::EINVAL) => SaveError::Untraceable("the kernel cannot trace private pages"),
                _ => trouble(error),
            };
            traced(Trace::install_private(segments, &userfaults).map_err(cannot)?)
        }
        Traces::TakeUp(userfaults) => {
            let lost = |_| SaveError::Untraceable("the trace since the parent does not cover all memory");
            traced(Trace::take_up(segments, &userfaults).map_err(lost)?)
        }
    }
}

/// Fails if an image without a parent cannot be written.
fn check_without_parent(areas: &[trap_blocks::Area], as_parent: bool) -> Result<(), SaveError> {
    if areas.iter().any(|area| area.source.is_private()) {
        return Err(SaveError::Memory(io::Error::other("private memory requires a parent")));
    }
    if as_parent {
        return Err(SaveError::Untraceable("cannot use the trace since the parent: no parent image given"));
    }
    Ok(())
}

/// Method of finding the pages to save.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pages {
    /// Traps and the sweep save all pages.
    Swept,
    /// Rounds save the pages that a trace reports. All other pages are unchanged since the parent if `as_parent` is
    /// true or the memory is private, otherwise holes.
    InRounds {
        /// Whether the trace has been installed since the snapshot point of the parent.
        as_parent: bool,
    },
}

/// Region to save.
#[derive(Debug, Clone)]
pub struct SavedRegion {
    /// Origin of the contents.
    pub source: PageOrigin,
    /// Page size in bytes: 4 KiB, or the page size of hugetlbfs.
    pub page_size: usize,
}

/// Checkpoint in progress. Dropping the saver cancels the checkpoint; the workload keeps running.
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
    /// Write-protects or traces `segments` while the workload runs, and starts the threads of the checkpoint.
    ///
    /// Pages whose contents the parent of `image` holds are not stored again. Without segments, nothing is protected,
    /// and the workload must stay paused until the checkpoint is complete. With all traces except [`Traces::Leave`],
    /// [`scan`](Self::scan) must be called before `begin`. Private memory requires a parent with the contents of its
    /// base.
    ///
    /// # Errors
    /// If a process cannot be adopted, if a segment is registered with another userfaultfd (EBUSY), if memory cannot be
    /// protected, or if the image cannot be written. With [`Traces::TakeUp`], [`SaveError::Untraceable`] if there is no
    /// parent, or if the traces do not cover all memory. With [`Traces::Private`], [`SaveError::Untraceable`] if the
    /// kernel cannot trace private pages.
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
        if parent.is_none() {
            check_without_parent(&areas, as_parent)?;
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
            saver.rounds = Some(Rounds::new(saver.shared.clone(), trace, since, slots, options.bandwidth));
        } else {
            saver.spawn(image, parent, options)?;
            saver.shared.protect_all().map_err(SaveError::Memory)?;
        }
        saver.arm_time = begin.elapsed();
        Ok(saver)
    }

    /// Returns the method of finding the pages to save.
    pub fn pages(&self) -> Pages {
        self.pages
    }

    /// Collects the pages written since the last collection, or since the trace was installed, and protects them again.
    /// Returns the number of pages to copy.
    ///
    /// # Errors
    /// [`SaveError::Untraceable`] if memory was remapped, [`SaveError::Gone`] if a process has exited; otherwise
    /// [`SaveError::Memory`].
    pub fn collect(&mut self) -> Result<usize, SaveError> {
        self.rounds()?.collect()
    }

    /// Scans for present pages, and for pages that have lost their contents without a write. Returns the number of
    /// pages to copy.
    ///
    /// # Errors
    /// [`SaveError::Untraceable`] if huge pages were discarded; otherwise [`SaveError::Memory`].
    pub fn scan(&mut self) -> Result<usize, SaveError> {
        self.rounds()?.scan()
    }

    /// Copies the collected pages. Waits for slots of the staging buffer. Direct I/O must have been drained since the
    /// last collection.
    ///
    /// # Errors
    /// The first error of another thread; otherwise [`SaveError::Cancelled`] or [`SaveError::Memory`].
    pub fn copy(&mut self) -> Result<(), SaveError> {
        self.rounds()?.copy()
    }

    /// Like [`copy`](Self::copy), but also copies the present pages among `count` pages of a region from page `first`
    /// on, whether or not they have been written. Ignores pages beyond the region.
    ///
    /// # Errors
    /// The same errors as [`copy`](Self::copy).
    pub fn copy_range(&mut self, region: usize, first: usize, count: usize) -> Result<(), SaveError> {
        self.rounds()?.copy_range(region, first, count)
    }

    /// Returns whether memory has been discarded since the last call. If so, marks all saved pages as dirty, so that
    /// they are copied again, and [`scan`](Self::scan) must be called before [`begin`](Self::begin).
    ///
    /// # Errors
    /// [`SaveError::Untraceable`] if huge pages may have been discarded; otherwise [`SaveError::Memory`].
    pub fn lost(&mut self) -> Result<bool, SaveError> {
        self.rounds()?.lost()
    }

    fn rounds(&mut self) -> Result<&mut Rounds, SaveError> {
        let none = || SaveError::Memory(io::Error::other("cannot save in rounds without a trace"));
        self.rounds.as_mut().ok_or_else(none)
    }

    /// Starts all threads of the checkpoint. Returns the channel for blocks that are copied in rounds.
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
            drop((slots, wakeups)); // ends the trap threads, then the threads that process the copied blocks
        })?);
        let private = all.areas.iter().any(|area| area.source.is_private());
        let as_parent = private || pages == Pages::InRounds { as_parent: true };
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

    /// Starts one trap thread per process. Returns a wake-up socket for each thread: closing the socket ends the
    /// thread.
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

    /// Sets the snapshot point. The workload must be paused, and may resume when the call returns. Returns the duration
    /// of the call.
    ///
    /// # Errors
    /// [`SaveError::Memory`] if memory cannot be protected, or if [`scan`](Self::scan) is required. With a trace, also
    /// the errors of [`collect`](Self::collect) and [`copy`](Self::copy), and [`SaveError::Untraceable`] if memory was
    /// discarded.
    pub fn begin(&mut self) -> Result<Duration, SaveError> {
        let begin = Instant::now();
        match self.rounds.take() {
            Some(rounds) => rounds.end()?,
            None => self.shared.protect_released().map_err(SaveError::Memory)?,
        }
        Ok(begin.elapsed())
    }

    /// Starts the sweep. Must be called after [`begin`](Self::begin). Traps are served even before the sweep starts, so
    /// the caller can leave the CPUs to the workload until the workload has resumed.
    pub fn sweep(&mut self) {
        if let Some(start) = self.start.take() {
            let _ = start.send(());
        }
    }

    /// Returns whether traces cover all memory since the snapshot point. The result is valid after
    /// [`finish`](Self::finish).
    pub fn leaves_traces(&self) -> bool {
        self.leaves || self.shared.follow.as_ref().is_some_and(TraceHandover::whole)
    }

    /// Returns the time that [`arm`](Self::arm) took to start the threads and, without a trace, to protect memory.
    pub fn arm_time(&self) -> Duration {
        self.arm_time
    }

    /// Returns a handle with which other threads can observe or cancel the checkpoint.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// Waits for all threads, adds `sections`, and writes the index. The image is then complete and synced.
    ///
    /// # Errors
    /// The first error of the checkpoint; [`SaveError::Memory`] if [`sweep`](Self::sweep) has not been called. The
    /// image file is then unusable.
    pub fn finish(&mut self, sections: &[(u32, Vec<u8>)]) -> Result<Finished, SaveError> {
        if self.start.is_some() && !self.shared.failed() {
            // Without the sweep, blocks that the workload has not written would be missing, without an error.
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
    /// Returns the counters of the checkpoint.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// Waits for up to `time` until all storage blocks are written or the checkpoint has failed. Returns false if
    /// `time` has expired.
    pub fn wait(&self, time: Duration) -> bool {
        self.0.wait(time)
    }

    /// Cancels the checkpoint, and unprotects all memory immediately.
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

/// Starts a thread. If the workload runs during the checkpoint, the thread has a lower priority than the workload and
/// the trap threads.
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
