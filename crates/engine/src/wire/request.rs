//! Requests for pages: the one thing that goes from the destination to the source of a post-copy migration.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::WireError;

const MAGIC: [u8; 4] = *b"PFRQ";
/// Pages that a request may ask for: those of a 2 MiB page.
pub const MAX_REQUEST: usize = 512;
/// No page of the request is waited for more than the others.
const NONE: u32 = u32::MAX;

/// Asks for pages of a region: `page` of them first, at once and whatever was sent before, then those of the others
/// that have not been sent.
#[derive(Debug, Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Request {
    magic: [u8; 4],
    region: U32,
    first: U64,
    count: U32,
    /// Counted from `first`.
    page: U32,
    /// xxh3-64 of all before.
    checksum: U64,
}

/// What a request asks for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Asked {
    pub(super) region: usize,
    pub(super) first: usize,
    pub(super) end: usize,
    /// Waited for by an access.
    pub(super) page: Option<usize>,
}

const CHECKED: usize = size_of::<Request>() - size_of::<U64>();

impl Request {
    /// For pages `[first, end)` of a region, of which `page` is waited for.
    pub fn new(region: usize, (first, end): (usize, usize), page: Option<usize>) -> Self {
        let number = |value: usize| U32::new(u32::try_from(value).unwrap_or(NONE));
        let page = page.map_or(U32::new(NONE), |page| number(page - first));
        let (region, count) = (number(region), number(end - first));
        let mut request =
            Self { magic: MAGIC, region, first: U64::new(first as u64), count, page, checksum: U64::ZERO };
        request.checksum = U64::new(xxh3_64(&request.as_bytes()[..CHECKED]));
        request
    }

    /// What it asks for, if that is of one of the regions (their pages are given).
    pub(super) fn check(&self, regions: &[usize]) -> Result<Asked, WireError> {
        let wrong = |what: &str| Err(WireError::Order(format!("a request {what}")));
        if self.magic != MAGIC || self.checksum.get() != xxh3_64(&self.as_bytes()[..CHECKED]) {
            return wrong("that is none, or was damaged on the way");
        }
        let (region, count, first) = (self.region.get() as usize, self.count.get() as usize, self.first.get());
        let Some(&pages) = regions.get(region) else { return wrong(&format!("for region {region}")) };
        if count == 0 || count > MAX_REQUEST {
            return wrong(&format!("for {count} pages"));
        }
        let first = usize::try_from(first).ok().filter(|&first| first < pages && count <= pages - first);
        let Some(first) = first else { return wrong(&format!("for pages beyond the {pages} of region {region}")) };
        let page = (self.page.get() != NONE).then_some(self.page.get() as usize);
        match page {
            Some(page) if page >= count => wrong(&format!("for page {page} of {count}")),
            page => Ok(Asked { region, first, end: first + count, page: page.map(|page| first + page) }),
        }
    }
}
