//! Segments registered for a checkpoint, and the traces that take over saved memory.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use parking_lot::{Mutex, MutexGuard};

use crate::SMALL_PAGE;
use crate::segment::Segment;
use crate::trace::Userfaults;
use crate::uapi::Userfault;

/// Segment registered with a userfaultfd.
#[derive(Debug)]
pub(super) struct Armed {
    pub(super) segment: Segment,
    pub(super) uffd: Arc<Userfault>,
}

/// Hand-over of saved memory to write traces.
#[derive(Debug)]
pub(super) struct TraceHandover {
    pub(super) userfaults: Userfaults,
    /// For each region, the number of bytes from its start that have been handed over.
    pub(super) handed: Vec<AtomicUsize>,
    /// Whether a part of the memory that was handed over could not be traced.
    pub(super) broken: AtomicBool,
    /// Locked while registrations change.
    changing: Mutex<()>,
}

impl TraceHandover {
    pub(super) fn new(userfaults: Userfaults, regions: usize) -> Self {
        let handed = (0..regions).map(|_| AtomicUsize::new(0)).collect();
        Self { userfaults, handed, broken: AtomicBool::new(false), changing: Mutex::default() }
    }

    /// Returns whether all memory that was handed over is traced.
    pub(super) fn whole(&self) -> bool {
        !self.broken.load(Ordering::Acquire)
    }

    /// Blocks hand-overs until the guard is dropped.
    pub(super) fn still(&self) -> MutexGuard<'_, ()> {
        self.changing.lock()
    }

    /// Returns the number of bytes, from the start of a region, that have been handed over.
    pub(super) fn handed(&self, region: usize) -> usize {
        self.handed[region].load(Ordering::Acquire)
    }
}

/// Returns where a segment maps a byte range of a region, as (address, length); `None` if it maps no part of the range.
pub(super) fn within(segment: &Segment, start: usize, len: usize) -> Option<(u64, u64)> {
    segment.part(start / SMALL_PAGE, (start + len) / SMALL_PAGE)
}

/// Returns whether the error of a userfaultfd call means that the process has exited.
pub(super) fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::ESRCH)
}
