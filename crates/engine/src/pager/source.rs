//! Where contents come from: storage blocks of images, or a peer. One place answers for both what is missing of a
//! range; how it gets into memory is the same for both ([`Memory::install`]).

use std::sync::Arc;

use super::blocks::{Blocks, Fetched, Number};
use super::memory::{LoadError, Memory, Scratch};
use super::peer::Peer;
use crate::SMALL_PAGE;
use crate::block::{BlockError, Class, Head};
use crate::image::{ImageError, PageEntry, StoredBlock, fill};
use crate::placer::PlaceError;

/// Pages of zeros that are installed at a time.
const ZEROS: usize = 512;

/// Where contents come from.
#[derive(Debug)]
pub enum Source {
    /// Images: what is asked for is read.
    Images(Blocks),
    /// A peer: what is asked for comes later, among what nobody has asked for.
    Peer(Peer),
}

/// What has become of the pages that were to be brought.
#[derive(Debug)]
pub enum Brought {
    /// They are in memory.
    All,
    /// They are, and other pages of their storage block are still to be installed.
    Rest(Fetched),
    /// They have been asked for. Who installs them maps them, and wakes who waits.
    Later,
}

impl Memory {
    /// Brings a page that is accessed, and of the window around it what comes along at no further cost; all of the
    /// window where it is one page of the file.
    pub fn bring(
        &self,
        page: usize,
        (first, end): (usize, usize),
        scratch: &mut Scratch,
    ) -> Result<Brought, LoadError> {
        let whole = self.regions[self.region_of(page)].granule() > 1;
        match &self.source {
            Source::Peer(peer) => Ok(peer.bring(self, (first, end), (!whole).then_some(page))),
            Source::Images(_) if whole => self.load(first, end, scratch).map(|()| Brought::All),
            // All of the page block that holds the page; what else is in the window may take further page blocks.
            Source::Images(blocks) => {
                let fetched = self.load_with(blocks, page, (first, end), scratch)?;
                Ok(fetched.map_or(Brought::All, Brought::Rest))
            }
        }
    }

    /// Brings what is missing of `[first, end)`. On return all of it is in memory, whoever brought it.
    pub fn load(&self, first: usize, end: usize, scratch: &mut Scratch) -> Result<(), LoadError> {
        let blocks = match &self.source {
            Source::Images(blocks) => blocks,
            Source::Peer(peer) => return peer.load(self, first, end),
        };
        while let Some(page) = self.flags.next(first, end) {
            let stop = self.regions[self.region_of(page)].window(page).1;
            self.load_with(blocks, page, (page, stop.min(end)), scratch)?;
        }
        Ok(())
    }

    /// As `load`, of a long range: whole storage blocks at a time.
    pub fn load_many(&self, first: usize, end: usize, scratch: &mut Scratch) -> Result<(), LoadError> {
        let blocks = match &self.source {
            Source::Images(blocks) => blocks,
            Source::Peer(peer) => return peer.load(self, first, end),
        };
        while let Some(page) = self.flags.next(first, end) {
            let (image, entry) = blocks.chain().find(page)?;
            if matches!(entry.class(), Some(Class::Data | Class::SameAs)) {
                self.load_block(blocks, (image, entry.block.get()), scratch)?;
            }
            let stop = self.regions[self.region_of(page)].window(page).1;
            if self.flags.is_set(page) {
                self.load_with(blocks, page, (page, stop.min(end)), scratch)?;
            }
        }
        Ok(())
    }

    /// Installs what is missing of the pages of a peer's block, whose data pages stand verified in the buffer. Nothing
    /// is installed of a block that does not fit the regions, and nothing of pages that are not missing (any more).
    pub fn install_sent(&self, head: &Head, scratch: &mut Scratch) -> Result<(), LoadError> {
        let number = head.region as usize;
        let region = self.regions.get(number).ok_or(PlaceError::Region(head.region, self.regions.len()))?;
        let pages = region.mapping.pages();
        for run in &head.runs {
            let (first, end) = (run.first, run.first.saturating_add(run.count));
            if end > pages {
                return Err(PlaceError::Pages { first, end, pages }.into());
            }
            if !matches!(run.class, Class::Data | Class::Zero | Class::Absent) {
                return Err(PlaceError::Class(run.class).into());
            }
        }
        scratch.wanted.clear();
        let mut offset = 0;
        for run in head.runs.iter().filter(|run| run.class == Class::Data) {
            let pages = (0..run.count).map(|at| (region.base + run.first + at, offset + at * SMALL_PAGE));
            scratch.wanted.extend(pages.filter(|&(page, _)| self.flags.is_set(page)));
            offset += run.count * SMALL_PAGE;
        }
        self.install(scratch)?;
        for run in head.runs.iter().filter(|run| run.class != Class::Data) {
            self.install_zeros(region.base + run.first, region.base + run.first + run.count, scratch)?;
        }
        Ok(())
    }

