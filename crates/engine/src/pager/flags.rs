//! Deferred bitmap (S8): one bit per page, set until the contents of the page are in memory.

use std::fs::File;
use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapping::Mapping;
use crate::pages::{PageSet, masks};

/// Deferred bits of all pages of all regions, in a shared mapping of a file, so that another pager can take over.
///
/// A bit is cleared after the contents have been written and before they are mapped. It is set before contents are
/// evicted.
#[derive(Debug)]
pub struct Flags {
    mapping: Mapping,
    pages: usize,
}

/// Returns the size in bytes of a bitmap file for `pages` pages.
pub fn file_len(pages: usize) -> usize {
    pages.div_ceil(64).max(1).next_multiple_of(512) * 8
}

impl Flags {
    /// Maps the bitmap of `pages` pages, in a file of at least [`file_len`] bytes.
    ///
    /// # Errors
    /// `InvalidInput` if the file is shorter; otherwise the error of fstat(2) or mmap(2).
    pub fn open(file: BorrowedFd<'_>, pages: usize) -> io::Result<Self> {
        let (found, len) = (File::from(file.try_clone_to_owned()?).metadata()?.len(), file_len(pages));
        if found < len as u64 {
            let words = format!(
                "cannot map the deferred bitmap of {pages} pages: file has {found} bytes, expected at least {len}"
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words));
        }
        Ok(Self { mapping: Mapping::new(file, len, 0)?, pages })
    }

    /// Returns the number of pages of the bitmap.
    pub fn pages(&self) -> usize {
        self.pages
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < self.pages.div_ceil(64), "word {index} of the flags of {} pages", self.pages);
        // SAFETY: the word lies in the mapping, by the assertion and the length checked by `open`. The mapping is
        // page-aligned and lives as long as `self`; all processes access the word atomically.
        unsafe { &*self.mapping.base().cast::<AtomicU64>().add(index) }
    }

    /// Stores the bits of pages `64 * index` to `64 * index + 63`. Must be called before other threads access the
    /// bitmap.
    pub fn set_word(&self, index: usize, flags: u64) {
        self.word(index).store(flags, Ordering::Relaxed);
    }

    /// Sets the bits of a set of pages of the region that starts at page `base`. Must be called before other threads
    /// access the bitmap.
    pub fn set_all(&self, base: usize, pages: &PageSet) {
        for page in pages.runs().flat_map(|(start, end)| base + start..base + end) {
            self.word(page / 64).fetch_or(1 << (page % 64), Ordering::Relaxed);
        }
    }

    /// Returns whether the contents of a page are deferred.
    pub fn is_set(&self, page: usize) -> bool {
        self.word(page / 64).load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// Marks the contents of a page as deferred.
    pub fn set(&self, page: usize) {
        self.word(page / 64).fetch_or(1 << (page % 64), Ordering::AcqRel);
    }

    /// Marks the contents of a page as present in memory.
    pub fn clear(&self, page: usize) {
        self.word(page / 64).fetch_and(!(1 << (page % 64)), Ordering::AcqRel);
    }

    /// Marks the contents of pages `[first, end)` as present in memory.
    pub fn clear_all(&self, first: usize, end: usize) {
        for (index, mask) in masks(first, end) {
            self.word(index).fetch_and(!mask, Ordering::AcqRel);
        }
    }

    /// Returns whether all pages of `[first, end)` are deferred.
    pub fn all_set(&self, first: usize, end: usize) -> bool {
        masks(first, end).all(|(index, mask)| self.word(index).load(Ordering::Acquire) & mask == mask)
    }

    /// Returns the first deferred page of `[first, end)`, if any.
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

    /// Returns whether any page is deferred.
    pub fn any(&self) -> bool {
        self.next(0, self.pages).is_some()
    }

    /// Returns the runs of pages of `[first, end)` that are not deferred.
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

    /// Returns the deferred pages of `[first, end)`, relative to `first`.
    pub fn set_in(&self, first: usize, end: usize) -> PageSet {
        let (mut set, mut at) = (PageSet::new(end - first), first);
        while let Some(page) = self.next(at, end) {
            set.insert(page - first, page - first + 1);
            at = page + 1;
        }
        set
    }

    /// Returns the number of deferred pages.
    pub fn count(&self) -> usize {
        (0..self.pages.div_ceil(64)).map(|index| self.word(index).load(Ordering::Relaxed).count_ones() as usize).sum()
    }
}
