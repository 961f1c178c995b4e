//! How long single operations took: what installing a trace, or a fault, costs a writer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of the histogram: bucket n counts operations of 2^n up to 2^(n+1) ns.
pub const BUCKETS: usize = 40;

/// Durations of one thread's operations. Kept in the process, not in the ledger: measuring must not dirty memory.
#[derive(Debug)]
pub struct Stalls {
    longest: AtomicU64,
    histogram: [AtomicU64; BUCKETS],
}

impl Default for Stalls {
    fn default() -> Self {
        Self { longest: AtomicU64::new(0), histogram: [const { AtomicU64::new(0) }; BUCKETS] }
    }
}

impl Stalls {
    /// Counts one operation. Called by the one thread that owns the counters; a reset at the same time may miss it.
    pub(super) fn record(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        if nanoseconds > self.longest.load(Ordering::Relaxed) {
            self.longest.store(nanoseconds, Ordering::Relaxed);
        }
        let bucket = &self.histogram[(nanoseconds.max(1).ilog2() as usize).min(BUCKETS - 1)];
        bucket.store(bucket.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }
}

/// Durations of several threads' operations taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    /// The longest, ns.
    pub longest: u64,
    /// How many took 2^n up to 2^(n+1) ns.
    pub histogram: [u64; BUCKETS],
}

impl Summary {
    pub(super) fn of<'a>(threads: impl Iterator<Item = &'a Stalls>, reset: bool) -> Self {
        let take = |cell: &AtomicU64| {
            if reset { cell.swap(0, Ordering::Relaxed) } else { cell.load(Ordering::Relaxed) }
        };
        let mut summary = Self { longest: 0, histogram: [0; BUCKETS] };
        for thread in threads {
            summary.longest = summary.longest.max(take(&thread.longest));
            for (sum, cell) in summary.histogram.iter_mut().zip(&thread.histogram) {
                *sum += take(cell);
            }
        }
        summary
    }
}
