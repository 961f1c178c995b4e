//! Page requests, the only messages from destination to source on the page connections of a post-copy migration.

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;
use crate::checksum::checksum;

const MAGIC: [u8; 4] = *b"PFRQ";
/// Maximum number of pages per request: the base pages of one huge page.
pub const MAX_REQUEST: usize = 512;
/// Value of `page` if no page of the request has priority.
const NONE: u32 = u32::MAX;

/// Request for pages of a region. The source sends `page` immediately, even if it has been sent before. It then sends
/// those of the other pages that have not been sent.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Request {
    magic: [u8; 4],
    region: U32,
    first: U64,
    count: U32,
    /// Page with priority, relative to `first`, or `NONE`.
    page: U32,
    /// xxh3-64 of the preceding bytes.
    checksum: U64,
}

/// Validated contents of a request.
#[derive(Debug, Clone, Copy)]
pub(super) struct PageRequest {
    pub(super) region: usize,
    pub(super) first: usize,
    pub(super) end: usize,
    /// Page of the region that a faulting thread waits for, if any.
    pub(super) page: Option<usize>,
}

const CHECKED: usize = size_of::<Request>() - size_of::<U64>();

impl Request {
    /// Creates a request for pages `[first, end)` of a region. `page` is the page in this range that a faulting thread
    /// waits for, if any.
    pub fn new(region: usize, (first, end): (usize, usize), page: Option<usize>) -> Self {
        let number = |value: usize| U32::new(u32::try_from(value).unwrap_or(NONE));
        let page = page.map_or(U32::new(NONE), |page| number(page - first));
        let (region, count) = (number(region), number(end - first));
        let mut request =
            Self { magic: MAGIC, region, first: U64::new(first as u64), count, page, checksum: U64::ZERO };
        request.checksum = U64::new(checksum(&request.as_bytes()[..CHECKED]));
        request
    }

    /// Validates the request against the regions, given by their numbers of pages.
    pub(super) fn check(&self, regions: &[usize]) -> Result<PageRequest, WireError> {
        let wrong = |what: &str| Err(WireError::Order(format!("a request {what}")));
        if self.magic != MAGIC || self.checksum.get() != checksum(&self.as_bytes()[..CHECKED]) {
            return wrong("with an invalid magic number or checksum");
        }
        let (region, count, first) = (self.region.get() as usize, self.count.get() as usize, self.first.get());
        let Some(&pages) = regions.get(region) else { return wrong(&format!("for region {region}")) };
        if count == 0 || count > MAX_REQUEST {
            return wrong(&format!("for {count} pages, expected 1 to {MAX_REQUEST}"));
        }
        let first = usize::try_from(first).ok().filter(|&first| first < pages && count <= pages - first);
        let Some(first) = first else {
            return wrong(&format!("for pages beyond the {pages} pages of region {region}"));
        };
        let page = (self.page.get() != NONE).then_some(self.page.get() as usize);
        match page {
            Some(page) if page >= count => wrong(&format!("for {count} pages with priority for page {page}")),
            page => Ok(PageRequest { region, first, end: first + count, page: page.map(|page| first + page) }),
        }
    }
}
