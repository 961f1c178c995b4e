//! Regions cut into blocks, what has become of each of them, and their copies.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use super::Region;
use super::source::Source;
use super::staging::Origin;
use crate::SMALL_PAGE;

/// Not copied yet, and protected.
pub(super) const UNSAVED: u8 = 0;
/// Being copied by whoever made it so.
pub(super) const COPYING: u8 = 1;
/// Copied: may be released.
pub(super) const SAVED: u8 = 2;
/// Released before the instant: to be protected again.
pub(super) const RELEASED: u8 = 3;

/// A region, cut into the blocks that traps copy.
#[derive(Debug)]
pub(super) struct Area {
    pub(super) source: Source,
    /// Bytes of a block; the last one may be shorter.
    pub(super) trap_block: usize,
    /// Number of its first page among the pages of all regions.
    pub(super) first_page: usize,
    /// hugetlbfs calls everything data.
    pub(super) hugetlb: bool,
    states: Vec<AtomicU8>,
}

/// A copied block.
#[derive(Debug)]
pub(super) struct Copied {
    pub(super) region: usize,
    /// First page of the block, of its region.
    pub(super) page: usize,
    /// Pages of the block that are in memory, as (first, end) from its start.
    pub(super) runs: Vec<(usize, usize)>,
    /// Pages of it that were in memory when the parent was saved, and are not now.
    pub(super) absent: Vec<(usize, usize)>,
    pub(super) slot: Box<[u8]>,
    pub(super) origin: Origin,
}

/// Cuts regions into blocks of `trap_block` bytes, or of a page where that is larger.
pub(super) fn areas(regions: Vec<Region>, trap_block: usize) -> Vec<Area> {
    let mut first_page = 0;
    let cut = |Region { source, page_size }: Region| {
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

    /// First byte and length of a block.
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

    /// Makes a block that is `from` one that is `to`, unless somebody was faster.
    pub(super) fn change(&self, block: usize, from: u8, to: u8) -> bool {
        self.states[block].compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Waits for whoever copies a block; it takes some microseconds.
    pub(super) fn await_saved(&self, block: usize) {
        while self.state(block) == COPYING {
            std::thread::yield_now();
        }
    }

    /// Copies what is in memory of a block, which is protected and claimed by the caller; returns its pages.
    pub(super) fn copy(&self, block: usize, slot: &mut [u8]) -> io::Result<Vec<(usize, usize)>> {
        let (start, len) = self.bounds(block);
        let ranges =
            if self.hugetlb { vec![(start, start + len)] } else { self.source.data_within(start, start + len)? };
        let mut runs = Vec::with_capacity(ranges.len());
        for (from, to) in ranges {
            let (first, end) = ((from - start) / SMALL_PAGE, (to - start).div_ceil(SMALL_PAGE));
            let (at, len) = (first * SMALL_PAGE, (end - first) * SMALL_PAGE);
            self.source.read(start + at, &mut slot[at..at + len])?;
            runs.push((first, end));
        }
        Ok(runs)
    }
}
