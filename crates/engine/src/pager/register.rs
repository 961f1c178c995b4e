//! How a pager begins: flags as the image says, the workload's mappings registered, old contents out of its sight.

use super::flags::Flags;
use super::memory::{Memory, Watched};
use super::{Begin, PagerError};
use crate::block::Class;
use crate::image::{Chain, PageEntry};
use crate::mapping::scan;
use crate::uapi;

/// How often the mappings of pages to come are taken away from a workload that makes them again.
const ATTEMPTS: usize = 4;

/// Sets the flags of all pages that are not zeros.
pub fn mark(chain: &Chain, flags: &Flags) {
    // Class and signature are right whichever image of the chain holds the contents.
    let stored = |entry: &PageEntry| u64::from(!matches!(entry.class(), Some(Class::Absent | Class::Zero)));
    for (index, entries) in chain.nearest().page_map().chunks(64).enumerate() {
        flags.set_word(index, entries.iter().rev().fold(0, |word, entry| word << 1 | stored(entry)));
    }
}

/// From here on every access to a page that is not mapped comes to us.
pub fn register(memory: &Memory, begin: Begin) -> Result<(), PagerError> {
    for watched in &memory.watched {
        let Watched { segment, uffd } = watched;
        if begin == Begin::Kept && !memory.lacks_any(segment) {
            continue;
        }
        if begin == Begin::TakenOver {
            // Faults that the pager before us had read and not answered: they come again.
            uffd.wake(segment.address, segment.len)?;
        } else {
            uffd.register(segment.address, segment.len, uapi::REGISTER_MODE_MISSING | uapi::REGISTER_MODE_MINOR)?;
        }
        if begin == Begin::Kept {
            unmap_flagged(memory, watched)?;
        }
    }
    if begin == Begin::Empty {
        for region in &memory.regions {
            // Whatever the workload has written before it was given its state, and mapped: it must trap as all else.
            region.mapping.punch(0, region.mapping.len())?;
        }
    }
    Ok(())
}

/// Takes the workload's mappings away where pages with the flag are mapped: old contents must not be seen any more.
///
/// Not while registered: it would wait to be read as a discard. So the page may be mapped again before it is registered
/// again, by a workload that runs; then it is tried again.
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
