//! Cache of storage blocks. Each block is read by one thread; other threads that need the block wait.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;

use crate::SMALL_PAGE;
use crate::image::{Chain, Image, ImageError, StoredBlock};

/// Maximum number of cached storage blocks.
const KEPT: usize = 32;

/// Maximum number of spare buffers, which are reused for the next blocks.
const SPARE: usize = 4;

/// Index of an image in the chain, and of a storage block in the image.
pub type Number = (usize, u32);
/// Storage block that has been read, with its number.
pub type Fetched = (Number, Arc<StoredBlock>);
type Cell = Arc<OnceLock<Result<Arc<StoredBlock>, Arc<ImageError>>>>;

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
}

impl Blocks {
    pub fn new(chain: Chain) -> Self {
        let flags = |image: &Arc<Image>| image.blocks().iter().map(|_| AtomicBool::new(false)).collect();
        let done = chain.images().iter().map(flags).collect();
        Self { done, chain, recent: Mutex::default(), spare: Mutex::default(), bytes: AtomicU64::new(0) }
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
        let cell = self.cell(number);
        let found = cell.get_or_init(|| {
            let buffer = self.spare.lock().pop().unwrap_or_default();
            let block = self.chain.images()[number.0].read_block_into(number.1, buffer)?;
            self.bytes.fetch_add(block.len() as u64, Ordering::Relaxed);
            Ok(Arc::new(block))
        });
        if found.is_err() {
            self.lock().retain(|(other, _)| *other != number);
        }
        found.clone()
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
