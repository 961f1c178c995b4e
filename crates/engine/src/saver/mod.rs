//! Saving memory as of one instant while the workload runs on (S4).
//!
//! ```text
//! workload ── write to a protected page ──▶ trap thread ──┐ copies the block, releases it
//!                                                         ├──▶ staging slots ──▶ classifier ──▶ packers ──▶ writer
//! background sweep, over what nobody writes to ───────────┘    (bounded)        zero, pattern,  compress    few, large
//!                                                                               duplicate, data             writes
//! ```
//!
//! Protections are synchronous userfaultfd write protections. They are put on while the workload runs: traps that fire
//! meanwhile are released and noted, so that in the pause only what was released has to be protected again. From the
//! return of [`Saver::begin`] on, every block of memory is unchanged until it is in state *saved*:
//!
//! * a block is claimed for copying by one compare-and-swap, by a trap or by the sweep; whoever else meets it waits;
//! * a protection is only ever taken off a block that is saved;
//! * pages that are holes when their block is copied were holes at the instant, or read as zeros since.
//!
//! With a trace that was on since the parent was saved, nothing of this is needed: see [`rounds`]. And where a trace
//! shall be on from this instant, see [`follow`].
//!
//! We hold the only reference to the userfaultfd: if we die, every protection goes and every waiting thread runs on. An
//! error (a full disk) or a cancellation takes all protections off at once.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Sender, bounded, unbounded};
use thiserror::Error;

use crate::block::{Builder, Codec};
use crate::discards::Discards;
use crate::image::{Chain, Finished, ImageWriter, Sizes};
use crate::segment::Segment;
use crate::space::AdoptError;
use crate::trace::{Trace, Userfaults};

mod area;
mod classify;
mod follow;
mod output;
mod rounds;
mod shared;
mod source;
mod staging;
mod sweep;
mod traps;

use area::Copied;
use classify::{Classified, Classifier};
use follow::Follow;
use output::Written;
pub use rounds::Help;
use rounds::Rounds;
use shared::Shared;
pub use shared::Stats;
pub use source::{ProcessRange, Source};
use staging::Staging;

/// Builders that wait to be packed, apart from those that are being filled.
const QUEUED: usize = 2;
/// How much others go before the threads that nobody waits for.
const NICENESS: libc::c_int = 5;

/// Why a save ended.
#[derive(Debug, Error)]
pub enum SaveError {
    /// The workload's address space cannot be worked on.
    #[error(transparent)]
    Adopt(#[from] AdoptError),
    /// A process of the workload has ended.
    #[error("a process of the workload ended while it was saved")]
    Gone,
    /// The image cannot be written.
    #[error("the image cannot be written: {0}")]
    Write(io::Error),
    /// Contents that are still to come cannot be had: what was said of that.
    #[error("{0}")]
    Bring(io::Error),
    /// Memory cannot be read, or protected.
    #[error("memory of the workload cannot be worked on: {0}")]
    Memory(io::Error),
    /// The workload discarded memory, of which something may not have been saved yet.
    #[error(
        "memory was given back (by a balloon?) while it was saved: save again when that is over, or with the workload \
         paused"
    )]
    GivenBack,
    /// The trace since the parent cannot be used: save again, without it.
    #[error("{0}")]
    Untraceable(&'static str),
    /// Somebody asked for it.
    #[error("cancelled")]
    Cancelled,
    /// A thread of ours panicked.
    #[error("a thread of the saver ended unexpectedly")]
    Thread,
}

/// Sizes and speeds of a save.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// How page blocks are compressed.
    pub codec: Codec,
    /// Data bytes of a page block: what is compressed as one.
    pub page_block: usize,
    /// Data bytes of a storage block: what is read as one.
    pub storage_block: usize,
    /// Bytes that a trap copies and releases, a power of two; at least the page size of the memory.
    pub trap_block: usize,
    /// Bytes of the staging buffer.
    pub staging: usize,
    /// Bytes per second of the background sweep; 0: as fast as it can.
    pub bandwidth: u64,
    /// Threads that compress.
    pub packers: usize,
    /// Bytes that may be copied in the pause, where a trace says what to save.
    pub at_instant: usize,
}

/// Write traces between this save and others.
#[derive(Debug)]
pub enum Traces {
    /// None.
    Without,
    /// By these userfaultfds, on from this instant on.
    Leave(Userfaults),
    /// By these, on since the parent was saved, and from this instant on for the next.
    TakeUp(Userfaults),
    /// By these, which are put on now, and stay on from this instant on: for workloads that do direct I/O, which could
    /// pin a page while a synchronous trap is exchanged for a trace.
    Begin(Userfaults),
    /// By these, which are those of a pager that is held: contents are still to come, and it stays so.
    Borrow(Userfaults),
}

