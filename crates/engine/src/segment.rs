//! Segments: the parts of a workload's regions, where its address spaces map them.

use std::sync::Arc;

use crate::space::{AdoptError, Space};
use crate::uapi::{REGISTER_MODE_WP, Userfault};
use crate::{LARGE_PAGE, SMALL_PAGE};

/// A mapping of a part of a region in an address space.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Whose.
    pub space: Arc<Space>,
    /// Where, in that address space.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Number of the region.
    pub region: usize,
    /// First page of the region that is mapped there.
    pub first_page: usize,
}

impl Segment {
    /// Pages of the region that are mapped here, as (first, end).
    pub(crate) fn extent(&self) -> (usize, usize) {
        self.pages(self.address, self.address + self.len)
    }

    /// Pages of the region between two addresses of the segment.
    pub(crate) fn pages(&self, start: u64, end: u64) -> (usize, usize) {
        (self.first_page + self.page_of(start), self.first_page + self.page_of(end))
    }

    /// The page at an address, counted from the first one of the segment.
    pub(crate) fn page_of(&self, address: u64) -> usize {
        usize::try_from((address - self.address) / SMALL_PAGE as u64).unwrap_or(0)
    }

    /// Where what there is here of pages `[first, end)` of the region is mapped, as (address, bytes).
    pub(crate) fn part(&self, first: usize, end: usize) -> Option<(u64, u64)> {
        let (from, to) = self.extent();
        let (start, stop) = (first.max(from), end.min(to));
        let address = |page: usize| self.address + ((page - from) * SMALL_PAGE) as u64;
        (start < stop).then(|| (address(start), ((stop - start) * SMALL_PAGE) as u64))
    }

    /// Whether any of these pages of the region is mapped here.
    pub(crate) fn touches(&self, first: usize, end: usize) -> bool {
        self.part(first, end).is_some()
    }

    /// Maps `[first, end)`, the pages of a large page, as one; false where that cannot be.
    pub(crate) fn map_large(&self, first: usize, end: usize) -> bool {
        let Some((address, len)) = self.part(first, end) else { return false };
        let whole = len == LARGE_PAGE as u64 && address.is_multiple_of(len);
        whole && self.space.collapse(address, len).is_ok()
    }
}

/// Registers segments for traps of writes, one userfaultfd per process, as `make` makes it. Nothing is protected yet.
///
/// # Errors
/// Those of `make`; [`AdoptError::Registered`] for a segment that somebody else's userfaultfd is on.
pub(crate) fn register_for_writes(
    segments: Vec<Segment>,
    make: impl Fn(&Space) -> Result<Userfault, AdoptError>,
) -> Result<Vec<(Segment, Arc<Userfault>)>, AdoptError> {
    let mut registered: Vec<(Segment, Arc<Userfault>)> = Vec::with_capacity(segments.len());
    for segment in segments {
        let known = registered.iter().find(|(other, _)| other.space.pid() == segment.space.pid());
        let uffd = match known {
            Some((_, uffd)) => uffd.clone(),
            None => Arc::new(make(&segment.space)?),
        };
        uffd.register(segment.address, segment.len, REGISTER_MODE_WP).map_err(|error| {
            let taken = error.raw_os_error() == Some(libc::EBUSY);
            let (pid, address) = (segment.space.pid(), segment.address);
            if taken { AdoptError::Registered(pid, address, error) } else { error.into() }
        })?;
        registered.push((segment, uffd));
    }
    Ok(registered)
}
