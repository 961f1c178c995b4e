//! Durations of single operations, which show the cost of installing a trace or of a fault.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Number of histogram bins. Bin n counts operations of at least 2^n and less than 2^(n+1) ns; the last bin has no
/// upper limit.
pub(super) const BUCKETS: usize = 40;

/// Durations of the operations of one thread. They are stored outside the memory of the ledger, so that measuring does
/// not write to that memory.
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
    /// Counts an operation by its duration.
    pub(super) fn record(&self, took: Duration) {
        let nanoseconds = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.longest.fetch_max(nanoseconds, Ordering::Relaxed);
        let bucket = (nanoseconds.max(1).ilog2() as usize).min(BUCKETS - 1);
        self.histogram[bucket].fetch_add(1, Ordering::Relaxed);
    }
}

/// Durations of the operations of several threads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stalls {
    /// Longest duration in nanoseconds.
    pub longest: u64,
    /// Number of operations by duration. Bin n counts durations of at least 2^n and less than 2^(n+1) ns; the last bin
    /// has no upper limit.
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