/// How pages are found that no trap brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pages {
    /// By the sweep.
    Swept,
    /// By a trace; those that it does not tell of are as in the parent, or else not in memory.
    InRounds { as_parent: bool },
}

/// A region to save.
#[derive(Debug, Clone)]
pub struct Region {
    /// Its contents.
    pub source: Source,
    /// Its page size: 4 KiB, or that of hugetlbfs.
    pub page_size: usize,
}

/// A save under way. Dropping it cancels it and leaves the workload alone.
#[derive(Debug)]
pub struct Saver {
    shared: Arc<Shared>,
    start: Option<Sender<()>>,
    rounds: Option<Rounds>,
    leaves: bool,
    threads: Vec<JoinHandle<()>>,
    classifier: Option<JoinHandle<Classified>>,
    writer: Option<JoinHandle<Written>>,
    arm_time: Duration,
}

impl Saver {
    /// Protects `segments` while the workload runs, and makes everything ready for [`begin`](Self::begin).
    ///
    /// With `parent` (a chain over the same regions), pages that it holds are not stored again.
    ///
    /// Without segments nothing is protected: then the workload must stay paused until the end.
    ///
    /// With traces that are taken up, begun or borrowed, [`prepare`](Self::prepare) comes first.
    ///
    /// # Errors
    /// When a process cannot be adopted, or one of its segments is registered with somebody else's userfaultfd (EBUSY).
    /// [`SaveError::Untraceable`], here or from [`begin`](Self::begin), where a trace that is taken up cannot be used.
    pub fn arm(
        regions: Vec<Region>,
        segments: Vec<Segment>,
        file: OwnedFd,
        id: [u8; 16],
        parent: Option<Chain>,
        traces: Traces,
        options: &Options,
    ) -> Result<Self, SaveError> {
        let sizes = Sizes { page_block: options.page_block, storage_block: options.storage_block };
        let image = ImageWriter::new(file, id, sizes).map_err(SaveError::Write)?;
        let areas = area::areas(regions, options.trap_block);
        let slot = areas.iter().map(|area| area.trap_block).max().unwrap_or(options.trap_block);
        let staging = Staging::new(slot, options.staging.div_ceil(slot));
        let leaves = matches!(traces, Traces::TakeUp(_) | Traces::Begin(_));
        let as_parent = matches!(traces, Traces::TakeUp(_));
        if as_parent && parent.is_none() {
            return Err(SaveError::Untraceable("there is no parent"));
        }
        let (armed, follow, trace) = match traces {
            Traces::Without => (traps::register(segments)?, None, None),
            Traces::Leave(userfaults) => (traps::register(segments)?, Some(Follow::new(userfaults, areas.len())), None),
            Traces::Begin(userfaults) => {
                (Vec::new(), None, Some(Trace::begin_on(segments, &userfaults).map_err(trouble)?))
            }
            Traces::Borrow(userfaults) => {
                (Vec::new(), None, Some(Trace::put_on(segments, &userfaults).map_err(trouble)?))
            }
            Traces::TakeUp(userfaults) => {
                let found = Trace::take_up(segments, &userfaults);
                let lost = |_| SaveError::Untraceable("the trace since the parent is not on all of its memory");
                (Vec::new(), None, Some(found.map_err(lost)?))
            }
        };
        let files = areas.iter().filter_map(|area| area.source.file());
        let discards = Discards::watch(files).map_err(SaveError::Memory)?;
        let live = trace.is_some() || !armed.is_empty();
        let shared = Arc::new(Shared::new(areas, armed, staging, discards, follow, live));
        let mut saver = Self {
            shared,
            start: None,
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
            let slots = saver.spawn(image, parent, Pages::InRounds { as_parent }, options)?;
            saver.rounds = Some(Rounds::new(saver.shared.clone(), trace, since, slots, options.at_instant));
        } else {
            saver.spawn(image, parent, Pages::Swept, options)?;
            saver.shared.protect_all().map_err(SaveError::Memory)?;
        }
        saver.arm_time = begin.elapsed();
        Ok(saver)
    }

    /// Where a trace says what to save: saves in rounds, while the workload runs, until little enough is left. Else
    /// there is nothing to be done.
    pub fn prepare(&mut self, help: &Help<'_>) -> Result<(), SaveError> {
        let begin = Instant::now();
        if let Some(rounds) = &mut self.rounds {
            rounds.run(help)?;
        }
        self.arm_time += begin.elapsed();
        Ok(())
    }

