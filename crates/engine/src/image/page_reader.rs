//! Reader of page contents, from any image of a chain.

use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, IntoBytes};

use super::format::{ImageError, PageEntry};
use super::reader::{Chain, StoredBlock};
use crate::SMALL_PAGE;
use crate::block::{BlockError, Class};

/// Page reader that caches the storage block and the page block that it has read last.
#[derive(Debug)]
pub struct PageReader<'a> {
    chain: &'a Chain,
    block: Option<(usize, StoredBlock)>,
    unpacked: Option<(usize, u32, usize)>,
    contents: Vec<u8>,
}

impl<'a> PageReader<'a> {
    /// Creates a reader for the pages of a chain.
    pub fn new(chain: &'a Chain) -> Self {
        Self { chain, block: None, unpacked: None, contents: Vec::new() }
    }

    /// Reads a page, counted over all regions, into `out` (4 KiB). Absent pages read as zeros.
    ///
    /// # Errors
    /// If there is no such page, or if its contents cannot be read or verified.
    pub fn read(&mut self, page: usize, out: &mut [u8]) -> Result<(), ImageError> {
        let (image, entry) = self.chain.find(page)?;
        match entry.class() {
            Some(Class::Pattern) => fill(out, entry.signature.get()),
            Some(Class::Data | Class::SameAs) => out.copy_from_slice(self.stored(image, &entry)?),
            _ => out.fill(0),
        }
        Ok(())
    }

    /// Returns the contents (4 KiB) to which `entry` refers in one image of the chain. `image` is the index of the
    /// image in the chain.
    ///
    /// # Errors
    /// If the contents cannot be read or verified.
    pub fn stored(&mut self, image: usize, entry: &PageEntry) -> Result<&[u8], ImageError> {
        let number = entry.block.get();
        let kept = self.block.take().filter(|(of, block)| (*of, block.number()) == (image, number));
        let kept = match kept {
            Some(kept) => kept,
            None => {
                self.unpacked = None;
                (image, self.chain.images()[image].read_block(number)?)
            }
        };
        let (_, block) = self.block.insert(kept);
        let (index, within) = block.locate(usize::from(entry.slot.get()));
        if self.unpacked != Some((image, number, index)) {
            self.unpacked = None;
            block.unpack(index, &mut self.contents)?;
            self.unpacked = Some((image, number, index));
        }
        let range = within * SMALL_PAGE..(within + 1) * SMALL_PAGE;
        let wrong = || {
            block.wrong(BlockError::Field {
                field: "number of pages",
                value: block.slots() as u64,
                allowed: "at least the slots that the page map refers to",
            })
        };
        self.contents.get(range).ok_or_else(wrong)
    }
}

/// Fills a buffer with a repeated 64-bit word.
pub fn fill(out: &mut [u8], word: u64) {
    for chunk in out.chunks_exact_mut(8) {
        chunk.copy_from_slice(U64::new(word).as_bytes());
    }
}

/// Returns the 64-bit word that fills a page by repetition, or `None` for other contents. The word of a zero page is 0.
pub fn pattern(page: &[u8]) -> Option<u64> {
    let words = <[U64]>::ref_from_bytes(page).ok()?;
    let first = *words.first()?;
    words.iter().all(|word| *word == first).then_some(first.get())
}

/// Returns the pages of `[first, first + count)` that differ between two chains, as runs (start, end). Absent pages
/// read as zeros.
///
/// # Errors
/// If a page cannot be read or verified.
pub fn differences(a: &Chain, b: &Chain, first: usize, count: usize) -> Result<Vec<(usize, usize)>, ImageError> {
    let (mut left, mut right) = (PageReader::new(a), PageReader::new(b));
    let (mut ours, mut theirs) = (vec![0; SMALL_PAGE], vec![0; SMALL_PAGE]);
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for page in first..first + count {
        let ((_, one), (_, other)) = (a.find(page)?, b.find(page)?);
        let plain = |entry: &PageEntry| matches!(entry.class(), Some(Class::Absent | Class::Zero | Class::Pattern));
        // The entries of plain pages determine their contents. The contents of other pages are compared, because
        // signatures can collide.
        let same = if plain(&one) && plain(&other) {
            one.signature == other.signature
        } else {
            left.read(page, &mut ours)?;
            right.read(page, &mut theirs)?;
            ours == theirs
        };
        if !same {
            match runs.last_mut() {
                Some((_, end)) if *end == page => *end += 1,
                _ => runs.push((page, page + 1)),
            }
        }
    }
    Ok(runs)
}
