//! The needs-update flags (S8): one bit per page, set while memory does not hold the page's contents yet.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapping::Mapping;
use crate::pages::PageSet;

/// Flags over all pages of all regions, in memory that another pager can take over: a mapping of a file.
///
/// A flag is cleared after the contents have been written and before they are mapped. It is set before contents go.
#[derive(Debug)]
pub struct Flags {
    mapping: Mapping,
    pages: usize,
}

/// Bytes of a file of flags.
pub fn file_len(pages: usize) -> usize {
    pages.div_ceil(64).max(1).next_multiple_of(512) * 8
}

impl Flags {
    /// Flags for so many pages, in a file that is [`file_len`] long.
    ///
    /// # Errors
    /// InvalidInput for a file that is shorter, or what the kernel says.
    pub fn open(file: BorrowedFd<'_>, pages: usize) -> io::Result<Self> {
        let (found, len) = (File::from(file.try_clone_to_owned()?).metadata()?.len(), file_len(pages));
        if found < len as u64 {
            let words = format!("flags of {pages} pages in a file of {found} bytes, not of {len}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        Ok(Self { mapping: Mapping::new(file, len, 0)?, pages })
    }

    /// Pages that there are flags for.
    pub fn pages(&self) -> usize {
        self.pages
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.pages.div_ceil(64), "word {index} of the flags of {} pages", self.pages);
        // SAFETY: within the mapping by the assertion, aligned, and accessed as an atomic by everybody.
        unsafe { &*self.mapping.base().cast::<AtomicU64>().add(index) }
    }

    /// Sets the flags of 64 pages: only before anybody else looks at them.
    pub fn set_word(&self, index: usize, flags: u64) {
        self.word(index).store(flags, Ordering::Relaxed);
    }

    /// Sets the flags of a set of pages, the first of whose region is `base`: only before anybody else looks at them.
    pub fn set_all(&self, base: usize, pages: &PageSet) {
        for page in pages.runs().flat_map(|(start, end)| base + start..base + end) {
            self.word(page / 64).fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    /// Whether the page's contents are still to come.
    pub fn is_set(&self, page: usize) -> bool {
        self.word(page / 64).load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// The contents are not in memory any more.
    pub fn set(&self, page: usize) {
        self.word(page / 64).fetch_or(1 << (page % 64), Ordering::AcqRel);
    }

    /// The contents are in memory.
    pub fn clear(&self, page: usize) {
        self.word(page / 64).fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
    }

    /// The first page of `[first, end)` that has the flag.
    pub fn next(&self, first: usize, end: usize) -> Option<usize> {
        let mut page = first;
        while page < end {
            let rest = self.word(page / 64).load(Ordering::Acquire) >> (page % 64);
            if rest != 0 {
                let found = page + rest.trailing_zeros() as usize;
                return (found < end).then_some(found);
            }
            page = (page / 64 + 1) * 64;
        }
        None
    }

    /// Whether there is a page that has the flag.
    pub fn any(&self) -> bool {
        self.next(0, self.pages).is_some()
    }

    /// The runs of pages of `[first, end)` without the flag.
    pub fn clear_runs(&self, first: usize, end: usize) -> Vec<(usize, usize)> {
        let (mut runs, mut at) = (Vec::new(), first);
        while at < end {
            let stop = self.next(at, end).unwrap_or(end);
            if at < stop {
                runs.push((at, stop));
            }
            at = (stop..end).find(|&page| !self.is_set(page)).unwrap_or(end);
        }
        runs
    }

    /// The pages of `[first, end)` that have the flag, as numbers from `first` on.
    pub fn set_in(&self, first: usize, end: usize) -> PageSet {
        let (mut set, mut at) = (PageSet::new(end - first), first);
        while let Some(page) = self.next(at, end) {
            set.insert(page - first, page - first + 1);
            at = page + 1;
        }
        set
    }

    /// How many pages have the flag.
    pub fn count(&self) -> usize {
        (0..self.pages.div_ceil(64)).map(|index| self.word(index).load(Ordering::Relaxed).count_ones() as usize).sum()
    }
}