    /// Pages in rounds come by the channel that is returned.
    fn spawn(
        &mut self,
        image: ImageWriter,
        parent: Option<Chain>,
        pages: Pages,
        options: &Options,
    ) -> Result<Sender<Copied>, SaveError> {
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
        let mut bells = Vec::new();
        for (number, uffd) in traps::processes(&shared.armed).into_iter().enumerate() {
            let (bell, heard) = std::os::unix::net::UnixStream::pair().map_err(SaveError::Memory)?;
            bells.push(bell);
            let (shared, slots) = (shared.clone(), slots.clone());
            self.threads.push(thread(&all, &format!("pf-trap-{number}"), move || {
                traps::serve(&shared, &uffd, &heard, &slots)
            })?);
        }
        let (swept, bandwidth, rounds) = (shared.clone(), options.bandwidth, slots.clone());
        self.threads.push(background(&all, "pf-sweep", move || {
            if started.recv().is_ok() && pages == Pages::Swept {
                sweep::run(&swept, &slots, bandwidth);
            }
            swept.release_all();
            drop((slots, bells)); // the trap threads end, then whoever works on what they have sent
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

    /// The instant: what memory holds now is what is saved. The workload is paused, and may run on when this returns.
    pub fn begin(&mut self) -> Result<Duration, SaveError> {
        let begin = Instant::now();
        match self.rounds.take() {
            Some(rounds) => rounds.end()?,
            None => self.shared.protect_released().map_err(SaveError::Memory)?,
        }
        Ok(begin.elapsed())
    }

    /// Starts the sweep, after [`begin`](Self::begin). Traps are served without it: the CPUs are better left to the
    /// workload until it runs again.
    pub fn sweep(&mut self) {
        if let Some(start) = self.start.take() {
            let _ = start.send(());
        }
    }

    /// Whether traces are on all memory from the instant on, once it is finished.
    pub fn leaves_traces(&self) -> bool {
        self.leaves || self.shared.follow.as_ref().is_some_and(Follow::whole)
    }

    /// How long it took to protect everything while the workload ran; with a trace since the parent, to save in rounds.
    pub fn arm_time(&self) -> Duration {
        self.arm_time
    }

    /// What can be done about a save from other threads.
    pub fn handle(&self) -> Handle {
        Handle(self.shared.clone())
    }

    /// Waits for the end, adds `sections`, and writes the index: the image is complete and synced.
    ///
    /// # Errors
    /// What went wrong first. The file is worth nothing then.
    pub fn finish(&mut self, sections: &[(u32, Vec<u8>)]) -> Result<Finished, SaveError> {
        if self.start.is_some() && !self.shared.failed() {
            // What nobody has written to would be missing, and would not be missed.
            return Err(SaveError::Memory(io::Error::other("the end comes after `sweep`")));
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

    /// Cancels what is still under way, and waits for its threads.
    pub fn close(&mut self) -> Result<(), SaveError> {
        self.shared.fail(SaveError::Cancelled);
        match self.join() {
            Err(SaveError::Thread) => Err(SaveError::Thread),
            _ => Ok(()), // joined now, or before
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

/// A save, for those who watch it.
#[derive(Debug, Clone)]
pub struct Handle(Arc<Shared>);

impl Handle {
    /// Counters, so far.
    pub fn stats(&self) -> &Stats {
        &self.0.stats
    }

    /// Waits until everything is written (or has failed), at most for `time`; returns whether it is.
    pub fn wait(&self, time: Duration) -> bool {
        self.0.wait(time)
    }

    /// Ends the save soon; the workload is released at once.
    pub fn cancel(&self) {
        self.0.fail(SaveError::Cancelled);
    }
}

/// Should a thread of ours panic, the workload must not go on waiting for it.
struct Watchdog(Arc<Shared>);

impl Drop for Watchdog {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(SaveError::Thread);
        }
    }
}

fn thread<T: Send + 'static>(
    shared: &Arc<Shared>,
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
    if traps::is_gone(&error) { SaveError::Gone } else { SaveError::Memory(error) }
}

/// A thread that nobody waits for: the workload and the threads that serve its traps come first.
fn background<T: Send + 'static>(
    shared: &Arc<Shared>,
    name: &str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, SaveError> {
    let workload_runs = shared.live;
    thread(shared, name, move || {
        if workload_runs {
            // SAFETY: takes no pointers. For process 0 it is about the calling thread alone; failing does no harm.
            unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, NICENESS) };
        }
        work()
    })
}
