//! Freeing of zero pages of a shared file, by punching holes.
//!
//! Comparing and punching are two steps, and a write between them would be lost. The workload must therefore be
//! *paused*. Write protection alone is not sufficient: a device or direct I/O that has pinned a page bypasses the page
//! tables, and its writes would be lost.

use std::io;
use std::time::{Duration, Instant};

use super::content::{Content, WORDS};
use crate::SMALL_PAGE;
use crate::mapping::Mapping;
use crate::pager::Flags;

/// Frees the zero pages in `ranges` (start and length in bytes, relative to the mapping) by punching holes, until
/// `budget` is exceeded.
///
/// `waiting` consists of the deferred bitmap, and of the index of the mapping's first page in the bitmap. Deferred
/// pages are skipped, because a page may be zero while it is being loaded. A hole in a huge page splits the huge page;
/// the other pages keep their contents.
///
/// Returns the number of ranges that were processed, and the number of freed pages. Processes at least one range,
/// unless `ranges` is empty.
///
/// # Errors
/// `InvalidInput` if a range is not in the mapping; otherwise the error of lseek(2), or of fallocate(2), such as
/// EOPNOTSUPP.
pub fn free_zeros(
    mapping: &Mapping,
    ranges: &[(usize, usize)],
    budget: Duration,
    waiting: Option<(&Flags, usize)>,
) -> io::Result<(usize, usize)> {
    let stays = |page: usize| waiting.is_some_and(|(flags, base)| flags.is_set(base + page));
    if ranges.iter().any(|&(start, len)| start.checked_add(len).is_none_or(|end| end > mapping.len())) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "cannot punch holes: range beyond the mapping"));
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

/// Frees the zero pages of a range of data, except those for which `stays` returns true. Returns the number of freed
/// pages.
fn free_in(mapping: &Mapping, start: usize, end: usize, stays: impl Fn(usize) -> bool) -> io::Result<usize> {
    let mut copy = [0; WORDS];
    let mut zeros: Vec<(usize, usize)> = Vec::new();
    // Check the deferred bit before reading the page: the bit is cleared after the contents have been written.
    for page in (start / SMALL_PAGE..end.max(start) / SMALL_PAGE).filter(|&page| !stays(page)) {
        // SAFETY: `page` points to a page of the mapping, and the copy has the size of a page. The workload is paused.
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
