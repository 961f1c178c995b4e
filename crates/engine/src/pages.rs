//! Sets of base pages of a region, such as the pages reported by a trace, sent in a round or received.

use std::sync::atomic::{AtomicU64, Ordering};

use thiserror::Error;

use crate::SLOTS;

/// Reason why bytes are not a set of pages of a region.
#[derive(Debug, Error, Clone, PartialEq, Eq)]
pub enum UnpackError {
    /// The bitmap cannot be decompressed.
    #[error("cannot decompress a set of pages: {0}")]
    Decompress(String),
    /// The set belongs to a region of another size.
    #[error("invalid set of pages: bitmap has {found} bytes, expected {expected} for {pages} pages")]
    Length {
        /// Size of the bitmap in bytes.
        found: usize,
        /// Expected size in bytes.
        expected: usize,
        /// Number of pages of the region.
        pages: usize,
    },
    /// The set contains pages beyond the end of the region.
    #[error("invalid set of pages: some pages are beyond the {0} pages of the region")]
    Beyond(usize),
}

const BITS: usize = u64::BITS as usize;

/// Set of base pages of a region, as a bitmap. Pages are counted from the start of the region.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageSet {
    words: Vec<u64>,
    pages: usize,
}

impl PageSet {
    /// Creates an empty set for a region of `pages` pages.
    pub fn new(pages: usize) -> Self {
        Self { words: vec![0; pages.div_ceil(BITS)], pages }
    }

    /// Creates a set of all pages of a region.
    pub fn full(pages: usize) -> Self {
        let mut set = Self::new(pages);
        set.insert(0, pages);
        set
    }

    /// Returns the number of pages of the region.
    pub fn pages(&self) -> usize {
        self.pages
    }

    /// Adds the pages `[start, end)`. Ignores pages beyond the end of the region.
    pub fn insert(&mut self, start: usize, end: usize) {
        self.each_word(start, end, |word, mask| *word |= mask);
    }

    /// Removes the pages `[start, end)`. Ignores pages beyond the end of the region.
    pub fn remove(&mut self, start: usize, end: usize) {
        self.each_word(start, end, |word, mask| *word &= !mask);
    }

    /// Serialises the set as a little-endian bitmap, compressed with Zstandard.
    pub fn pack(&self) -> Vec<u8> {
        let bitmap: Vec<u8> = self.words.iter().flat_map(|word| word.to_le_bytes()).collect();
        // The compression cannot fail: its buffer has sufficient capacity for incompressible data.
        zstd::bulk::compress(&bitmap, 1).unwrap_or_default()
    }

    /// Deserialises a set of pages of a region, as serialised by [`PageSet::pack`]. `pages` is the number of pages of
    /// the region, and limits the memory that is allocated.
    ///
    /// # Errors
    /// [`UnpackError`] if the bytes are not a set of pages of this region.
    pub fn unpack(bytes: &[u8], pages: usize) -> Result<Self, UnpackError> {
        let expected = pages.div_ceil(BITS) * 8;
        let mut bitmap = vec![0; expected];
        let found = zstd::bulk::decompress_to_buffer(bytes, &mut bitmap)
            .map_err(|error| UnpackError::Decompress(error.to_string()))?;
        if found != expected {
            return Err(UnpackError::Length { found, expected, pages });
        }
        let (words, _) = bitmap.as_chunks::<8>();
        let set = Self { words: words.iter().map(|word| u64::from_le_bytes(*word)).collect(), pages };
        let beyond = set.words.last().is_some_and(|last| last >> (pages % BITS) != 0 && !pages.is_multiple_of(BITS));
        if beyond { Err(UnpackError::Beyond(pages)) } else { Ok(set) }
    }

    fn each_word(&mut self, start: usize, end: usize, mut change: impl FnMut(&mut u64, u64)) {
        let end = end.min(self.pages);
        let mut at = start;
        while at < end {
            let (word, bit) = (at / BITS, at % BITS);
            let count = (BITS - bit).min(end - at);
            let mask = if count == BITS { u64::MAX } else { ((1 << count) - 1) << bit };
            change(&mut self.words[word], mask);
            at += count;
        }
    }

    /// Returns whether a page is in the set.
    pub fn contains(&self, page: usize) -> bool {
        page < self.pages && self.words[page / BITS] >> (page % BITS) & 1 == 1
    }

    /// Returns the number of pages in the set.
    pub fn count(&self) -> usize {
        self.words.iter().map(|word| word.count_ones() as usize).sum()
    }

