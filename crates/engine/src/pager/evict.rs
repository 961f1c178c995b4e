//! Pages leave memory (S3): what has been copied to the chain goes, and comes back on access.
//!
//! The order makes every instant right, whoever dies. First the units are unmapped and registered: nobody can write to
//! them any more without coming to a pager, so what is copied stays what they hold. Then the flags are set: a page with
//! a flag is brought from the chain, whatever memory holds. Only then are holes punched. If we die in between, what has
//! a flag is brought by the next pager, and what has none is in memory as it was.

use super::PagerError;
use super::memory::{Memory, Watched};
use crate::pages::PageSet;
use crate::uapi::{self, PAGE_IS_PRESENT};
use crate::{SLOTS, SMALL_PAGE};

/// See [`super::Pager::evict`].
pub fn evict(memory: &Memory, region: usize, pages: &PageSet) -> Result<usize, PagerError> {
    let Some(found) = memory.regions.get(region) else { return Ok(0) };
    if found.page_size != SMALL_PAGE || pages.pages() != found.mapping.pages() {
        let error = std::io::Error::new(std::io::ErrorKind::InvalidInput, "pages that cannot go one by one");
        return Err(PagerError::Io(error));
    }
    // No contents come meanwhile: they would go to pages that are about to be punched out.
    let alone = memory.removing.write();
    memory.decide(found.base, found.end());
    let units = units(pages);
    for &(first, end) in &units {
        // To take the traps off, if only to put them on again, would show holes as zeros if we died in between.
        if memory.flags.next(found.base + first, found.base + end).is_some() {
            let words = format!("pages of units {} to {} are missing already", first / SLOTS, end.div_ceil(SLOTS));
            return Err(PagerError::Io(std::io::Error::new(std::io::ErrorKind::InvalidInput, words)));
        }
        trap(memory, region, first, end)?;
    }
    let mut count = 0;
    for (first, end) in pages.runs() {
        // What has been discarded since it was stored is zeros, and stays so.
        for (start, stop) in found.mapping.data_within(first * SMALL_PAGE, end * SMALL_PAGE)? {
            let (first, end) = ((start / SMALL_PAGE).max(first), (stop / SMALL_PAGE).min(end));
            (found.base + first..found.base + end).for_each(|page| memory.lack(page));
            found.mapping.punch(first * SMALL_PAGE, (end - first) * SMALL_PAGE)?;
            count += end - first;
        }
    }
    memory.removals.forget_reports();
    drop(alone);
    for (first, end) in units {
        // What stays is in use: it should not have to fault.
        memory.map(region, found.base + first, found.base + end);
    }
    Ok(count)
}

/// The 2 MiB units that hold pages of the set, as runs of pages.
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

/// Takes pages of a region out of the workload's page tables, and has every access to them come to us.
fn trap(memory: &Memory, region: usize, first: usize, end: usize) -> Result<(), PagerError> {
    for Watched { segment, uffd } in memory.watched.iter().filter(|watched| watched.segment.region == region) {
        let Some((address, len)) = segment.part(first, end) else { continue };
        // Registered memory (whose pages had been let go, and are all back) would report this as a discard, and wait
        // for that to be read.
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
