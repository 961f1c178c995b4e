//! Threads of a ledger, which can be started, paused between two operations, resumed and stopped.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicI32, AtomicU8, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::LedgerError;
use super::layout::Layout;
use super::stalls::Stopwatch;
use super::writer::Writer;
use pageferry_engine::SMALL_PAGE;

/// State of a ledger's threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There are no threads.
    Stopped,
    /// All threads write.
    Running,
    /// A pause was requested; some threads are still in an operation.
    Pausing,
    /// All threads are paused between two operations.
    Paused,
}

impl fmt::Display for State {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Stopped => "stopped",
            Self::Running => "running",
            Self::Pausing => "pausing",
            Self::Paused => "paused",
        })
    }
}

const RUN: u8 = 0;
const PARK: u8 = 1;
const END: u8 = 2;

/// Orders to the threads, and their acknowledgements.
#[derive(Default)]
struct Control {
    /// Current order: RUN, PARK or END. It is written with `count` locked. Between operations, threads read it without
    /// the lock.
    order: AtomicU8,
    count: Mutex<Count>,
    /// Signalled when the order changes.
    ordered: Condvar,
    /// Signalled when a count changes.
    counted: Condvar,
}

#[derive(Default)]
struct Count {
    started: usize,
    parked: usize,
    /// Number of threads that exited without an order.
    died: usize,
}

impl Control {
    fn count(&self) -> MutexGuard<'_, Count> {
        self.count.lock()
    }

    fn order(&self) -> u8 {
        self.order.load(Ordering::Acquire)
    }

    fn give(&self, order: u8) {
        let _count = self.count();
        self.order.store(order, Ordering::Release);
        self.ordered.notify_all();
    }

    /// Waits while the order is PARK. Returns true if the next order is RUN, false if it is END.
    fn park(&self) -> bool {
        let mut count = self.count();
        count.parked += 1;
        self.counted.notify_all();
        while self.order() == PARK {
            self.ordered.wait(&mut count);
        }
        count.parked -= 1;
        self.order() == RUN
    }

    /// Sleeps for `time`, or until the order changes.
    fn sleep(&self, time: Duration) {
        let mut count = self.count();
        if self.order() == RUN {
            self.ordered.wait_for(&mut count, time);
        }
    }

    /// Waits until `done` returns true, for at most `timeout`. Returns the last result of `done`.
    fn wait(&self, timeout: Duration, done: impl Fn(&Count) -> bool) -> bool {
        let mut count = self.count();
        self.counted.wait_while_for(&mut count, |count| !done(count), timeout);
        done(&count)
    }
}

/// Threads that run a share of a ledger's partitions. They are stopped and joined on drop.
pub(super) struct Workers {
    control: Arc<Control>,
    threads: Vec<(JoinHandle<()>, Arc<AtomicI32>)>,
}

impl fmt::Debug for Workers {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Workers").field("state", &self.state()).field("tids", &self.tids()).finish()
    }
}

impl Workers {
    pub(super) fn start(
        layout: &Arc<Layout>,
        share: Range<usize>,
        stalls: &Arc<Vec<Stopwatch>>,
        paused: bool,
    ) -> Result<Self, LedgerError> {
        let control = Arc::new(Control::default());
        control.give(if paused { PARK } else { RUN });
        let mut workers = Self { control, threads: Vec::new() };
        for (slot, partition) in share.enumerate() {
            let (layout, stalls) = (Arc::clone(layout), Arc::clone(stalls));
            let (control, tid) = (Arc::clone(&workers.control), Arc::new(AtomicI32::new(0)));
            let reported = Arc::clone(&tid);
            let thread = std::thread::Builder::new()
                .name(format!("ledger-{partition}"))
                .spawn(move || run(&layout, partition, &stalls[slot], &control, &reported))?;
            workers.threads.push((thread, tid));
        }
        let all = workers.threads.len();
        while !workers.control.wait(Duration::from_secs(1), |count| count.started == all) {}
        Ok(workers)
    }

    pub(super) fn state(&self) -> State {
        let parked = self.control.count().parked;
        match self.control.order() {
            RUN => State::Running,
            _ if parked < self.threads.len() => State::Pausing,
            _ => State::Paused,
        }
    }

    pub(super) fn pause(&self, timeout: Duration) -> Result<bool, LedgerError> {
        self.control.give(PARK);
        let all = self.threads.len();
        let done = self.control.wait(timeout, |count| count.parked == all || count.died > 0);
        if self.control.count().died > 0 {
            return Err(LedgerError::ThreadDied);
        }
        Ok(done)
    }

    pub(super) fn resume(&self) {
        self.control.give(RUN);
    }

    pub(super) fn tids(&self) -> Vec<i32> {
        self.threads.iter().map(|(_, tid)| tid.load(Ordering::Acquire)).collect()
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.control.give(END);
        for (thread, _) in self.threads.drain(..) {
            // Ignore a panic, which has been reported on stderr.
            drop(thread.join());
        }
    }
}

/// Guard of a thread, which counts the thread as died if it exits without an order.
struct ExitGuard<'a>(&'a Control);

impl Drop for ExitGuard<'_> {
    fn drop(&mut self) {
        if self.0.order() != END {
            self.0.count().died += 1;
            self.0.counted.notify_all();
        }
    }
}

fn run(layout: &Layout, partition: usize, stalls: &Stopwatch, control: &Control, tid: &AtomicI32) {
    let _guard = ExitGuard(control);
    // SAFETY: gettid has no arguments and cannot fail.
    tid.store(unsafe { libc::gettid() }, Ordering::Release);
    control.count().started += 1;
    control.counted.notify_all();
    let mut writer = Writer::new(layout, partition);
    let mut pace = WriteRate::new(layout);
    loop {
        match control.order() {
            RUN if writer.idle() => control.sleep(Duration::from_secs(1)),
            RUN => {
                let start = Instant::now();
                let written = writer.write();
                let end = Instant::now();
                writer.check(&written);
                stalls.record(end - start);
                if let Some(ahead) = pace.ahead(end) {
                    control.sleep(ahead);
                }
            }
            PARK if control.park() => pace = WriteRate::new(layout),
            _ => return,
        }
    }
}

/// Rate limit of one thread.
struct WriteRate {
    /// Time per operation in nanoseconds; 0 means unlimited.
    interval: u64,
    due: Instant,
}

impl WriteRate {
    /// Duration of a burst of operations. Sleeping costs tens of microseconds, so shorter sleeps would be inefficient.
    const BURST: Duration = Duration::from_millis(1);
    /// Maximum delay for which a thread compensates after a stall.
    const ARREARS: Duration = Duration::from_millis(50);

    fn new(layout: &Layout) -> Self {
        let bytes = layout.options.rate.unwrap_or(0) / layout.options.threads as u64;
        let interval = (SMALL_PAGE as u64 * 1_000_000_000).checked_div(bytes).unwrap_or(0);
        Self { interval, due: Instant::now() }
    }

    /// Returns the time to sleep after an operation that ended at `now`; `None` if that time is shorter than `BURST`.
    fn ahead(&mut self, now: Instant) -> Option<Duration> {
        if self.interval == 0 {
            return None;
        }
        self.due = self.due.max(now.checked_sub(Self::ARREARS).unwrap_or(now)) + Duration::from_nanos(self.interval);
        let ahead = self.due.saturating_duration_since(now);
        (ahead >= Self::BURST).then_some(ahead)
    }
}
