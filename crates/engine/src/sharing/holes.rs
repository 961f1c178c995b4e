//! Pages of zeros in a shared file, given back by making holes of them.
//!
//! Comparing a page and punching it out are two steps, and a write in between would be lost. So this is for memory that
//! nobody writes to: of a workload that is *paused*. Write protection alone would not do: a device, or direct I/O of
//! the workload, that has pinned a page writes to it past all page tables, and the page would be gone from the file.

use std::io;
use std::time::{Duration, Instant};

use super::content::{Content, WORDS};
use crate::SMALL_PAGE;
use crate::mapping::Mapping;
use crate::pager::Flags;

/// Punches the pages of zeros in `ranges` (start, length; bytes of the mapping) out, until `budget` is used up.
///
/// A page that a pager is still to fill (`waiting`: its flags, and the number of the mapping's first page in them) may
/// be zeros because it is just being written: it stays.
///
/// Returns how many of the ranges were done (at least one, if there is one) and how many pages were given back. A large
/// page is split for it, and its other pages keep their content.
///
/// # Errors
/// InvalidInput for a range that is not in the mapping, or whatever `fallocate` says: EOPNOTSUPP where no holes can be.
pub fn free_zeros(
    mapping: &Mapping,
    ranges: &[(usize, usize)],
    budget: Duration,
    waiting: Option<(&Flags, usize)>,
) -> io::Result<(usize, usize)> {
    let stays = |page: usize| waiting.is_some_and(|(flags, base)| flags.is_set(base + page));
    if ranges.iter().any(|&(start, len)| start.checked_add(len).is_none_or(|end| end > mapping.len())) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a range beyond the mapping"));
    }
    let begin = Instant::now();
    let mut pages = 0;
    for (done, &(start, len)) in ranges.iter().enumerate() {
        if done > 0 && begin.elapsed() > budget {
            return Ok((done, pages));
        }
        for (from, to) in mapping.data_within(start, start + len)? {
            pages += free_in(mapping, from, to, stays)?;
        }
    }
    Ok((ranges.len(), pages))
}

/// The same for one range that holds data.
fn free_in(mapping: &Mapping, start: usize, end: usize, stays: impl Fn(usize) -> bool) -> io::Result<usize> {
    let mut copy = [0; WORDS];
    let mut zeros: Vec<(usize, usize)> = Vec::new();
    // Whether it stays is asked before it is read: the flag goes when the contents are there.
    for page in (start / SMALL_PAGE..end.max(start) / SMALL_PAGE).filter(|&page| !stays(page)) {
        // SAFETY: `page` points to a page of the mapping, and the copy has its size.
        unsafe { std::ptr::copy_nonoverlapping(mapping.page(page).cast(), &raw mut copy, 1) };
        if Content::of(&copy) != Content::Zero {
            continue;
        }
        match zeros.last_mut() {
            Some((_, last)) if *last == page => *last += 1,
            _ => zeros.push((page, page + 1)),
        }
    }
    for &(first, last) in &zeros {
        mapping.punch(first * SMALL_PAGE, (last - first) * SMALL_PAGE)?;
    }
    Ok(zeros.iter().map(|(first, last)| last - first).sum())
}
