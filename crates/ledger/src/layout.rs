//! Layout of a ledger's memory, and access to it.

use pageferry_engine::checksum::checksum;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use zerocopy::IntoBytes;

use super::LedgerError;
use super::options::{Options, part};
use super::page::{WORDS, Words, mix};
use pageferry_engine::mapping::Mapping;
use pageferry_engine::{LARGE_PAGE, SMALL_PAGE};

const MAGIC: u64 = u64::from_le_bytes(*b"PFLEDGER");
const VERSION: u64 = 2;
/// Number of header words before the checksum: magic, layout version, length in bytes, number of body pages, and
/// options. The checksum of these words follows.
const HEADER: usize = 4 + Options::WORDS;

/// Memory of a ledger, and the positions of its parts.
pub(super) struct Layout {
    mapping: Arc<Mapping>,
    pub(super) options: Options,
    /// Number of body pages.
    pub(super) pages: usize,
}

impl fmt::Debug for Layout {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Layout").field("options", &self.options).field("pages", &self.pages).finish()
    }
}

impl Layout {
    pub(super) fn new(mapping: Arc<Mapping>, options: &Options) -> Result<Self, LedgerError> {
        let threads = options.threads;
        let room = mapping.pages().saturating_sub(1 + threads);
        // One table page describes WORDS body pages.
        let pages = room - room.div_ceil(WORDS + 1);
        if pages < threads {
            return Err(LedgerError::TooSmall { length: mapping.len(), threads });
        }
        Ok(Self { mapping, options: options.clone(), pages })
    }

    /// Reads the layout of an existing ledger.
    pub(super) fn read(mapping: Arc<Mapping>) -> Result<Self, LedgerError> {
        let found = header(&mapping)?;
        let words = found[4..].try_into().map_err(|_| LedgerError::NoLedger("truncated header"))?;
        let layout = Self::new(Arc::clone(&mapping), &Options::from_words(words)?)?;
        if found != layout.header_words() {
            return Err(LedgerError::NoLedger("the header belongs to memory of another size"));
        }
        Ok(layout)
    }

    /// Returns whether the header in memory is unchanged.
    pub(super) fn header_intact(&self) -> bool {
        header(&self.mapping).is_ok_and(|found| found == self.header_words())
    }

    pub(super) fn write_header(&self) {
        let header = self.header_words();
        let words = self.page(0);
        for (word, value) in words[1..].iter().zip(&header[1..]) {
            word.store(*value, Ordering::Relaxed);
        }
        words[HEADER].store(checksum(header.as_bytes()), Ordering::Relaxed);
        words[0].store(MAGIC, Ordering::Release);
    }

    fn header_words(&self) -> [u64; HEADER] {
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&[MAGIC, VERSION, self.mapping.len() as u64, self.pages as u64]);
        header[4..].copy_from_slice(&self.options.to_words());
        header
    }

    /// Returns a page of the mapping as words.
    fn page(&self, page: usize) -> &[AtomicU64] {
        page_of(&self.mapping, page)
    }

    fn table_page(&self) -> usize {
        1 + self.options.threads
    }

    fn body_page(&self) -> usize {
        self.table_page() + self.pages.div_ceil(WORDS)
    }

    pub(super) fn counters(&self, partition: usize) -> Counters<'_> {
        assert!(partition < self.options.threads, "partition {partition} of {}", self.options.threads);
        Counters { words: self.page(1 + partition), tag: mix(MAGIC ^ mix(self.options.seed ^ partition as u64)) }
    }

    /// Returns the table entries from that of body page `number` to the end of its table page.
    pub(super) fn entries(&self, number: usize) -> &[AtomicU64] {
        assert!(number < self.pages, "body page {number} of {}", self.pages);
        &self.page(self.table_page() + number / WORDS)[number % WORDS..]
    }

    /// Returns the table entry of a body page.
    pub(super) fn entry(&self, number: usize) -> &AtomicU64 {
        &self.entries(number)[0]
    }

    /// Returns a body page.
    pub(super) fn body(&self, number: usize) -> &[AtomicU64] {
        assert!(number < self.pages, "body page {number} of {}", self.pages);
        self.page(self.body_page() + number)
    }

    pub(super) fn body_offset(&self, number: usize) -> usize {
        (self.body_page() + number) * SMALL_PAGE
    }

    /// Returns the body pages of a partition.
    pub(super) fn partition(&self, partition: usize) -> Range<usize> {
        let threads = self.options.threads;
        self.pages * partition / threads..self.pages * (partition + 1) / threads
    }

    /// Returns the number of filled pages of a partition. The filled pages are the first pages of the partition.
    pub(super) fn filled(&self, partition: usize) -> usize {
        part(self.partition(partition).len(), self.options.fill)
    }

    /// Forbids huge pages in all 2 MiB units except about `fraction` of them, which are evenly spread.
    ///
    /// The memory must not have been accessed: shmem honours MADV_NOHUGEPAGE of the mapping through which a page is
    /// allocated.
    pub(super) fn forbid_large_pages(&self, fraction: f64) -> Result<(), LedgerError> {
        if !(0.0..=1.0).contains(&fraction) {
            let message = format!("invalid huge-page fraction {fraction}: expected 0 to 1");
            return Err(LedgerError::BadOption(message));
        }
        for unit in 0..self.mapping.len().div_ceil(LARGE_PAGE) {
            if part(unit + 1, fraction) == part(unit, fraction) {
                let start = unit * LARGE_PAGE;
                let length = LARGE_PAGE.min(self.mapping.len() - start);
                // SAFETY: the range lies within our mapping; the advice does not change contents.
                let result =
                    unsafe { libc::madvise(self.mapping.base().add(start).cast(), length, libc::MADV_NOHUGEPAGE) };
                pageferry_engine::uapi::check(result)?;
            }
        }
        Ok(())
    }
}

