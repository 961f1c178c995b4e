//! Classification of pages: zero, pattern, duplicate, or data for a storage block.
//!
//! Blocks copied by traps and by the sweep are stored in separate storage blocks. The pages that the workload wrote
//! first are thereby adjacent in the image, in the order of the writes.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender};

use super::SaveError;
use super::output::Full;
use super::state::SaverState;
use super::trap_blocks::Copied;
use crate::SMALL_PAGE;
use crate::block::{Builder, Class, is_zero};
use crate::checksum::checksum;
use crate::image::{Chain, DedupIndex, FLAG_IN_PARENT, PageEntry, PageReader, pattern};

/// Classifier of all copied blocks, in the order in which they were copied.
#[derive(Debug)]
pub(super) struct Classifier {
    shared: Arc<SaverState>,
    free: Receiver<Builder>,
    full: Sender<Full>,
    /// Storage blocks being filled: one for pages copied by traps, one for pages copied by the sweep or in rounds.
    open: [Option<Full>; 2],
    result: Classified,
    /// Places of the contents stored so far, as (ticket, slot).
    known: DedupIndex,
    parent: Option<Chain>,
}

/// Chain of parent images, with one reader per image. Each reader caches the storage block that it read last.
struct Parents<'a> {
    chain: &'a Chain,
    readers: Vec<PageReader<'a>>,
}

impl<'a> Parents<'a> {
    fn new(chain: &'a Chain) -> Self {
        let readers = chain.images().iter().map(|_| PageReader::new(chain)).collect();
        Self { chain, readers }
    }

    /// Returns whether a page of the chain has these contents. An unreadable page counts as different.
    fn hold(&mut self, page: usize, signature: u64, bytes: &[u8]) -> bool {
        let Ok((image, entry)) = self.chain.find(page) else { return false };
        // Compare the signatures first, to avoid reading most of the pages that differ.
        matches!(entry.class(), Some(Class::Data | Class::SameAs))
            && entry.signature.get() == signature
            && self.readers[image].stored(image, &entry).is_ok_and(|stored| stored == bytes)
    }
}

/// Page map whose entries contain tickets. [`Classified::page_map`] replaces them with the numbers of the storage
/// blocks.
#[derive(Debug)]
pub(super) struct Classified {
    entries: Vec<PageEntry>,
    tickets: u32,
}

impl Classified {
    /// Returns the page map. `numbers` contains the number of the storage block of each ticket.
    pub(super) fn page_map(mut self, numbers: &HashMap<u32, u32>) -> Vec<PageEntry> {
        for entry in &mut self.entries {
            if matches!(entry.class(), Some(Class::Data | Class::SameAs)) && !entry.in_parent() {
                entry.block.set(numbers.get(&entry.block.get()).copied().unwrap_or(u32::MAX));
            }
        }
        self.entries
    }
}

/// Returns the entry of a page that is unchanged since the parent.
fn inherited(entry: &PageEntry) -> PageEntry {
    match entry.class() {
        Some(Class::Data | Class::SameAs) => in_parent(entry.signature.get()),
        Some(class) => PageEntry::plain(class, entry.signature.get()),
        None => PageEntry::plain(Class::Absent, 0), // unreachable: a chain has no other classes
    }
}

fn in_parent(signature: u64) -> PageEntry {
    PageEntry { flags: FLAG_IN_PARENT, ..PageEntry::plain(Class::Data, signature) }
}

impl Classifier {
    /// Creates the classifier. Pages that are never copied count as unchanged since the parent if `as_parent` is true,
    /// otherwise as holes.
    pub(super) fn new(
        shared: Arc<SaverState>,
        parent: Option<Chain>,
        as_parent: bool,
        free: Receiver<Builder>,
        full: Sender<Full>,
    ) -> Result<Self, SaveError> {
        let pages = shared.areas.iter().map(|area| area.source.pages()).sum();
        let entries = match &parent {
            Some(parent) if as_parent => parent.nearest().page_map().iter().map(inherited).collect(),
            _ => vec![PageEntry::plain(Class::Absent, 0); pages],
        };
        let known = DedupIndex::new().map_err(SaveError::Memory)?;
        let result = Classified { entries, tickets: 0 };
        Ok(Self { shared, free, full, open: [None, None], result, known, parent })
    }

