//! Flattening of a chain into a single image.

use std::borrow::BorrowMut;
use std::collections::HashMap;

use super::format::{ImageError, PageEntry};
use super::page_reader::PageReader;
use super::reader::Chain;
use super::writer::{ImageWriter, Sizes};
use crate::block::{Builder, Class, Codec};

/// Copies all stored pages of a chain into a new image. Returns the page map of the new image.
///
/// `regions` contains the number of pages of each region. The pages of a region are copied in the order in which the
/// chain stores them, oldest image first, so that pages that were written together stay adjacent. Contents to which
/// several pages refer are copied once.
///
/// # Errors
/// If a page cannot be read or verified, or if the image cannot be written.
pub fn flatten(
    chain: &Chain,
    writer: &mut ImageWriter,
    codec: Codec,
    sizes: Sizes,
    regions: &[usize],
) -> Result<Vec<PageEntry>, ImageError> {
    let total = regions.iter().sum();
    let mut map = Vec::with_capacity(total);
    let mut stored = Vec::new();
    for page in 0..total {
        let (image, entry) = chain.find(page)?;
        if matches!(entry.class(), Some(Class::Data | Class::SameAs)) {
            stored.push((image, entry, page));
        }
        map.push(PageEntry { flags: 0, ..entry });
    }
    stored.sort_unstable_by_key(|(image, entry, page)| {
        (region_of(regions, *page).0, std::cmp::Reverse(*image), entry.block.get(), entry.slot.get(), *page)
    });
    let mut copier = Copier { writer, builder: Builder::new(codec, sizes.page_block, sizes.storage_block), block: 0 };
    let mut reader = PageReader::new(chain);
    let mut places: HashMap<(usize, u32, u16), (u32, u16)> = HashMap::new();
    let mut current = 0;
    for (image, entry, page) in stored {
        let (region, within) = region_of(regions, page);
        if region != current {
            copier.flush(current)?;
            current = region;
        }
        let key = (image, entry.block.get(), entry.slot.get());
        let known = places.get(&key).copied();
        let (block, slot) = match known {
            Some(place) => place,
            None => *places.entry(key).or_insert(copier.push(region, within, reader.stored(image, &entry)?)?),
        };
        let class = if known.is_some() { Class::SameAs } else { Class::Data };
        map[page] = PageEntry::stored(class, entry.signature.get(), block, slot);
    }
    copier.flush(current)?;
    Ok(map)
}

/// Copier of pages into the storage blocks of an image, one region at a time.
#[derive(Debug)]
pub(super) struct Copier<W> {
    pub(super) writer: W,
    pub(super) builder: Builder,
    /// Number of the storage block being filled.
    pub(super) block: u32,
}

impl<W: BorrowMut<ImageWriter>> Copier<W> {
    /// Adds a page of `region`. Returns its storage block and slot.
    pub(super) fn push(&mut self, region: usize, page: usize, contents: &[u8]) -> Result<(u32, u16), ImageError> {
        if self.builder.is_full() {
            self.flush(region)?;
        }
        let slot = self.builder.push_data(page, contents);
        Ok((self.block, u16::try_from(slot).unwrap_or(u16::MAX)))
    }

    /// Writes the current storage block, which holds pages of `region`, unless it is empty.
    pub(super) fn flush(&mut self, region: usize) -> Result<(), ImageError> {
        if !self.builder.is_empty() {
            let region = u32::try_from(region).unwrap_or(u32::MAX);
            self.block = self.writer.borrow_mut().append(&self.builder.build(region, 0, u64::from(self.block)))? + 1;
        }
        Ok(())
    }
}

/// Converts a page index that is counted over all regions to the index of a region and a page index within that region.
fn region_of(regions: &[usize], page: usize) -> (usize, usize) {
    let mut rest = page;
    for (region, pages) in regions.iter().enumerate() {
        if rest < *pages {
            return (region, rest);
        }
        rest -= pages;
    }
    (regions.len(), rest)
}