    /// Returns whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// Removes all pages.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds all pages of another set for the same region.
    pub fn union(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, more)| *word |= more);
    }

    /// Removes all pages that are not in `other`, a set for the same region.
    pub fn intersect(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, mask)| *word &= mask);
    }

    /// Removes all pages of another set for the same region.
    pub fn subtract(&mut self, other: &Self) {
        self.words.iter_mut().zip(&other.words).for_each(|(word, less)| *word &= !less);
    }

    /// Returns the number of pages in the set for each 2 MiB unit of the region.
    pub fn unit_counts(&self) -> Vec<u16> {
        let words_per_unit = SLOTS / BITS;
        let ones = |words: &[u64]| words.iter().map(|word| word.count_ones()).sum::<u32>();
        self.words.chunks(words_per_unit).map(|words| u16::try_from(ones(words)).unwrap_or(u16::MAX)).collect()
    }

    /// Returns the runs of pages in the set, as (start, end).
    pub fn runs(&self) -> Runs<'_> {
        self.runs_in(0, self.pages)
    }

    /// Returns the runs of pages in the set within `[start, end)`.
    pub fn runs_in(&self, start: usize, end: usize) -> Runs<'_> {
        Runs { set: self, at: start, end: end.min(self.pages) }
    }

    /// Returns the first page from `from` on that is in the set if `present` is true, or that is not in the set
    /// otherwise.
    fn next(&self, from: usize, present: bool) -> Option<usize> {
        let mut word = from / BITS;
        let mut mask = u64::MAX << (from % BITS);
        while word < self.words.len() {
            let bits = if present { self.words[word] } else { !self.words[word] } & mask;
            if bits != 0 {
                let page = word * BITS + bits.trailing_zeros() as usize;
                return (page < self.pages).then_some(page);
            }
            word += 1;
            mask = u64::MAX;
        }
        None
    }
}

/// Iterator over the runs of a [`PageSet`].
#[derive(Debug)]
pub struct Runs<'a> {
    set: &'a PageSet,
    at: usize,
    end: usize,
}

impl Iterator for Runs<'_> {
    type Item = (usize, usize);

    fn next(&mut self) -> Option<Self::Item> {
        let start = self.set.next(self.at, true).filter(|&start| start < self.end)?;
        let end = self.set.next(start, false).unwrap_or(self.set.pages).min(self.end);
        self.at = end;
        Some((start, end))
    }
}

/// Returns the words of 64 bits that contain `[first, end)`, as (index of the word, mask of its bits in the range).
pub(crate) fn masks(first: usize, end: usize) -> impl Iterator<Item = (usize, u64)> {
    (first / BITS..end.div_ceil(BITS)).filter(move |_| first < end).map(move |index| {
        let head = u64::MAX << (first.max(index * BITS) - index * BITS);
        let tail = u64::MAX >> ((index + 1) * BITS - end.min((index + 1) * BITS));
        (index, head & tail)
    })
}

/// Bitmap with atomic operations on its bits.
#[derive(Debug)]
pub(crate) struct AtomicBits(Vec<AtomicU64>);

