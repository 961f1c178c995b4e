//! Pages of a shared file, which may hold less than it should: what is still to come (S8) is known by its signature.
//!
//! A restore sets a flag for each page that memory does not hold yet, and its image has class and signature of every
//! page: the same xxh3-64 that a page in memory has here. So nothing has to be loaded, or read from the image, to know
//! which pages are equal.

use std::io;
use std::sync::Arc;

use super::content::{Content, WORDS};
use super::source::{Others, Reader, Span, split};
use crate::block::Class;
use crate::image::{Image, PageEntry};
use crate::mapping::Mapping;
use crate::pager::Flags;
use crate::pages::PageSet;
use crate::{LARGE_PAGE, SLOTS, SMALL_PAGE};

/// Contents that are still to come to a region.
#[derive(Debug)]
pub struct Deferred {
    /// Of all regions.
    pub flags: Arc<Flags>,
    /// Number of the first page of the region, counted over all regions.
    pub base: usize,
    /// Where they come from; None where that does not tell what pages hold. These are left out.
    pub image: Option<Arc<Image>>,
    /// 2 MiB units that will stand on large pages: what the image does not have of these is zeros in memory.
    pub large: Vec<bool>,
}

impl Deferred {
    /// Whether a unit will stand on a large page.
    fn is_large(&self, unit: usize) -> bool {
        self.image.is_some() && self.large.get(unit).copied().unwrap_or(false)
    }

    /// What a page of the region will hold; nothing where the image has no such page.
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

/// A shared file, by our own mapping of it.
#[derive(Debug)]
pub struct SharedFile {
    /// The mapping.
    pub mapping: Arc<Mapping>,
    /// What is still to come to it.
    pub deferred: Option<Deferred>,
}

impl SharedFile {
    /// As `Source::units`. What will stand on a large page counts as if it did.
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

    /// Pages that are still to come, and of which something tells what they hold.
    fn known(&self, deferred: &Deferred) -> PageSet {
        match deferred.image {
            Some(_) => deferred.flags.set_in(deferred.base, deferred.base + self.mapping.pages()),
            None => PageSet::new(self.mapping.pages()),
        }
    }

    /// As `Source::read`.
    pub(super) fn read(&self, span: Span, reader: &mut Reader, mut found: impl FnMut(Content)) -> io::Result<Others> {
        let first = usize::try_from(span.start).unwrap_or(usize::MAX) / SMALL_PAGE;
        // Flags first, memory then: a page without a flag is there by now, unless it is none.
        let waiting = self.waiting(first, first + span.pages);
        let there = &mut reader.resident[..span.pages];
        self.mapping.resident(first, there)?;
        // Nobody has written yet to the parts of a large page that are not there.
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

    /// The pages of `[first, end)` that are still to come, counted from `first` on.
    fn waiting(&self, first: usize, end: usize) -> Option<PageSet> {
        self.deferred.as_ref().map(|deferred| deferred.flags.set_in(deferred.base + first, deferred.base + end))
    }

    fn copied(&self, page: usize, copy: &mut [u64; WORDS]) -> Content {
        // SAFETY: `page` points to a page of the mapping, the copy has its size. The workload may write meanwhile: the
        // copy is then of no instant, which is as good a hint as any.
        unsafe { std::ptr::copy_nonoverlapping(self.mapping.page(page).cast(), copy, 1) };
        Content::of(copy)
    }
}
