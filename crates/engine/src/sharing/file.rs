//! Pages of a shared file. Deferred pages (S8) are included by their signatures.
//!
//! A restore sets a bit for each deferred page. The image contains the class and the signature of every page; the
//! signature is the same xxh3-64 hash that a scan computes for pages in memory. A scan therefore finds duplicates
//! without loading deferred pages.

use std::io;
use std::sync::Arc;

use super::content::{Content, WORDS};
use super::span::{Others, Reader, Span, split};
use crate::block::Class;
use crate::image::{Image, PageEntry};
use crate::mapping::Mapping;
use crate::pager::Flags;
use crate::pages::PageSet;
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Deferred contents of a region.
#[derive(Debug)]
pub struct Deferred {
    /// Deferred bitmap of all regions.
    pub flags: Arc<Flags>,
    /// Index of the first page of the region, counted over all regions.
    pub base: usize,
    /// Image that contains the contents; `None` if their origin has no signatures. Deferred pages are then ignored.
    pub image: Option<Arc<Image>>,
    /// Whether each 2 MiB unit will be backed by a huge page. Pages of such a unit that the image lacks will be zeros.
    pub large: Vec<bool>,
}

impl Deferred {
    /// Returns whether a unit will be backed by a huge page.
    fn is_large(&self, unit: usize) -> bool {
        self.image.is_some() && self.large.get(unit).copied().unwrap_or(false)
    }

    /// Returns the future contents of a page of the region, or `None` if the image has no such page.
    fn content(&self, page: usize) -> Option<Content> {
        let entry: &PageEntry = self.image.as_ref()?.page_map().get(self.base + page)?;
        match entry.class()? {
            Class::Absent => None,
            Class::Zero => Some(Content::Zero),
            Class::Pattern => Some(Content::Pattern(entry.signature.get())),
            Class::SameAs | Class::Data => Some(Content::Data(entry.signature.get())),
        }
    }
}

/// Shared file, accessed through our mapping.
#[derive(Debug)]
pub struct SharedFile {
    /// Mapping of the file.
    pub mapping: Arc<Mapping>,
    /// Deferred contents of the file; `None` if there are none.
    pub deferred: Option<Deferred>,
}

impl SharedFile {
    /// Implements `ScannedMemory::units`. A unit that will be backed by a huge page already counts as a huge page.
    pub(super) fn units(&self, start: u64, end: u64) -> io::Result<Vec<(Span, bool)>> {
        let mut large = self.mapping.large_units()?;
        let mut pages = PageSet::new(self.mapping.pages());
        for (from, to) in self.mapping.data_ranges()? {
            pages.insert(from / SMALL_PAGE, to / SMALL_PAGE);
        }
        if let Some(deferred) = &self.deferred {
            for (first, stop) in self.known(deferred).runs() {
                pages.insert(first, stop);
                for unit in (first / SLOTS..stop.div_ceil(SLOTS)).filter(|&unit| deferred.is_large(unit)) {
                    large[unit] = true;
                    pages.insert(unit * SLOTS, ((unit + 1) * SLOTS).min(pages.pages()));
                }
            }
        }
        let mut spans = Vec::new();
        for (first, stop) in pages.runs() {
            let (from, to) = (((first * SMALL_PAGE) as u64).max(start), ((stop * SMALL_PAGE) as u64).min(end));
            split(from, to.max(from), &mut spans);
        }
        let unit = |at: u64| usize::try_from(at / LARGE_PAGE as u64).unwrap_or(usize::MAX);
        Ok(spans.into_iter().map(|span| (span, large.get(unit(span.start)).copied().unwrap_or(false))).collect())
    }

    /// Returns the deferred pages whose contents are known from an image.
    fn known(&self, deferred: &Deferred) -> PageSet {
        match deferred.image {
            Some(_) => deferred.flags.set_in(deferred.base, deferred.base + self.mapping.pages()),
            None => PageSet::new(self.mapping.pages()),
        }
    }

    /// Implements `ScannedMemory::read`.
    pub(super) fn read(&self, span: Span, reader: &mut Reader, mut found: impl FnMut(Content)) -> io::Result<Others> {
        let first = usize::try_from(span.start).unwrap_or(usize::MAX) / SMALL_PAGE;
        // Read the bitmap before the memory: a page that is not deferred is then present, unless it is a hole.
        let waiting = self.waiting(first, first + span.pages);
        let there = &mut reader.resident[..span.pages];
        self.mapping.resident(first, there)?;
        // While a huge page has deferred pages, those of its pages that are neither deferred nor present have the
        // contents of the image, or are zeros if the image lacks them.
        let coming = self.deferred.as_ref().filter(|deferred| {
            waiting.as_ref().is_some_and(|pages| !pages.is_empty())
                && (self.mapping.is_hugetlb() || deferred.is_large(first / SLOTS))
        });
        let mut deferred = 0;
        for (index, &is_there) in there.iter().enumerate() {
            let content = if waiting.as_ref().is_some_and(|pages| pages.contains(index)) {
                self.deferred.as_ref().and_then(|deferred| deferred.content(first + index))
            } else if is_there & 1 == 1 {
                found(self.copied(first + index, &mut reader.chunk[0]));
                continue;
            } else {
                coming.map(|deferred| deferred.content(first + index).unwrap_or(Content::Zero))
            };
            if let Some(content) = content {
                deferred += 1;
                found(content);
            }
        }
        Ok(Others { shared: 0, deferred })
    }

    /// Returns the deferred pages of `[first, end)`, relative to `first`; `None` if the file has no deferred contents.
    fn waiting(&self, first: usize, end: usize) -> Option<PageSet> {
        self.deferred.as_ref().map(|deferred| deferred.flags.set_in(deferred.base + first, deferred.base + end))
    }

    fn copied(&self, page: usize, copy: &mut [u64; WORDS]) -> Content {
        // SAFETY: `page` points to a page of the mapping, and the copy has the size of a page. The workload may write
        // concurrently: the copy may then be torn, which is acceptable because a hash is only a hint.
        unsafe { std::ptr::copy_nonoverlapping(self.mapping.page(page).cast(), copy, 1) };
        Content::of(copy)
    }
}
