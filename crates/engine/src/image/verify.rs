//! Whether every byte of an image is right: every storage block, and every page against its signature.

use xxhash_rust::xxh3::xxh3_64;

use super::contents::PageReader;
use super::format::{ImageError, PageEntry};
use super::reader::{Chain, Image};
use crate::block::Class;

/// A page that is not what its signature says.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Page, counted over all regions; None: nothing of a storage block could be used.
    pub page: Option<usize>,
    /// What is wrong.
    pub message: String,
}

/// Pages that stand in the image itself, in the order of its storage blocks: (entry, page).
pub fn stored_pages(image: &Image) -> Vec<(PageEntry, usize)> {
    let own = |entry: &PageEntry| matches!(entry.class(), Some(Class::Data | Class::SameAs)) && !entry.in_parent();
    let mut pages: Vec<_> = image
        .page_map()
        .iter()
        .enumerate()
        .filter(|(_, entry)| own(entry))
        .map(|(page, entry)| (*entry, page))
        .collect();
    pages.sort_unstable_by_key(|(entry, page)| (entry.block.get(), entry.slot.get(), *page));
    pages
}

/// Reads all pages of `part` (of [`stored_pages`]) and compares them with their signatures; at most `most` findings.
pub fn verify(chain: &Chain, part: &[(PageEntry, usize)], most: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut reader = PageReader::new(chain);
    let mut failed_block = None;
    for (entry, page) in part {
        if findings.len() >= most {
            break;
        }
        if failed_block == Some(entry.block.get()) {
            continue;
        }
        match reader.stored(0, entry) {
            Ok(contents) if xxh3_64(contents) == entry.signature.get() => {}
            Ok(_) => findings.push(Finding { page: Some(*page), message: "it is not what its signature says".into() }),
            Err(error) => {
                failed_block = Some(entry.block.get());
                findings.push(Finding { page: Some(*page), message: error.to_string() });
            }
        }
    }
    findings
}

/// Storage blocks that no page points into are read too: a flipped byte of theirs is damage all the same.
pub fn verify_unused(image: &Image, used: &[(PageEntry, usize)]) -> Vec<Finding> {
    let mut seen = vec![false; image.blocks().len()];
    for (entry, _) in used {
        seen[entry.block.get() as usize] = true;
    }
    let check = |number: u32| -> Result<(), ImageError> {
        let block = image.read_block(number)?;
        let mut contents = Vec::new();
        (0..block.head().page_blocks.len()).try_for_each(|index| block.unpack(index, &mut contents))
    };
    (0u32..)
        .zip(&seen)
        .filter(|(_, seen)| !**seen)
        .filter_map(|(number, _)| check(number).err())
        .map(|error| Finding { page: None, message: error.to_string() })
        .collect()
}
