//! Parts of scanned memory, and the buffers to read them.

use super::content::WORDS;
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Number of pages read at a time from another process, so that they stay in the L2 cache until they are hashed.
pub(super) const CHUNK: usize = 64;

/// Part of a `ScannedMemory` within a 2 MiB unit.
#[derive(Debug, Clone, Copy)]
pub struct Span {
    /// Position of the first byte.
    pub start: u64,
    /// Number of pages, up to 512.
    pub pages: usize,
}

/// Numbers of pages of a [`Span`] that were not read from memory.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Others {
    /// Number of pages that are already shared, with a forked process or by KSM.
    pub shared: u32,
    /// Number of deferred pages (S8), which are known by their signatures.
    pub deferred: u32,
}

/// Read buffers of a scanning thread.
#[derive(Debug)]
pub struct Reader {
    /// Entries of the pagemap.
    pub(super) entries: Vec<u64>,
    /// Result of `Mapping::resident`: whether each page is in memory.
    pub(super) resident: Vec<u8>,
    /// Copies of pages.
    pub(super) chunk: Vec<[u64; WORDS]>,
}

impl Default for Reader {
    fn default() -> Self {
        Self { entries: vec![0; SLOTS], resident: vec![0; SLOTS], chunk: vec![[0; WORDS]; CHUNK] }
    }
}

/// Splits the run `[start, end)` at 2 MiB boundaries, and appends the parts to `spans`. Runs in the same unit become
/// one span. Runs must be passed in ascending order.
pub(super) fn split(start: u64, end: u64, spans: &mut Vec<Span>) {
    let unit_len = LARGE_PAGE as u64;
    let mut at = start;
    while at < end {
        let stop = end.min((at / unit_len + 1) * unit_len);
        match spans.last_mut() {
            Some(last) if last.start / unit_len == at / unit_len => last.pages = pages(last.start, stop),
            _ => spans.push(Span { start: at, pages: pages(at, stop) }),
        }
        at = stop;
    }
}

pub(super) fn pages(start: u64, end: u64) -> usize {
    usize::try_from((end - start) / SMALL_PAGE as u64).unwrap_or(0)
}
