//! Eviction of pages (S3): discards pages whose contents are in the chain; a later access loads them again.
//!
//! The order of the steps keeps memory consistent even if the pager exits before the last step:
//!
//! 1. The 2 MiB units of the pages are unmapped and registered. From then on, every write faults first, so the stored
//!    copies stay valid.
//! 2. The deferred bits are set. A deferred page is loaded from the chain, regardless of the contents of the file.
//! 3. Holes are punched.
//!
//! If the pager exits between two steps, the next pager loads the deferred pages; all other pages are present and
//! unchanged.

use super::PagerError;
use super::memory::{Memory, Watched};
use crate::pages::PageSet;
use crate::uapi::{self, PAGE_IS_PRESENT};
use crate::{SLOTS, SMALL_PAGE};

/// Evicts pages of a region; see [`super::Pager::evict`].
pub fn evict(memory: &Memory, region: usize, pages: &PageSet) -> Result<usize, PagerError> {
    let Some(found) = memory.regions.get(region) else { return Ok(0) };
    let mapping = found.mapping.as_ref().filter(|_| found.page_size == SMALL_PAGE && pages.pages() == found.pages);
    let Some(mapping) = mapping else {
        let words = "cannot evict: not a region of base pages of a file";
        return Err(PagerError::Io(std::io::Error::new(std::io::ErrorKind::InvalidInput, words)));
    };
    // Block loads, which would write to pages that are about to be punched out.
    let alone = memory.removing.write();
    memory.decide(found.base, found.end());
    let units = units(pages);
    for &(first, end) in &units {
        // Unregistering deferred pages, even briefly, would expose holes as zeros if the pager exited during that time.
        if memory.flags.next(found.base + first, found.base + end).is_some() {
            let words = format!("cannot evict: units {} to {} have deferred pages", first / SLOTS, end.div_ceil(SLOTS));
            return Err(PagerError::Io(std::io::Error::new(std::io::ErrorKind::InvalidInput, words)));
        }
        trap(memory, region, first, end)?;
    }
    let mut count = 0;
    for (first, end) in pages.runs() {
        // Pages discarded since they were stored are holes, and remain zeros.
        for (start, stop) in mapping.data_within(first * SMALL_PAGE, end * SMALL_PAGE)? {
            let (first, end) = ((start / SMALL_PAGE).max(first), (stop / SMALL_PAGE).min(end));
            (found.base + first..found.base + end).for_each(|page| memory.lack(page));
            mapping.punch(first * SMALL_PAGE, (end - first) * SMALL_PAGE)?;
            count += end - first;
        }
    }
    memory.removals.forget_reports();
    drop(alone);
    for (first, end) in units {
        // The remaining pages of the unit are in use, and accesses to them should not fault.
        memory.map(region, found.base + first, found.base + end);
    }
    Ok(count)
}

/// Returns the 2 MiB units that contain pages of the set, as runs of pages.
fn units(pages: &PageSet) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for (first, end) in pages.runs() {
        let (first, end) = (first / SLOTS * SLOTS, end.next_multiple_of(SLOTS).min(pages.pages()));
        match runs.last_mut() {
            Some((_, last)) if *last >= first => *last = end,
            _ => runs.push((first, end)),
        }
    }
    runs
}

/// Unmaps pages of a region from the workload, and registers them so that every access faults.
fn trap(memory: &Memory, region: usize, first: usize, end: usize) -> Result<(), PagerError> {
    for Watched { segment, uffd } in memory.watched.iter().filter(|watched| watched.segment.region == region) {
        let Some((address, len)) = segment.part(first, end) else { continue };
        // Pages that were evicted before and loaded again are still registered. Unmapping them while registered would
        // be reported as a removal, and block until the event has been read.
        uffd.unregister(address, len)?;
        segment.space.unmap_pages(address, len)?;
        uffd.register(address, len, uapi::REGISTER_MODE_MISSING | uapi::REGISTER_MODE_MINOR)?;
        let mut mapped = false;
        let pagemap = segment.space.pagemap();
        crate::mapping::scan(pagemap, address, address + len, 0, PAGE_IS_PRESENT, |_, _| mapped = true)?;
        if mapped {
            return Err(PagerError::Running);
        }
    }
    Ok(())
}
