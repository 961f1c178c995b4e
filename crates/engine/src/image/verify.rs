//! Verification of an image: every storage block, and every page against its signature.

use super::format::{ImageError, PageEntry};
use super::page_reader::PageReader;
use super::reader::{Chain, Image};
use crate::block::Class;
use crate::checksum::checksum;

/// Damage found in an image.
#[derive(Debug, PartialEq, Eq)]
pub struct Finding {
    /// Damaged page, counted over all regions; `None` for a storage block to which no page refers.
    pub page: Option<usize>,
    /// Description of the damage.
    pub message: String,
}

/// Returns the pages whose contents are stored in `image` itself rather than in a parent, as (entry, page), in the
/// order of their storage blocks.
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

/// Compares the contents of pages with their signatures. `part` is a slice of the [`stored_pages`] of the nearest
/// image. Returns up to `max` findings; a storage block that cannot be read or verified yields a single finding.
pub fn verify(chain: &Chain, part: &[(PageEntry, usize)], max: usize) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut reader = PageReader::new(chain);
    let mut failed_block = None;
    for (entry, page) in part {
        if findings.len() >= max {
            break;
        }
        if failed_block == Some(entry.block.get()) {
            continue;
        }
        match reader.stored(0, entry) {
            Ok(contents) if checksum(contents) == entry.signature.get() => {}
            Ok(_) => {
                findings.push(Finding { page: Some(*page), message: "contents do not match the signature".into() })
            }
            Err(error) => {
                failed_block = Some(entry.block.get());
                findings.push(Finding { page: Some(*page), message: error.to_string() });
            }
        }
    }
    findings
}

/// Verifies the storage blocks to which no page of `used` refers, because any changed byte of an image counts as
/// damage. Returns one finding per damaged block.
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
