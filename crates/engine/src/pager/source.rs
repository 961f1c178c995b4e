//! Loading of contents, from storage blocks of images or from a peer. The contents of both origins are installed in the
//! same way ([`Memory::install`]).

use std::io;
use std::mem::take;
use std::sync::Arc;

use super::blocks::{Blocks, Fetched, Number};
use super::config::FillOrder;
use super::memory::{Installer, LoadError, Memory, Scratch};
use super::peer::Peer;
use crate::SMALL_PAGE;
use crate::block::{BlockError, Class, Head};
use crate::image::{ImageError, PageEntry, StoredBlock, fill};
use crate::placer::PlaceError;

/// Maximum number of zero pages that are installed at a time.
const ZEROS: usize = 512;

/// Origin of the contents of pages.
#[derive(Debug)]
pub enum PageSource {
    /// Image chain, from which requested pages are read synchronously.
    Images(Blocks),
    /// Peer, from which requested pages are received asynchronously.
    Peer(Peer),
}

impl PageSource {
    /// Returns whether storage blocks are fetched from a store.
    pub fn is_supplied(&self) -> bool {
        matches!(self, Self::Images(blocks) if blocks.supply().is_some())
    }

    /// Checks an order of background loading. A pager that loads from a peer does not use the order.
    ///
    /// # Errors
    /// See [`FillOrder::check`].
    pub fn check(&self, order: &FillOrder) -> io::Result<()> {
        match self {
            Self::Images(blocks) => order.check(blocks.chain()),
            Self::Peer(_) => Ok(()),
        }
    }
}

/// Result of loading the page of a fault.
#[derive(Debug)]
pub enum Loaded {
    /// The pages are present.
    All,
    /// The pages are present. Other pages of their storage block may still be deferred.
    Rest(Fetched),
    /// The pages have been requested from the peer. The thread that installs them also maps them, and wakes the threads
    /// blocked on them.
    Later,
}

/// Memory of a workload, and the origin of its contents.
#[derive(Debug)]
pub struct Loader {
    pub memory: Memory,
    pub source: PageSource,
}

impl Loader {
    /// Resolves a fault: loads the page if it is deferred, and maps it. Returns [`Loaded::Later`], without mapping the
    /// page, if the page has been requested from the peer.
    pub fn touch(&self, page: usize, scratch: &mut Scratch) -> Result<Loaded, LoadError> {
        let region = self.memory.region_of(page);
        let found = &self.memory.regions[region];
        let (first, end) = found.window(page);
        if !self.memory.flags.is_set(page) && found.granule() == 1 {
            self.memory.map_present(region, page)?;
            return Ok(Loaded::All);
        }
        if self.memory.is_private_huge(region) && self.memory.flags.next(first, end).is_none() {
            self.memory.map(region, first, end);
            return Ok(Loaded::All);
        }
        self.memory.missed(page);
        let loaded = self.load_for_fault(page, (first, end), scratch)?;
        if matches!(loaded, Loaded::Later) {
            return Ok(loaded);
        }
        if found.granule() > 1 {
            self.memory.allocate(region, first, end)?;
            self.memory.map(region, first, end);
        } else {
            self.memory.map(region, page, page + 1);
        }
        Ok(loaded)
    }

    /// Calls `notify` when the contents of the page of a fault have been fetched, or cannot be fetched. Returns false,
    /// without a call, if the fault can be resolved at once.
    pub fn park(&self, page: usize, notify: impl FnOnce() + Send + 'static) -> bool {
        let PageSource::Images(blocks) = &self.source else { return false };
        let region = &self.memory.regions[self.memory.region_of(page)];
        let (first, end) = if region.granule() > 1 { region.window(page) } else { (page, page + 1) };
        blocks.park(first, end, &|page| self.memory.flags.is_set(page), notify)
    }

    /// Requests all storage blocks that the deferred pages of a range need, from a store.
    pub fn request(&self, first: usize, end: usize) {
        if let PageSource::Images(blocks) = &self.source {
            blocks.request(first, end, &|page| self.memory.flags.is_set(page));
        }
    }

    /// Stops all waits for blocks that have to be fetched from a store.
    pub fn stop_waiting(&self) {
        if let PageSource::Images(blocks) = &self.source {
            blocks.stop();
        }
    }

