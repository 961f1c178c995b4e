//! Image of selected pages, which are appended while the workload may write to them. A page that is written while it is
//! copied has an invalid copy: the caller must find these pages and must not use their copies. Duplicates are stored
//! once. Pages that are not appended refer to the parent image.

use std::io;
use std::os::fd::OwnedFd;

use super::dedup_index::DedupIndex;
use super::flatten::Copier;
use super::format::{FLAG_IN_PARENT, ImageError, PageEntry};
use super::page_reader::pattern;
use super::reader::Chain;
use super::writer::{Finished, ImageWriter, Sizes};
use crate::SMALL_PAGE;
use crate::block::{Builder, Class, Codec};
use crate::checksum::checksum;
use crate::mapping::Mapping;
use crate::pages::PageSet;

/// Image to which pages are appended.
#[derive(Debug)]
pub struct PageAppender {
    copier: Copier<ImageWriter>,
    /// Index of the region whose pages are in the current storage block.
    region: usize,
    /// Index of the first page of each region, counted over all regions; then the total number of pages.
    bases: Vec<usize>,
    map: Vec<PageEntry>,
    known: DedupIndex,
}

impl PageAppender {
    /// Creates an image in an empty file. `regions` contains the number of pages of each region.
    ///
    /// # Errors
    /// If the file cannot be written, or if getrandom(2) fails.
    pub fn new(file: OwnedFd, id: [u8; 16], codec: Codec, sizes: Sizes, regions: &[usize]) -> io::Result<Self> {
        let writer = ImageWriter::new(file, id, sizes)?;
        let mut bases = vec![0];
        for pages in regions {
            bases.push(bases[bases.len() - 1] + pages);
        }
        let map = vec![PageEntry::plain(Class::Absent, 0); bases[bases.len() - 1]];
        let builder = Builder::new(codec, sizes.page_block, sizes.storage_block);
        let known = DedupIndex::new()?;
        Ok(Self { copier: Copier { writer, builder, block: 0 }, region: 0, bases, map, known })
    }

    /// Appends those pages of `pages` that are present in a region. Returns the set of appended pages.
    ///
    /// # Errors
    /// `InvalidInput` if `memory` or `pages` differs in size from the region; otherwise the error of lseek(2) or of
    /// writing the image.
    pub fn add(&mut self, region: usize, memory: &Mapping, pages: &PageSet) -> Result<PageSet, ImageError> {
        let count = self.bases.get(region + 1).map_or(0, |end| end - self.bases[region]);
        if count != pages.pages() || memory.pages() != count {
            let words = "cannot add pages: the region does not match the image";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, words).into());
        }
        if region != self.region {
            self.copier.flush(self.region)?;
            self.region = region;
        }
        let mut added = PageSet::new(count);
        let mut contents = [0; SMALL_PAGE];
        for (first, end) in pages.runs() {
            // Skip holes: reading a hole would allocate a page.
            for (start, stop) in memory.data_within(first * SMALL_PAGE, end * SMALL_PAGE)? {
                let (start, stop) = ((start / SMALL_PAGE).max(first), (stop / SMALL_PAGE).min(end));
                for page in start..stop {
                    // SAFETY: the page lies within the mapping, by the check above. If the workload writes to the page
                    // concurrently, the copy may be torn; the caller does not use such copies.
                    unsafe { std::ptr::copy_nonoverlapping(memory.page(page), contents.as_mut_ptr(), SMALL_PAGE) };
                    self.map[self.bases[region] + page] = self.entry(region, page, &contents)?;
                }
                added.insert(start, stop);
            }
        }
        Ok(added)
    }

    fn entry(&mut self, region: usize, page: usize, contents: &[u8]) -> Result<PageEntry, ImageError> {
        match pattern(contents) {
            Some(0) => Ok(PageEntry::plain(Class::Zero, 0)),
            Some(word) => Ok(PageEntry::plain(Class::Pattern, word)),
            None => {
                let (signature, hash) = (checksum(contents), self.known.hash(contents));
                if let Some((block, slot)) = self.known.place(hash) {
                    return Ok(PageEntry::stored(Class::SameAs, signature, block, slot));
                }
                let (block, slot) = self.copier.push(region, page, contents)?;
                self.known.insert(hash, (block, slot));
                Ok(PageEntry::stored(Class::Data, signature, block, slot))
            }
        }
    }

    /// Completes the image: adds `sections`, writes the index and syncs the file. Pages that were not added refer to
    /// `parent`; without a parent, they are absent.
    ///
    /// # Errors
    /// If the parent lacks a page, or if the image cannot be written.
    pub fn finish(mut self, parent: Option<&Chain>, sections: &[(u32, Vec<u8>)]) -> Result<Finished, ImageError> {
        self.copier.flush(self.region)?;
        if let Some(parent) = parent {
            for (page, entry) in self.map.iter_mut().enumerate() {
                if entry.class() == Some(Class::Absent) {
                    *entry = parent.find(page)?.1;
                    if matches!(entry.class(), Some(Class::Data | Class::SameAs)) {
                        entry.flags |= FLAG_IN_PARENT;
                    }
                }
            }
        }
        let mut writer = self.copier.writer;
        for (kind, contents) in sections {
            writer.section(*kind, contents)?;
        }
        Ok(writer.finish(self.bases.len() - 1, &self.map)?)
    }
}