    /// Classifies blocks until all senders are dropped. After a failure of the checkpoint, only frees the staging slots
    /// of the blocks.
    pub(super) fn run(mut self, copied: &Receiver<Copied>) -> Classified {
        let parent = self.parent.take();
        let mut parents = parent.as_ref().map(Parents::new);
        for block in copied {
            if !self.shared.failed() && self.file(&block, parents.as_mut()).is_none() {
                self.shared.fail(SaveError::Thread);
            }
            self.shared.staging.give(block.slot);
        }
        for open in [0, 1] {
            self.close(open);
        }
        self.result
    }

    /// Classifies the pages of a block, and sets their entries in the page map. Returns `None` if the packers have
    /// exited.
    fn file(&mut self, block: &Copied, mut parents: Option<&mut Parents<'_>>) -> Option<()> {
        let first = self.shared.areas[block.region].first_page + block.page;
        for &(start, end) in &block.absent {
            self.result.entries[first + start..first + end].fill(PageEntry::plain(Class::Absent, 0));
        }
        for &(start, end) in &block.runs {
            for page in start..end {
                let bytes = &block.slot[page * SMALL_PAGE..(page + 1) * SMALL_PAGE];
                let entry = self.classify(block, block.page + page, bytes, parents.as_deref_mut())?;
                self.shared.stats.count(&entry);
                self.result.entries[first + page] = entry;
            }
            self.shared.stats.pages.fetch_add((end - start) as u64, Ordering::Relaxed);
        }
        Some(())
    }

    fn classify(
        &mut self,
        block: &Copied,
        page: usize,
        bytes: &[u8],
        parents: Option<&mut Parents<'_>>,
    ) -> Option<PageEntry> {
        if is_zero(bytes) {
            return Some(PageEntry::plain(Class::Zero, 0));
        }
        if let Some(word) = pattern(bytes) {
            return Some(PageEntry::plain(Class::Pattern, word));
        }
        let signature = checksum(bytes);
        let global = self.shared.areas[block.region].first_page + page;
        if parents.is_some_and(|parents| parents.hold(global, signature, bytes)) {
            return Some(in_parent(signature));
        }
        let hash = self.known.hash(bytes);
        if let Some((ticket, slot)) = self.known.place(hash) {
            return Some(PageEntry::stored(Class::SameAs, signature, ticket, slot));
        }
        let (ticket, slot) = self.store(block, page, bytes)?;
        self.known.insert(hash, (ticket, slot));
        Some(PageEntry::stored(Class::Data, signature, ticket, slot))
    }

    /// Adds a page to the storage block being filled. Returns the ticket of the block and the slot of the page, or
    /// `None` if the packers have exited.
    fn store(&mut self, block: &Copied, page: usize, bytes: &[u8]) -> Option<(u32, u16)> {
        let open = block.origin as usize;
        if self.open[open].as_ref().is_some_and(|full| full.region != block.region || full.builder.is_full()) {
            self.close(open);
        }
        if self.open[open].is_none() {
            let (builder, ticket) = (self.free.recv().ok()?, self.result.tickets);
            self.result.tickets += 1;
            self.open[open] = Some(Full { ticket, region: block.region, builder });
        }
        let full = self.open[open].as_mut()?;
        let slot = u16::try_from(full.builder.raw_len() / SMALL_PAGE).ok()?;
        // SAFETY: `bytes` is a slice of one page, and thus valid for reading 4 KiB.
        unsafe { full.builder.push_page(page, bytes.as_ptr()) };
        Some((full.ticket, slot))
    }

    fn close(&mut self, open: usize) {
        if let Some(full) = self.open[open].take() {
            let _ = self.full.send(full);
        }
    }
}