    /// Loads the page of a fault, and those pages of its window that need no further read. Loads the whole window if
    /// the window is one (huge) page of the file. With a peer, only requests the window.
    pub fn load_for_fault(
        &self,
        page: usize,
        (first, end): (usize, usize),
        scratch: &mut Scratch,
    ) -> Result<Loaded, LoadError> {
        let whole = self.memory.regions[self.memory.region_of(page)].granule() > 1;
        match &self.source {
            PageSource::Peer(peer) => {
                let present = peer.fetch(&self.memory, (first, end), (!whole).then_some(page));
                Ok(if present { Loaded::All } else { Loaded::Later })
            }
            PageSource::Images(_) if whole => self.load(first, end, scratch).map(|()| Loaded::All),
            // Load only the page block of the page: other pages of the window may be in further page blocks.
            PageSource::Images(blocks) => {
                let fetched = self.load_with(blocks, page, (first, end), scratch)?;
                Ok(fetched.map_or(Loaded::All, Loaded::Rest))
            }
        }
    }

    /// Loads the deferred pages of `[first, end)`. On return, all of them are present, including those that other
    /// threads load.
    pub fn load(&self, first: usize, end: usize, scratch: &mut Scratch) -> Result<(), LoadError> {
        let blocks = match &self.source {
            PageSource::Images(blocks) => blocks,
            PageSource::Peer(peer) => return peer.load(&self.memory, first, end),
        };
        while let Some(page) = self.memory.flags.next(first, end) {
            let stop = self.memory.regions[self.memory.region_of(page)].window(page).1;
            self.load_with(blocks, page, (page, stop.min(end)), scratch)?;
        }
        Ok(())
    }

    /// Like `load`, but loads whole storage blocks, for long ranges.
    pub fn load_many(&self, first: usize, end: usize, scratch: &mut Scratch) -> Result<(), LoadError> {
        let blocks = match &self.source {
            PageSource::Images(blocks) => blocks,
            PageSource::Peer(peer) => return peer.load(&self.memory, first, end),
        };
        while let Some(page) = self.memory.flags.next(first, end) {
            let (image, entry) = blocks.chain().find(page)?;
            if matches!(entry.class(), Some(Class::Data | Class::SameAs)) {
                self.load_block(blocks, (image, entry.block.get()), scratch)?;
            }
            let stop = self.memory.regions[self.memory.region_of(page)].window(page).1;
            if self.memory.flags.is_set(page) {
                self.load_with(blocks, page, (page, stop.min(end)), scratch)?;
            }
        }
        Ok(())
    }

