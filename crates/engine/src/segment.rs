//! Segments: mappings of parts of a workload's regions in the address spaces of its processes.

use std::sync::Arc;

use crate::space::{AdoptError, Space};
use crate::uapi::{REGISTER_MODE_WP, Userfault};
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Mapping of a part of a region in an address space.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Address space.
    pub space: Arc<Space>,
    /// Address of the first byte in that address space.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Index of the region.
    pub region: usize,
    /// First mapped page of the region.
    pub first_page: usize,
}

impl Segment {
    /// Returns the mapped pages of the region, as (first, end).
    pub(crate) fn extent(&self) -> (usize, usize) {
        self.pages(self.address, self.address + self.len)
    }

    /// Returns the pages of the region between two addresses of the segment, as (first, end).
    pub(crate) fn pages(&self, start: u64, end: u64) -> (usize, usize) {
        (self.first_page + self.page_of(start), self.first_page + self.page_of(end))
    }

    /// Returns the page at an address, relative to the first page of the segment.
    pub(crate) fn page_of(&self, address: u64) -> usize {
        usize::try_from((address - self.address) / SMALL_PAGE as u64).unwrap_or(0)
    }

    /// Returns the address range at which the segment maps pages of `[first, end)`, as (address, length in bytes);
    /// `None` if it maps none of them.
    pub(crate) fn part(&self, first: usize, end: usize) -> Option<(u64, u64)> {
        let (from, to) = self.extent();
        let (start, stop) = (first.max(from), end.min(to));
        let address = |page: usize| self.address + ((page - from) * SMALL_PAGE) as u64;
        (start < stop).then(|| (address(start), ((stop - start) * SMALL_PAGE) as u64))
    }

    /// Returns whether the segment maps any of the pages `[first, end)` of the region.
    pub(crate) fn touches(&self, first: usize, end: usize) -> bool {
        self.part(first, end).is_some()
    }

    /// Maps the huge page that consists of pages `[first, end)` by a PMD entry. Returns false if the segment does not
    /// map the whole huge page at an aligned address, or if MADV_COLLAPSE fails.
    pub(crate) fn map_large(&self, first: usize, end: usize) -> bool {
        let Some((address, len)) = self.part(first, end) else { return false };
        let whole = len == LARGE_PAGE as u64 && address.is_multiple_of(len);
        whole && self.space.collapse(address, len).is_ok()
    }
}

/// Registers segments for write faults, with one userfaultfd per process, created by `make`. Does not write-protect
/// them.
///
/// # Errors
/// Errors of `make` and of UFFDIO_REGISTER; [`AdoptError::Registered`] if a segment is registered with another
/// userfaultfd.
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
