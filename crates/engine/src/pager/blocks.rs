//! Cache of storage blocks. Each block is read by one thread; other threads that need the block wait.

use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use super::memory::LoadError;
use crate::SMALL_PAGE;
use crate::block::{BlockError, Class};
use crate::image::{Chain, Image, ImageError, StoredBlock, Supply, fill};

/// Maximum number of cached storage blocks.
const KEPT: usize = 32;

/// Maximum number of spare buffers, which are reused for the next blocks.
const SPARE: usize = 4;

pub use crate::image::Number;

/// Storage block that has been read, with its number.
pub type Fetched = (Number, Arc<StoredBlock>);
type Cell = Arc<OnceLock<Result<Arc<StoredBlock>, Arc<ImageError>>>>;

/// Buffers of [`Blocks::read_pages`].
#[derive(Debug, Default)]
pub struct PageScratch {
    block: Vec<u8>,
    /// Stored pages: storage block, page block in it, page in that, page of the range.
    stored: Vec<(Number, usize, usize, usize)>,
}

/// Storage blocks of a chain, read on first use.
#[derive(Debug)]
pub struct Blocks {
    chain: Chain,
    recent: Mutex<VecDeque<(Number, Cell)>>,
    /// Buffers of blocks that were removed from the cache.
    spare: Mutex<Vec<Vec<u8>>>,
    bytes: AtomicU64,
    /// For each image, the blocks whose pages are all loaded.
    done: Vec<Vec<AtomicBool>>,
    /// Whether threads stop to wait for blocks that have to be fetched.
    stopped: AtomicBool,
}

impl Blocks {
    pub fn new(chain: Chain) -> Self {
        let flags = |image: &Arc<Image>| image.blocks().iter().map(|_| AtomicBool::new(false)).collect();
        let done = chain.images().iter().map(flags).collect();
        Self {
            done,
            chain,
            recent: Mutex::default(),
            spare: Mutex::default(),
            bytes: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        }
    }

    pub fn chain(&self) -> &Chain {
        &self.chain
    }

    /// Returns the number of pages per page block of an image.
    pub fn per_block(&self, image: usize) -> usize {
        (self.chain.images()[image].page_block() / SMALL_PAGE).max(1)
    }

    /// Returns the number of bytes of storage blocks read so far.
    pub fn bytes_read(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Returns whether all pages of a block are loaded.
    pub fn is_done(&self, number: Number) -> bool {
        self.done[number.0].get(number.1 as usize).is_some_and(|done| done.load(Ordering::Relaxed))
    }

    /// Records that all pages of a block are loaded.
    pub fn done(&self, number: Number) {
        self.done[number.0][number.1 as usize].store(true, Ordering::Relaxed);
    }

    /// Returns a storage block from the cache, or reads it from its image.
    ///
    /// # Errors
    /// The error of reading or verifying the block. The error is not cached, so the next call reads the block again.
    pub fn get(&self, number: Number) -> Result<Arc<StoredBlock>, Arc<ImageError>> {
        // Wait before other threads can wait for this one: their requests may have precedence.
        self.wait(number)?;
        let cell = self.cell(number);
        let found = cell.get_or_init(|| {
            let buffer = self.spare.lock().pop().unwrap_or_default();
            Ok(Arc::new(self.read(number, buffer)?))
        });
        if found.is_err() {
            self.forget(number);
        }
        found.clone()
    }

    /// Removes a storage block from the cache, such as one with a damaged page block: the next call reads it again.
    pub fn forget(&self, number: Number) {
        self.lock().retain(|(other, _)| *other != number);
    }

    /// Reads a storage block that will not be needed again, without keeping it in the cache. `buffer`: see
    /// [`Image::read_block_into`].
    ///
    /// # Errors
    /// The error of reading or verifying the block.
    pub fn read(&self, number: Number, buffer: Vec<u8>) -> Result<StoredBlock, ImageError> {
        let stopped = || self.stopped.load(Ordering::Acquire);
        let block = self.chain.images()[number.0].read_block_while(number.1, buffer, &stopped)?;
        self.bytes.fetch_add(block.len() as u64, Ordering::Relaxed);
        Ok(block)
    }

    /// Stops all waits for blocks that have to be fetched.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
    }

