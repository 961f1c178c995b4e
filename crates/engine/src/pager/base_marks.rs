//! Marks of a base: the units that are being written, and whether the base was given up.
//!
//! The marks are in the page of the file after the last unit, and outlive a pager that is killed. A write that ends
//! early can leave zeros in pages that exist, and clones may have read them. The next pager cannot recognise such a unit
//! by the holes of the file. It therefore compares the few units that are marked with the image.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::mapping::Mapping;
use crate::placer::populate_write;
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Page of marks. Each word is 0, or the index of a unit plus 1. Word 0 refers to the unit for which the base was given
/// up; each other word refers to the unit to which a resident buffer is being written.
#[derive(Debug)]
pub struct Marks {
    page: Mapping,
    /// Number of units of the base.
    units: usize,
}

impl Marks {
    /// Length of the marks in the file, in bytes.
    pub const LEN: usize = SMALL_PAGE;

    /// Maps the marks of a base of `units` units, and allocates their page.
    ///
    /// # Errors
    /// ENOMEM, or the error of mmap(2).
    pub fn open(file: BorrowedFd<'_>, units: usize) -> io::Result<Self> {
        let page = Mapping::new(file, Self::LEN, (units * LARGE_PAGE) as u64)?;
        // SAFETY: the range is our mapping; the advice does not change contents. If the kernel refuses the advice, the
        // file has a huge page for the marks, which only costs memory.
        unsafe { libc::madvise(page.base().cast(), Self::LEN, libc::MADV_NOHUGEPAGE) };
        populate_write(page.base(), Self::LEN)?;
        Ok(Self { page, units })
    }

    fn word(&self, index: usize) -> &AtomicU64 {
        assert!(index < Self::LEN / size_of::<u64>(), "mark {index}");
        // SAFETY: the word lies within the mapping, is aligned, lives as long as `self`, and is accessed atomically.
        unsafe { AtomicU64::from_ptr(self.page.base().cast::<u64>().add(index)) }
    }

    fn unit(&self, index: usize) -> Option<usize> {
        let unit = usize::try_from(self.word(index).load(Ordering::SeqCst)).ok()?.checked_sub(1)?;
        Some(unit.min(self.units.saturating_sub(1)))
    }

    /// Marks the unit to which a buffer is being written.
    pub fn begin(&self, buffer: usize, unit: usize) {
        self.word(1 + buffer).store(unit as u64 + 1, Ordering::SeqCst);
    }

    /// Removes the mark of a buffer: every page of its unit that exists is final.
    pub fn end(&self, buffer: usize) {
        self.word(1 + buffer).store(0, Ordering::SeqCst);
    }

    /// Returns the unit to which a buffer was being written when the pager was killed.
    pub fn unfinished(&self, buffer: usize) -> Option<usize> {
        self.unit(1 + buffer)
    }

    /// Records that clones may have read zeros in a unit.
    pub fn give_up(&self, unit: usize) {
        self.word(0).store(unit as u64 + 1, Ordering::SeqCst);
    }

    /// Returns the unit for which the base was given up.
    pub fn given_up(&self) -> Option<usize> {
        self.unit(0)
    }
}