/// Counters of one partition, on a separate page.
pub(super) struct Counters<'a> {
    words: &'a [AtomicU64],
    tag: u64,
}

impl Counters<'_> {
    pub(super) fn reset(&self) {
        for (word, value) in self.words.iter().zip([self.tag, 0, 0, 0, 0]) {
            word.store(value, Ordering::Relaxed);
        }
    }

    /// Returns whether the page has the tag of this partition, and records a first damaged page if and only if it
    /// counts damaged pages.
    pub(super) fn intact(&self) -> bool {
        let tagged = self.words[0].load(Ordering::Relaxed) == self.tag;
        tagged && (self.bad() > 0) == self.first_bad().is_some()
    }

    pub(super) fn writes(&self) -> u64 {
        self.words[1].load(Ordering::Relaxed)
    }

    /// Returns the sum of the hashes of the partition's table entries.
    pub(super) fn table(&self) -> u64 {
        self.words[4].load(Ordering::Relaxed)
    }

    /// Completes an operation that has changed the sum of the table by `change`. Only the thread of the partition calls
    /// this function, so load and store need not be one atomic operation.
    pub(super) fn count_write(&self, change: u64) {
        self.words[4].store(self.table().wrapping_add(change), Ordering::Relaxed);
        self.words[1].store(self.writes().wrapping_add(1), Ordering::Release);
    }

    /// Returns the number of damaged pages that operations have found.
    pub(super) fn bad(&self) -> u64 {
        self.words[2].load(Ordering::Relaxed)
    }

    /// Returns the index of the first damaged page that an operation has found, or `None`.
    pub(super) fn first_bad(&self) -> Option<u64> {
        self.words[3].load(Ordering::Relaxed).checked_sub(1)
    }

    pub(super) fn count_bad(&self, number: usize) {
        if self.bad() == 0 {
            self.words[3].store(number as u64 + 1, Ordering::Relaxed);
        }
        self.words[2].store(self.bad().wrapping_add(1), Ordering::Relaxed);
    }

    /// Returns all counters, for hashing.
    pub(super) fn content(&self) -> [u64; 5] {
        std::array::from_fn(|word| self.words[word].load(Ordering::Relaxed))
    }
}

/// Copies the contents of a page to `words`.
pub(super) fn load(page: &[AtomicU64], words: &mut Words) {
    for (word, cell) in words.iter_mut().zip(page) {
        *word = cell.load(Ordering::Relaxed);
    }
}

/// Copies `words` to a page.
pub(super) fn store(page: &[AtomicU64], words: &Words) {
    for (cell, word) in page.iter().zip(words) {
        cell.store(*word, Ordering::Relaxed);
    }
}

fn page_of(mapping: &Mapping, page: usize) -> &[AtomicU64] {
    // SAFETY: `Mapping::page` returns a page-aligned pointer to SMALL_PAGE bytes, which stay mapped, readable and
    // writable for the lifetime of the mapping. Other threads, processes and the kernel may write at any time: this
    // module only uses atomics, for which every bit pattern is valid.
    unsafe { std::slice::from_raw_parts(mapping.page(page).cast::<AtomicU64>(), WORDS) }
}

/// Reads the header, and checks magic, layout version and checksum.
fn header(mapping: &Mapping) -> Result<[u64; HEADER], LedgerError> {
    let words = page_of(mapping, 0);
    let header: [u64; HEADER] = std::array::from_fn(|word| words[word].load(Ordering::Acquire));
    if header[0] != MAGIC {
        Err(LedgerError::NoLedger("invalid magic"))
    } else if words[HEADER].load(Ordering::Relaxed) != checksum(header.as_bytes()) {
        Err(LedgerError::NoLedger("invalid header checksum"))
    } else if header[1] != VERSION {
        Err(LedgerError::NoLedger("unsupported layout version"))
    } else {
        Ok(header)
    }
}