    /// Returns the supply of blocks that the files do not contain yet; `None` if the files are complete.
    pub fn supply(&self) -> Option<&Arc<Supply>> {
        self.chain.images().last()?.supply()
    }

    /// Waits until a block is in its file.
    fn wait(&self, number: Number) -> Result<(), ImageError> {
        let image = &self.chain.images()[number.0];
        match image.supply() {
            Some(supply) if (number.1 as usize) < image.blocks().len() => {
                supply.wait(image, number, &|| self.stopped.load(Ordering::Acquire))
            }
            _ => Ok(()),
        }
    }

    /// Returns the blocks with the contents of pages `first` to `end`, in the order of their first page, without those
    /// that are in their files. Empty without a supply.
    fn absent(&self, first: usize, end: usize, is_wanted: &dyn Fn(usize) -> bool) -> Vec<Number> {
        let Some(supply) = self.supply() else { return Vec::new() };
        let mut found = self.stored((first..end).filter(|&page| is_wanted(page)));
        let images = self.chain.images();
        found.retain(|&number| self.is_supplied(number) && !supply.has(&images[number.0], number));
        found
    }

    /// Requests all blocks that those of the pages `first` to `end` need for which `is_wanted` is true. Does not wait.
    pub fn request(&self, first: usize, end: usize, is_wanted: &dyn Fn(usize) -> bool) {
        if let Some(supply) = self.supply() {
            // A failure is returned to the thread that reads the block.
            let _ = supply.request(&self.absent(first, end, is_wanted));
        }
    }

    /// Waits until all blocks that pages `first` to `end` need are in their files.
    ///
    /// # Errors
    /// See [`Supply::wait`].
    pub fn await_pages(&self, first: usize, end: usize) -> Result<(), ImageError> {
        if self.supply().is_none() {
            return Ok(());
        }
        self.request(first, end, &|_| true);
        self.absent(first, end, &|_| true).into_iter().try_for_each(|number| self.wait(number))
    }

    /// Requests the blocks that pages `first` to `end` need, and calls `notify` when the first of them is present or
    /// cannot be fetched. Returns false, without a call, if none has to be awaited.
    pub fn park(
        &self,
        first: usize,
        end: usize,
        is_wanted: &dyn Fn(usize) -> bool,
        notify: impl FnOnce() + Send + 'static,
    ) -> bool {
        let Some(supply) = self.supply() else { return false };
        let absent = self.absent(first, end, is_wanted);
        let Some(&number) = absent.first() else { return false };
        if absent.len() > 1 {
            let _ = supply.request(&absent);
        }
        supply.park(&self.chain.images()[number.0], number, notify)
    }

    /// Sends the order in which pages are loaded in the background to the provider of the blocks. Does nothing without
    /// a supply.
    pub fn prefetch_pages(&self, pages: impl Iterator<Item = usize>) {
        if let Some(supply) = self.supply() {
            supply.prefetch(&self.stored(pages));
        }
    }

    /// Sends the order of loading everything in the background to the provider: the blocks of `pages`, then `blocks`.
    /// Blocks that no page of the chain needs are not fetched, and count as loaded. Does nothing without a supply.
    pub fn prefetch_all(&self, pages: impl Iterator<Item = usize>, blocks: &[Number]) {
        let Some(supply) = self.supply() else { return };
        let needed = self.stored(0..self.chain.nearest().page_map().len());
        let known: HashSet<Number> = needed.iter().copied().collect();
        let (unneeded, rest): (Vec<_>, Vec<_>) = blocks.iter().copied().partition(|number| !known.contains(number));
        unneeded.into_iter().filter(|&number| self.is_supplied(number)).for_each(|number| self.done(number));
        let mut sent = HashSet::new();
        let first = self.stored(pages);
        let order: Vec<Number> = first
            .into_iter()
            .chain(rest)
            .chain(needed)
            .filter(|&one| self.is_supplied(one) && sent.insert(one))
            .collect();
        supply.prefetch(&order);
        supply.end_order();
    }

    fn is_supplied(&self, number: Number) -> bool {
        self.chain.images()[number.0].supply().is_some()
    }

