//! Chosen pages of memory into an image, while the workload may write to them: whoever uses the image must know which
//! pages were not written meanwhile. Equal pages are stored once. All other pages are where the parent image has them.

use std::io;
use std::os::fd::OwnedFd;

use xxhash_rust::xxh3::xxh3_64;

use super::contents::pattern;
use super::flatten::Copier;
use super::format::{FLAG_IN_PARENT, ImageError, PageEntry};
use super::known::KnownPages;
use super::reader::Chain;
use super::writer::{Finished, ImageWriter, Sizes};
use crate::SMALL_PAGE;
use crate::block::{Builder, Class, Codec};
use crate::mapping::Mapping;
use crate::pages::PageSet;

/// An image to which pages are added.
#[derive(Debug)]
pub struct PageStore {
    copier: Copier<ImageWriter>,
    /// Region that the open storage block is of.
    region: usize,
    /// Number of the first page of each region, and of the page after the last region.
    bases: Vec<usize>,
    map: Vec<PageEntry>,
    known: KnownPages,
}

impl PageStore {
    /// Begins an image in an empty file, for regions of so many pages.
    pub fn new(file: OwnedFd, id: [u8; 16], codec: Codec, sizes: Sizes, regions: &[usize]) -> io::Result<Self> {
        let writer = ImageWriter::new(file, id, sizes)?;
        let mut bases = vec![0];
        for pages in regions {
            bases.push(bases[bases.len() - 1] + pages);
        }
        let map = vec![PageEntry::plain(Class::Absent, 0); bases[bases.len() - 1]];
        let builder = Builder::new(codec, sizes.page_block, sizes.storage_block);
        let known = KnownPages::new()?;
        Ok(Self { copier: Copier { writer, builder, block: 0 }, region: 0, bases, map, known })
    }

    /// Adds those pages of a region that are in memory; returns which they are.
    ///
    /// # Errors
    /// What writing the image meets; InvalidInput for pages that the image has no place for.
    pub fn add(&mut self, region: usize, memory: &Mapping, pages: &PageSet) -> Result<PageSet, ImageError> {
        let count = self.bases.get(region + 1).map_or(0, |end| end - self.bases[region]);
        if count != pages.pages() || memory.pages() != count {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the regions do not match").into());
        }
        if region != self.region {
            self.copier.flush(self.region)?;
            self.region = region;
        }
        let mut added = PageSet::new(count);
        let mut contents = [0; SMALL_PAGE];
        for (first, end) in pages.runs() {
            // Holes are not read: that would fill them.
            for (start, stop) in memory.data_within(first * SMALL_PAGE, end * SMALL_PAGE)? {
                let (start, stop) = ((start / SMALL_PAGE).max(first), (stop / SMALL_PAGE).min(end));
                for page in start..stop {
                    // SAFETY: within the mapping, by the check above. The workload may write to it at the same time:
                    // then the copy is of no use to anybody, and is known to be.
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
                let (signature, hash) = (xxh3_64(contents), self.known.hash(contents));
                if let Some((block, slot)) = self.known.place(hash) {
                    return Ok(PageEntry::stored(Class::SameAs, signature, block, slot));
                }
                let (block, slot) = self.copier.push(region, page, contents)?;
                self.known.insert(hash, (block, slot));
                Ok(PageEntry::stored(Class::Data, signature, block, slot))
            }
        }
    }

    /// Adds sections, and what `parent` says of all pages that were not added; writes the index and syncs.
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
