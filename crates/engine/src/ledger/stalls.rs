//! How long single operations took: what installing a trace, or a fault, costs a writer.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Buckets of the histogram: bucket n counts operations of 2^n up to 2^(n+1) ns.
pub(super) const BUCKETS: usize = 40;

/// Durations of one thread's operations. Kept in the process, not in the ledger: measuring must not dirty memory.
#[derive(Debug)]
pub(super) struct Stopwatch {
    longest: AtomicU64,
    histogram: [AtomicU64; BUCKETS],
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self { longest: AtomicU64::new(0), histogram: [const { AtomicU64::new(0) }; BUCKETS] }
    }
}

impl Stopwatch {
    /// Counts one operation.
    pub(super) fn record(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        let bucket = (nanoseconds.max(1).ilog2() as usize).min(BUCKETS - 1);
        self.histogram[bucket].fetch_add(1, Ordering::Relaxed);
    }
}

/// Durations of several threads' operations taken together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stalls {
    /// The longest, ns.
    pub longest: u64,
    /// How many took 2^n up to 2^(n+1) ns.
    pub histogram: [u64; BUCKETS],
}

impl Stalls {
    pub(super) fn of<'a>(threads: impl Iterator<Item = &'a Stopwatch>, reset: bool) -> Self {
        let take = |cell: &AtomicU64| {
            if reset { cell.swap(0, Ordering::Relaxed) } else { cell.load(Ordering::Relaxed) }
        };
        let mut all = Self { longest: 0, histogram: [0; BUCKETS] };
        for thread in threads {
            all.longest = all.longest.max(take(&thread.longest));
            for (sum, cell) in all.histogram.iter_mut().zip(&thread.histogram) {
                *sum += take(cell);
            }
        }
        all
    }
}