impl AtomicBits {
    pub(crate) fn new(bits: usize) -> Self {
        Self((0..bits.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect())
    }

    /// Sets a bit. Returns its previous value.
    pub(crate) fn set(&self, bit: usize) -> bool {
        let mask = 1 << (bit % BITS);
        self.0[bit / BITS].fetch_or(mask, Ordering::AcqRel) & mask != 0
    }

    /// Sets all bits of `[first, end)`. Returns false, and changes none of them, if any of them is set.
    pub(crate) fn set_run(&self, first: usize, end: usize) -> bool {
        for (index, mask) in masks(first, end) {
            let before = self.0[index].fetch_or(mask, Ordering::AcqRel) & mask;
            if before != 0 {
                self.0[index].fetch_and(!(mask & !before), Ordering::AcqRel);
                self.take_run(first, (index * BITS).max(first));
                return false;
            }
        }
        true
    }

    /// Clears all bits of `[first, end)`.
    pub(crate) fn take_run(&self, first: usize, end: usize) {
        for (index, mask) in masks(first, end) {
            self.0[index].fetch_and(!mask, Ordering::AcqRel);
        }
    }

    pub(crate) fn get(&self, bit: usize) -> bool {
        self.0[bit / BITS].load(Ordering::Acquire) >> (bit % BITS) & 1 == 1
    }

    /// Clears a bit. Returns its previous value.
    pub(crate) fn take(&self, bit: usize) -> bool {
        let mask = 1 << (bit % BITS);
        self.0[bit / BITS].fetch_and(!mask, Ordering::AcqRel) & mask != 0
    }

    /// Returns the first set bit from `from` on, or `None`.
    pub(crate) fn next(&self, from: usize) -> Option<usize> {
        let mut mask = u64::MAX << (from % BITS);
        for (index, word) in self.0.iter().enumerate().skip(from / BITS) {
            let bits = word.load(Ordering::Acquire) & mask;
            if bits != 0 {
                return Some(index * BITS + bits.trailing_zeros() as usize);
            }
            mask = u64::MAX;
        }
        None
    }
}

impl From<&PageSet> for AtomicBits {
    fn from(set: &PageSet) -> Self {
        Self(set.words.iter().map(|&word| AtomicU64::new(word)).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(
            pages in 1usize..1500,
            changes in prop::collection::vec((any::<bool>(), 0usize..1600, 0usize..700), 0..20),
        ) {
            let (mut set, mut model) = (PageSet::new(pages), BTreeSet::new());
            for (add, start, len) in changes {
                let range = start..(start + len).min(pages);
                if add {
                    set.insert(start, start + len);
                    model.extend(range);
                } else {
                    set.remove(start, start + len);
                    model.retain(|page| !range.contains(page));
                }
            }
            prop_assert_eq!(set.count(), model.len());
            prop_assert_eq!(set.is_empty(), model.is_empty());
            prop_assert_eq!(set.runs().flat_map(|(start, end)| start..end).collect::<BTreeSet<_>>(), model.clone());
            prop_assert!(set.runs().zip(set.runs().skip(1)).all(|(a, b)| a.1 < b.0), "runs are maximal");
            let within: usize = set.runs_in(3, 900).map(|(start, end)| end - start).sum();
            prop_assert_eq!(within, model.range(3..900).count());
            let units = set.unit_counts();
            prop_assert_eq!(units.iter().map(|&count| usize::from(count)).sum::<usize>(), model.len());
            prop_assert_eq!(PageSet::unpack(&set.pack(), pages), Ok(set.clone()));
        }
    }

    #[test]
    fn run_of_bits_is_set_as_a_whole_or_not_at_all() {
        let bits = AtomicBits::new(300);
        assert!(bits.set_run(60, 200));
        assert!((0..300).all(|bit| bits.get(bit) == (60..200).contains(&bit)));
        // The last bit of this run is already set.
        assert!(!bits.set_run(5, 61));
        assert!(!bits.set_run(199, 300));
        assert!((0..300).all(|bit| bits.get(bit) == (60..200).contains(&bit)));
        bits.take_run(64, 128);
        assert!((0..300).all(|bit| bits.get(bit) == ((60..64).contains(&bit) || (128..200).contains(&bit))));
        assert!(bits.set_run(64, 128) && bits.set_run(256, 256) && bits.set_run(299, 300));
    }

    #[test]
    fn bytes_of_another_region_are_rejected() {
        let packed = PageSet::full(1000).pack();
        assert_eq!(
            PageSet::unpack(&packed, 960),
            Err(UnpackError::Decompress("Destination buffer is too small".into()))
        );
        let (found, expected) = (128, 136);
        assert_eq!(PageSet::unpack(&packed, 1025), Err(UnpackError::Length { found, expected, pages: 1025 }));
        assert_eq!(PageSet::unpack(&packed, 999), Err(UnpackError::Beyond(999)));
        assert!(matches!(PageSet::unpack(b"noise", 1000), Err(UnpackError::Decompress(_))));
        assert!(matches!(PageSet::unpack(&packed[..packed.len() - 1], 1000), Err(UnpackError::Decompress(_))));
    }

    #[test]
    fn unions_and_differences() {
        let (mut a, mut b) = (PageSet::new(200), PageSet::new(200));
        a.insert(10, 100);
        b.insert(90, 150);
        a.union(&b);
        assert_eq!(a.count(), 140);
        a.subtract(&b);
        assert_eq!(a.runs().collect::<Vec<_>>(), [(10, 90)]);
        b.insert(0, 12);
        a.intersect(&b);
        assert_eq!(a.runs().collect::<Vec<_>>(), [(10, 12)]);
        a.insert(20, 90);
        assert!(a.contains(89) && !a.contains(90) && !a.contains(5000));
    }
}