    /// Zeros in memory, whatever stands there, where pages of a range are missing.
    fn install_zeros(&self, first: usize, end: usize, scratch: &mut Scratch) -> Result<(), LoadError> {
        scratch.contents.clear();
        scratch.contents.resize(SMALL_PAGE, 0);
        let mut at = first;
        while at < end {
            if let Source::Peer(peer) = &self.source
                && peer.link().is_cancelled()
            {
                return Err(LoadError::Ended);
            }
            scratch.wanted.clear();
            while let Some(page) = self.flags.next(at, end)
                && scratch.wanted.len() < ZEROS
            {
                scratch.wanted.push((page, 0));
                at = page + 1;
            }
            if scratch.wanted.is_empty() {
                break;
            }
            self.install(scratch)?;
        }
        Ok(())
    }

    /// Reads a page, and of the window around it what comes along at no further cost.
    pub fn load_with(
        &self,
        blocks: &Blocks,
        page: usize,
        (first, end): (usize, usize),
        scratch: &mut Scratch,
    ) -> Result<Option<Fetched>, LoadError> {
        let (image, entry) = blocks.chain().find(page)?;
        let mut fetched = None;
        scratch.wanted.clear();
        match entry.class() {
            Some(Class::Data | Class::SameAs) => {
                let (number, index, block) = self.unpack(blocks, image, &entry, &mut scratch.contents)?;
                fetched = Some((number, block));
                for page in (first..end).filter(|&page| self.flags.is_set(page)) {
                    self.want(blocks, page, number, index, scratch)?;
                }
            }
            Some(Class::Pattern) => {
                scratch.contents.resize(SMALL_PAGE, 0);
                fill(&mut scratch.contents, entry.signature.get());
                scratch.wanted.push((page, 0));
            }
            // What an image leaves out is zeros, and never missing.
            None | Some(Class::Absent) => return Err(ImageError::NotStored(page).into()),
            Some(Class::Zero) => {
                scratch.contents.clear();
                scratch.contents.resize(SMALL_PAGE, 0);
                scratch.wanted.push((page, 0));
            }
        }
        self.install(scratch)?;
        // Claimed by another thread: it is copying at this moment.
        while self.flags.is_set(page) {
            std::thread::yield_now();
        }
        Ok(fetched)
    }

    /// Reads every page that stands in a storage block and is missing.
    pub fn load_block(&self, blocks: &Blocks, number: Number, scratch: &mut Scratch) -> Result<(), LoadError> {
        if blocks.is_done(number) {
            return Ok(());
        }
        let block = blocks.get(number)?;
        self.install_block(blocks, &(number, block), scratch)
    }

    /// Installs every page of a storage block that is missing.
    pub fn install_block(
        &self,
        blocks: &Blocks,
        (number, block): &Fetched,
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        let number = *number;
        let base = self.regions.get(block.head().region as usize).map_or(usize::MAX, |region| region.base);
        let total = self.regions.last().map_or(0, |region| region.end());
        let runs = block.head().runs.iter().filter(|run| run.class == Class::Data);
        let pages = runs.flat_map(|run| run.first..run.first.saturating_add(run.count));
        let pages: Vec<usize> = pages.map(|page| base.saturating_add(page)).collect();
        let per_block = blocks.per_block(number.0);
        for (index, pages) in pages.chunks(per_block).enumerate() {
            if !pages.iter().any(|&page| page < total && self.flags.is_set(page)) {
                continue;
            }
            block.unpack(index, &mut scratch.contents)?;
            scratch.wanted.clear();
            for &page in pages.iter().filter(|&&page| page < total && self.flags.is_set(page)) {
                self.want(blocks, page, number, index, scratch)?;
            }
            self.install(scratch)?;
        }
        blocks.done(number);
        Ok(())
    }

    /// Unpacks the page block that holds a page; returns its storage block, its number there, and what was read.
    fn unpack(
        &self,
        blocks: &Blocks,
        image: usize,
        entry: &PageEntry,
        contents: &mut Vec<u8>,
    ) -> Result<(Number, usize, Arc<StoredBlock>), LoadError> {
        let number = (image, entry.block.get());
        let block = blocks.get(number)?;
        let (index, within) = block.locate(usize::from(entry.slot.get()));
        block.unpack(index, contents)?;
        if (within + 1) * SMALL_PAGE > contents.len() {
            let (field, value, allowed) = ("page", u64::from(entry.slot.get()), "one of its data pages");
            return Err(block.wrong(BlockError::Field { field, value, allowed }).into());
        }
        Ok((number, index, block))
    }

    /// Notes a page down if its contents are in that page block, which has been unpacked.
    fn want(
        &self,
        blocks: &Blocks,
        page: usize,
        number: Number,
        index: usize,
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        let (image, entry) = blocks.chain().find(page)?;
        let stored = matches!(entry.class(), Some(Class::Data | Class::SameAs));
        if stored && (image, entry.block.get()) == number {
            let per_block = blocks.per_block(image);
            let (found, within) =
                (usize::from(entry.slot.get()) / per_block, usize::from(entry.slot.get()) % per_block);
            if found == index && (within + 1) * SMALL_PAGE <= scratch.contents.len() {
                scratch.wanted.push((page, within * SMALL_PAGE));
            }
        }
        Ok(())
    }
}
