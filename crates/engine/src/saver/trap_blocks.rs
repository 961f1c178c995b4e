//! Trap blocks: the unit in which regions are copied and unprotected, with the state of each block.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use super::SavedRegion;
use super::source::PageOrigin;
use super::staging::Origin;
use crate::SMALL_PAGE;

/// State of a block that is protected and has not been copied.
pub(super) const UNSAVED: u8 = 0;
/// State of a block that is being copied by the thread that has claimed it.
pub(super) const COPYING: u8 = 1;
/// State of a block that has been copied, and may be unprotected.
pub(super) const SAVED: u8 = 2;
/// State of a block that was unprotected before the snapshot point, and must be protected again.
pub(super) const RELEASED: u8 = 3;

/// Region divided into trap blocks.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) source: PageOrigin,
    /// Number of bytes per block; the last block may be shorter.
    pub(super) trap_block: usize,
    /// Index of the first page in the page map, which covers all regions.
    pub(super) first_page: usize,
    /// Whether the region is in hugetlbfs, where lseek(2) reports all pages as data.
    pub(super) hugetlb: bool,
    states: Vec<AtomicU8>,
}

/// Copy of a block.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) region: usize,
    /// First page of the block, within its region.
    pub(super) page: usize,
    /// Present pages of the block, as (first, end) relative to `page`.
    pub(super) runs: Vec<(usize, usize)>,
    /// Pages to record as holes, as (first, end) relative to `page`. Without rounds, other pages without a copy are
    /// holes too, or equal the parent in memory of a clone.
    pub(super) absent: Vec<(usize, usize)>,
    pub(super) slot: Box<[u8]>,
    pub(super) origin: Origin,
}

/// Pages of a block, as (first, end) relative to the block.
#[derive(Debug)]
pub(super) struct Runs {
    /// Copied pages.
    pub(super) present: Vec<(usize, usize)>,
    /// Pages to record as holes.
    pub(super) absent: Vec<(usize, usize)>,
}

/// Returns the parts of a range that are outside of `holes`, which are in ascending order.
fn without((start, end): (usize, usize), holes: &[(usize, usize)]) -> Vec<(usize, usize)> {
    let (mut first, mut parts) = (start, Vec::new());
    for &(from, to) in holes.iter().filter(|&&(from, to)| from < end && start < to) {
        if first < from {
            parts.push((first, from));
        }
        first = to;
    }
    if first < end {
        parts.push((first, end));
    }
    parts
}

/// Divides regions into blocks of `trap_block` bytes, or of one page if pages are larger than `trap_block`.
pub(super) fn areas(regions: Vec<SavedRegion>, trap_block: usize) -> Vec<Area> {
    let mut first_page = 0;
    let cut = |SavedRegion { source, page_size }: SavedRegion| {
        let trap_block = trap_block.max(page_size);
        let states = (0..source.len().div_ceil(trap_block)).map(|_| AtomicU8::new(UNSAVED)).collect();
        let pages = source.pages();
        let area = Area { source, trap_block, first_page, hugetlb: page_size > SMALL_PAGE, states };
        first_page += pages;
        area
    };
    regions.into_iter().map(cut).collect()
}

impl Area {
    pub(super) fn blocks(&self) -> usize {
        self.states.len()
    }

    /// Returns the offset and the length of a block, in bytes.
    pub(super) fn bounds(&self, block: usize) -> (usize, usize) {
        let start = block * self.trap_block;
        (start, self.trap_block.min(self.source.len() - start))
    }

    pub(super) fn state(&self, block: usize) -> u8 {
        self.states[block].load(Ordering::Acquire)
    }

    pub(super) fn set(&self, block: usize, state: u8) {
        self.states[block].store(state, Ordering::Release);
    }

    /// Changes the state of a block atomically. Returns false if the state was not `from`.
    pub(super) fn change(&self, block: usize, from: u8, to: u8) -> bool {
        self.states[block].compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Waits while another thread copies a block, which takes a few microseconds.
    pub(super) fn await_saved(&self, block: usize) {
        while self.state(block) == COPYING {
            std::thread::yield_now();
        }
    }

    /// Copies a block, which must be protected and claimed by the caller, into `slot`. Pages that are known to be zeros
    /// are not read, and become holes.
    pub(super) fn copy(&self, block: usize, slot: &mut [u8]) -> io::Result<Runs> {
        let (start, len) = self.bounds(block);
        let ranges =
            if self.hugetlb { vec![(start, start + len)] } else { self.source.data_within(start, start + len)? };
        let pages = |(from, to): (usize, usize)| ((from - start) / SMALL_PAGE, (to - start).div_ceil(SMALL_PAGE));
        let absent: Vec<_> = self.source.zeros_within(start, start + len)?.into_iter().map(pages).collect();
        let present: Vec<_> = ranges.into_iter().map(pages).flat_map(|range| without(range, &absent)).collect();
        for &(first, end) in &present {
            let (at, len) = (first * SMALL_PAGE, (end - first) * SMALL_PAGE);
            self.source.read(start + at, &mut slot[at..at + len])?;
        }
        Ok(Runs { present, absent })
    }
}