    /// Installs the deferred pages of a block from a peer, whose verified data pages are in `scratch.contents`. Skips
    /// pages that are not deferred. Fails, and installs nothing, if the block does not fit the regions or contains an
    /// invalid class.
    pub fn install_sent(&self, head: &Head, scratch: &mut Scratch) -> Result<(), LoadError> {
        let number = head.region as usize;
        let region = self.memory.regions.get(number).ok_or(PlaceError::Region(number, self.memory.regions.len()))?;
        let pages = region.pages;
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
            scratch.wanted.extend(pages.filter(|&(page, _)| self.memory.flags.is_set(page)));
            offset += run.count * SMALL_PAGE;
        }
        self.memory.install(scratch)?;
        for run in head.runs.iter().filter(|run| run.class != Class::Data) {
            self.install_zeros(region.base + run.first, region.base + run.first + run.count, scratch)?;
        }
        Ok(())
    }

    /// Installs zeros in the deferred pages of a range. Fails if the transfers of the peer are cancelled.
    fn install_zeros(&self, first: usize, end: usize, scratch: &mut Scratch) -> Result<(), LoadError> {
        scratch.contents.clear();
        scratch.contents.resize(SMALL_PAGE, 0);
        let mut at = first;
        while at < end {
            if let PageSource::Peer(peer) = &self.source
                && peer.link().is_cancelled()
            {
                return Err(LoadError::Ended);
            }
            scratch.wanted.clear();
            while let Some(page) = self.memory.flags.next(at, end)
                && scratch.wanted.len() < ZEROS
            {
                scratch.wanted.push((page, 0));
                at = page + 1;
            }
            if scratch.wanted.is_empty() {
                break;
            }
            self.memory.install(scratch)?;
        }
        Ok(())
    }

    /// Loads a page, and the pages of the window that are in the same page block. Returns the storage block, or `None`
    /// if the page is not stored in a block (pattern or zero page).
    pub fn load_with(
        &self,
        blocks: &Blocks,
        page: usize,
        (first, end): (usize, usize),
        scratch: &mut Scratch,
    ) -> Result<Option<Fetched>, LoadError> {
        let region = self.memory.region_of(page);
        if self.memory.is_private_huge(region) {
            return self.load_huge(blocks, region, page, scratch).map(|()| None);
        }
        let (image, entry) = blocks.chain().find(page)?;
        let mut fetched = None;
        scratch.wanted.clear();
        match entry.class() {
            Some(Class::Data | Class::SameAs) => {
                let (number, index, block) = self.unpack(blocks, image, &entry, &mut scratch.contents)?;
                fetched = Some((number, block));
                for page in (first..end).filter(|&page| self.memory.flags.is_set(page)) {
                    self.want(blocks, page, (number, index), 0, scratch)?;
                }
            }
            Some(Class::Pattern) => {
                scratch.contents.resize(SMALL_PAGE, 0);
                fill(&mut scratch.contents, entry.signature.get());
                scratch.wanted.push((page, 0));
            }
            // Absent pages of an image are zeros, and never deferred.
            None | Some(Class::Absent) => return Err(ImageError::NotStored(page).into()),
            Some(Class::Zero) => {
                scratch.contents.clear();
                scratch.contents.resize(SMALL_PAGE, 0);
                scratch.wanted.push((page, 0));
            }
        }
        self.memory.install(scratch)?;
        // Another thread may have claimed the page. If it does not write the page, this thread loads it.
        if self.memory.await_claim(page) { Ok(fetched) } else { self.load_with(blocks, page, (first, end), scratch) }
    }

    /// Loads the huge page of private memory that contains a page.
    fn load_huge(&self, blocks: &Blocks, region: usize, page: usize, scratch: &mut Scratch) -> Result<(), LoadError> {
        let Installer::Private(private) = &self.memory.installer else { return Ok(()) };
        let (first, end) = self.memory.regions[region].window(page);
        blocks.await_pages(first, end)?;
        let _loading = private.loading(first).lock();
        if self.memory.flags.next(first, end).is_none() {
            return Ok(());
        }
        scratch.contents.clear();
        scratch.contents.resize((end - first) * SMALL_PAGE, 0);
        blocks.read_pages(first, &mut scratch.contents, &mut scratch.pages)?;
        scratch.installed += self.memory.copy_huge(region, first, &scratch.contents)?;
        Ok(())
    }

    /// Reads a storage block, unless all of its pages are loaded, and installs its deferred pages. Does not keep the
    /// block in the cache: its buffer is reused for the next block while it is in the caches of the CPU.
    pub fn load_block(&self, blocks: &Blocks, number: Number, scratch: &mut Scratch) -> Result<(), LoadError> {
        if blocks.is_done(number) {
            return Ok(());
        }
        if self.memory.any_private_huge() {
            return self.load_huge_pages_of(blocks, number, scratch);
        }
        if let Some(block) = blocks.cached(number) {
            return self.install_block(blocks, number, &block, scratch);
        }
        let block = blocks.read(number, take(&mut scratch.buffer))?;
        let installed = self.install_block(blocks, number, &block, scratch);
        scratch.buffer = block.into_buffer();
        installed
    }

    /// Loads the huge pages of private memory that have pages in a storage block. They may need further storage blocks,
    /// so these are read through the cache.
    fn load_huge_pages_of(&self, blocks: &Blocks, number: Number, scratch: &mut Scratch) -> Result<(), LoadError> {
        let block = blocks.get(number)?;
        let number_of = block.head().region as usize;
        let Some(region) = self.memory.regions.get(number_of) else { return Ok(()) };
        for run in block.head().runs.iter().filter(|run| run.class == Class::Data) {
            let end = region.end().min(region.base.saturating_add(run.first).saturating_add(run.count));
            let mut page = region.base.saturating_add(run.first);
            while page < end {
                self.load_huge(blocks, number_of, page, scratch)?;
                page = region.window(page).1;
            }
        }
        blocks.done(number);
        Ok(())
    }

    /// Installs the deferred pages of a storage block, and records that all pages of the block are loaded.
    pub fn install_block(
        &self,
        blocks: &Blocks,
        number: Number,
        block: &StoredBlock,
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        let region = self.memory.regions.get(block.head().region as usize);
        let (base, limit) = region.map_or((usize::MAX, 0), |region| (region.base, region.end()));
        let runs = block.head().runs.iter().filter(|run| run.class == Class::Data);
        let pages = runs.flat_map(|run| run.first..run.first.saturating_add(run.count));
        let pages: Vec<usize> = pages.map(|page| base.saturating_add(page)).collect();
        if matches!(self.memory.installer, Installer::Private(_)) {
            return self.install_private(blocks, (number, block), &pages, scratch);
        }
        let per_block = blocks.per_block(number.0);
        // Pages that are written and not mapped yet: one call maps as many as possible.
        let mut written = (0, 0);
        for (index, pages) in pages.chunks(per_block).enumerate() {
            let (first, end) = (pages[0], pages[0].saturating_add(pages.len()));
            let is_run = end <= limit && pages.iter().zip(first..).all(|(&page, expected)| page == expected);
            if is_run
                && self.is_quick(block, index)
                && self.are_stored(blocks, (first, end), number, index)?
                && self.memory.unpack_all((first, end), |out| block.unpack_into(index, out))?
            {
                scratch.installed += pages.len() as u64;
                if written.1 != first {
                    self.memory.map_written(written.0, written.1);
                    written.0 = first;
                }
                written.1 = end;
            } else {
                self.install_page_block(blocks, (number, block, index), pages, scratch)?;
            }
        }
        self.memory.map_written(written.0, written.1);
        blocks.done(number);
        Ok(())
    }

    /// Installs those `pages` of a page block that are deferred.
    fn install_page_block(
        &self,
        blocks: &Blocks,
        (number, block, index): (Number, &StoredBlock, usize),
        pages: &[usize],
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        let total = self.memory.regions.last().map_or(0, |region| region.end());
        let is_deferred = |page: usize| page < total && self.memory.flags.is_set(page);
        if !pages.iter().any(|&page| is_deferred(page)) {
            return Ok(());
        }
        block.unpack(index, &mut scratch.contents)?;
        scratch.wanted.clear();
        for &page in pages.iter().filter(|&&page| is_deferred(page)) {
            self.want(blocks, page, (number, index), 0, scratch)?;
        }
        self.memory.install(scratch)
    }

    /// Installs the deferred ones among the `pages` of a storage block in private memory, by few calls.
    fn install_private(
        &self,
        blocks: &Blocks,
        (number, block): (Number, &StoredBlock),
        pages: &[usize],
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        let total = self.memory.regions.last().map_or(0, |region| region.end());
        let deferred = |page: usize| page < total && self.memory.flags.is_set(page);
        scratch.contents.clear();
        scratch.wanted.clear();
        for (index, pages) in pages.chunks(blocks.per_block(number.0)).enumerate() {
            if !pages.iter().any(|&page| deferred(page)) {
                continue;
            }
            let start = scratch.contents.len();
            scratch.contents.resize(start + pages.len() * SMALL_PAGE, 0);
            block.unpack_into(index, &mut scratch.contents[start..])?;
            for &page in pages.iter().filter(|&&page| deferred(page)) {
                self.want(blocks, page, (number, index), start, scratch)?;
            }
        }
        self.memory.install(scratch)?;
        blocks.done(number);
        Ok(())
    }

    /// Returns whether a page block may be unpacked in place. No thread can read faults during the unpacking, so a page
    /// block must not be decompressed in place if the workload can fault.
    fn is_quick(&self, block: &StoredBlock, index: usize) -> bool {
        let plain = block.head().page_blocks.get(index).is_some_and(|record| record.stored_len == record.raw_len);
        plain || self.memory.watched.is_empty()
    }

    /// Returns whether all pages of a run are deferred, and stored in page block `index` of a storage block, in order.
    fn are_stored(
        &self,
        blocks: &Blocks,
        (first, end): (usize, usize),
        number: Number,
        index: usize,
    ) -> Result<bool, LoadError> {
        if !self.memory.flags.all_set(first, end) {
            return Ok(false);
        }
        let slot = index * blocks.per_block(number.0);
        for page in first..end {
            let (image, entry) = blocks.chain().find(page)?;
            let stored = matches!(entry.class(), Some(Class::Data | Class::SameAs));
            if !stored || (image, entry.block.get()) != number || usize::from(entry.slot.get()) != slot + page - first {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Unpacks the page block that stores a page into `contents`. Returns the number of the storage block, the index of
    /// the page block in it, and the storage block. Fails if the block does not have the page.
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

    /// Adds a page to `scratch.wanted` if it is stored in page block `index` of storage block `number`, which has been
    /// unpacked into `scratch.contents`, from byte `start` on.
    fn want(
        &self,
        blocks: &Blocks,
        page: usize,
        (number, index): (Number, usize),
        start: usize,
        scratch: &mut Scratch,
    ) -> Result<(), LoadError> {
        let (image, entry) = blocks.chain().find(page)?;
        let stored = matches!(entry.class(), Some(Class::Data | Class::SameAs));
        if stored && (image, entry.block.get()) == number {
            let per_block = blocks.per_block(image);
            let (found, within) =
                (usize::from(entry.slot.get()) / per_block, usize::from(entry.slot.get()) % per_block);
            let offset = start + within * SMALL_PAGE;
            if found == index && offset + SMALL_PAGE <= scratch.contents.len() {
                scratch.wanted.push((page, offset));
            }
        }
        Ok(())
    }
}