    /// Returns the blocks that contain pages, each once, in the order of their first page.
    fn stored(&self, pages: impl Iterator<Item = usize>) -> Vec<Number> {
        let mut known = HashSet::new();
        let number = |page| {
            let (image, entry) = self.chain.find(page).ok()?;
            matches!(entry.class(), Some(Class::Data | Class::SameAs)).then(|| (image, entry.block.get()))
        };
        pages.filter_map(number).filter(|&number| known.insert(number)).collect()
    }

    /// Returns a storage block if it is in the cache.
    pub fn cached(&self, number: Number) -> Option<Arc<StoredBlock>> {
        let recent = self.lock();
        let (_, cell) = recent.iter().find(|(other, _)| *other == number)?;
        cell.get()?.as_ref().ok().cloned()
    }

    /// Reads the contents of consecutive pages from page `first` on, counted over all regions, into `out`, which must
    /// contain zeros. Unpacks each page block once. Absent pages are zeros.
    ///
    /// # Errors
    /// If a page cannot be read or verified.
    pub fn read_pages(&self, first: usize, out: &mut [u8], scratch: &mut PageScratch) -> Result<(), LoadError> {
        scratch.stored.clear();
        for at in 0..out.len() / SMALL_PAGE {
            let (image, entry) = self.chain.find(first + at)?;
            match entry.class() {
                Some(Class::Data | Class::SameAs) => {
                    let (slot, per_block) = (usize::from(entry.slot.get()), self.per_block(image));
                    let number = (image, entry.block.get());
                    scratch.stored.push((number, slot / per_block, slot % per_block, at));
                }
                Some(Class::Pattern) => fill(page_mut(out, at), entry.signature.get()),
                Some(Class::Absent | Class::Zero) => {}
                None => return Err(ImageError::NotStored(first + at).into()),
            }
        }
        scratch.stored.sort_unstable();
        self.copy_stored(out, scratch)
    }

    /// Copies the pages of `scratch.stored` into `out`.
    fn copy_stored(&self, out: &mut [u8], scratch: &mut PageScratch) -> Result<(), LoadError> {
        let PageScratch { block, stored } = scratch;
        for group in stored.chunk_by(|one, other| (one.0, one.1) == (other.0, other.1)) {
            let (number, index, ..) = group[0];
            let found = self.get(number)?;
            found.unpack(index, block).inspect_err(|_| self.forget(number))?;
            for &(_, _, within, at) in group {
                let start = within * SMALL_PAGE;
                let Some(contents) = block.get(start..start + SMALL_PAGE) else {
                    let (field, value, allowed) = ("page", within as u64, "one of its data pages");
                    return Err(found.wrong(BlockError::Field { field, value, allowed }).into());
                };
                page_mut(out, at).copy_from_slice(contents);
            }
        }
        Ok(())
    }

    fn cell(&self, number: Number) -> Cell {
        let mut recent = self.lock();
        if let Some(at) = recent.iter().position(|(other, _)| *other == number) {
            if let Some(entry) = recent.remove(at) {
                recent.push_back(entry);
            }
        } else {
            recent.push_back((number, Cell::default()));
            if recent.len() > KEPT {
                self.recycle(recent.pop_front());
            }
        }
        recent.back().map(|(_, cell)| cell.clone()).unwrap_or_default()
    }

    /// Retains the buffer of a block that was removed from the cache, unless the block is still in use or there are
    /// already `SPARE` buffers.
    fn recycle(&self, entry: Option<(Number, Cell)>) {
        let block = entry.and_then(|(_, cell)| Arc::into_inner(cell)).and_then(OnceLock::into_inner);
        if let Some(block) = block.and_then(Result::ok).and_then(Arc::into_inner) {
            let mut spare = self.spare.lock();
            if spare.len() < SPARE {
                spare.push(block.into_buffer());
            }
        }
    }

    fn lock(&self) -> parking_lot::MutexGuard<'_, VecDeque<(Number, Cell)>> {
        self.recent.lock()
    }
}

fn page_mut(pages: &mut [u8], at: usize) -> &mut [u8] {
    &mut pages[at * SMALL_PAGE..(at + 1) * SMALL_PAGE]
}
