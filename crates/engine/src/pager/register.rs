//! Start of a pager: sets the deferred bits of the image's pages, registers the workload's mappings, and removes old
//! contents.

use super::flags::Flags;
use super::memory::{Installer, Memory, Watched};
use super::{Begin, PagerError};
use crate::block::Class;
use crate::image::{Chain, PageEntry};
use crate::mapping::scan;
use crate::uapi;

/// Maximum number of attempts to unmap deferred pages from a workload that maps them again.
const ATTEMPTS: usize = 4;

/// Marks all pages of the nearest image as deferred, except zero and absent pages.
pub fn mark(chain: &Chain, flags: &Flags) {
    // The class of an entry is valid regardless of the image that holds the contents.
    let stored = |entry: &PageEntry| u64::from(!matches!(entry.class(), Some(Class::Absent | Class::Zero)));
    for (index, entries) in chain.nearest().page_map().chunks(64).enumerate() {
        flags.set_word(index, entries.iter().rev().fold(0, |word, entry| word << 1 | stored(entry)));
    }
}

/// Registers the workload's mappings, so that every access to an unmapped page is reported. Removes old contents:
/// unmaps deferred pages ([`Begin::Kept`]), or empties the files ([`Begin::Empty`]). The workload has registered
/// private memory itself, and has not accessed it.
pub fn register(memory: &Memory, begin: Begin) -> Result<(), PagerError> {
    for watched in &memory.watched {
        let Watched { segment, uffd } = watched;
        if begin == Begin::Kept && !memory.lacks_any(segment) {
            continue;
        }
        if begin == Begin::TakenOver {
            // Wake the threads whose faults the previous pager had read but not resolved: they fault again.
            uffd.wake(segment.address, segment.len)?;
        } else if matches!(memory.installer, Installer::Files(_)) {
            uffd.register(segment.address, segment.len, uapi::REGISTER_MODE_MISSING | uapi::REGISTER_MODE_MINOR)?;
        }
        if begin == Begin::Kept {
            unmap_flagged(memory, watched)?;
        }
    }
    if begin == Begin::Empty {
        for mapping in memory.regions.iter().filter_map(|region| region.mapping.as_ref()) {
            // Discard the pages that the workload wrote before its state was loaded, so that accesses to them fault
            // too.
            mapping.punch(0, mapping.len())?;
        }
    }
    Ok(())
}

/// Unmaps deferred pages from the workload, so that it cannot read their old contents.
///
/// The memory is unregistered before it is unmapped: the unmapping would otherwise be reported as a removal, and block
/// until the event has been read. Until the memory is registered again, a running workload can map a page again. Fails
/// with [`PagerError::Running`] if the workload does so in each of `ATTEMPTS` attempts.
fn unmap_flagged(memory: &Memory, Watched { segment, uffd }: &Watched) -> Result<(), PagerError> {
    let base = memory.regions[segment.region].base;
    let (first, last) = (segment.address, segment.address + segment.len);
    for _ in 0..ATTEMPTS {
        let mut mapped = false;
        scan(segment.space.pagemap(), first, last, 0, uapi::PAGE_IS_PRESENT, |start, end| {
            let (start, end) = segment.pages(start, end);
            mapped |= memory.flags.next(base + start, base + end).is_some();
        })?;
        if !mapped {
            return Ok(());
        }
        uffd.unregister(first, segment.len)?;
        segment.space.unmap_pages(first, segment.len)?;
        uffd.register(first, segment.len, uapi::REGISTER_MODE_MISSING | uapi::REGISTER_MODE_MINOR)?;
    }
    Err(PagerError::Running)
}
