//! Requests for pages over a socket: a virtual machine monitor that maps files of the pager handles its own page faults,
//! and requests each page before it maps the page (the `PageFault` command of Cloud Hypervisor's migration protocol).
//!
//! ```text
//! request  u16 command = 9, 6 bytes ignored, u64 length = 16, then u64 guest physical address, u64 length
//! reply    u16 status (1: done, 2: failed), 6 bytes of zeros, u64 length = 0
//! ```
//!
//! All numbers are little-endian. After the reply the monitor maps the page, and its guest may write to the page. The
//! page must therefore be present in the file, even if it contains zeros, and must not be written to again. Contents are
//! installed as for a page fault: claims and deferred bits exclude a second write.
//!
//! The monitor requests all pages in ascending order while it has no fault. A request out of this order is a fault of
//! its guest: its window belongs to the working set.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::Ordering;
use std::time::Instant;

use super::memory::{LoadError, Scratch};
use super::source::Loaded;
use super::{Failure, MAX_LOAD, MIN_BULK, PagerState};
use crate::SMALL_PAGE;

const ABANDON: u16 = 6;
const PAGE_FAULT: u16 = 9;
const DONE: u16 = 1;
const FAILED: u16 = 2;
/// Length of a request without its payload, and of a reply, in bytes.
const HEADER: usize = 16;
/// Length of the payload of a request for pages in bytes.
const PAYLOAD: usize = 16;
/// Capacity of the buffer for received requests in bytes.
const BUFFER: usize = 4096;
/// Maximum length of a request in bytes: the largest page of the architecture.
const MAX_LEN: u64 = 1 << 30;

/// Range of guest physical addresses whose memory is a part of a region.
#[derive(Clone, Debug)]
pub struct RequestRange {
    /// First guest physical address.
    pub address: u64,
    /// Length in bytes.
    pub len: u64,
    /// Index of the region.
    pub region: usize,
    /// Index, within the region, of the page at `address`.
    pub first: usize,
}

/// Reason why requests are no longer answered.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// A page cannot be loaded. The request was not answered.
    #[error("page {page} of region {region} cannot be loaded: {error}")]
    Load {
        /// Index of the region.
        region: usize,
        /// Index of the first requested page within the region.
        page: usize,
        /// Cause.
        error: LoadError,
    },
    /// The peer has sent something else than a valid request.
    #[error("{0}")]
    Invalid(String),
    /// The socket failed.
    #[error("{0}")]
    Io(#[from] io::Error),
}

/// Answers the requests that are received on a blocking stream socket, until the peer closes it or ends the
/// conversation. Returns whether the peer has ended it by a command.
pub fn answer(shared: &PagerState, socket: BorrowedFd<'_>, ranges: &[RequestRange]) -> Result<bool, RequestError> {
    check(shared, ranges)?;
    let mut requests = Requests { socket, buffer: [0; BUFFER], start: 0, end: 0 };
    let mut answering = Answering { shared, ranges, next: None, allocated: (0, 0), scratch: Scratch::default() };
    while let Some(header) = requests.take::<HEADER>("a request")? {
        let command = u16::from_le_bytes([header[0], header[1]]);
        let len = number(&header[8..]);
        match command {
            ABANDON => {
                // The peer may have closed the socket already.
                let _ = reply(socket, DONE);
                return Ok(true);
            }
            PAGE_FAULT if len == PAYLOAD as u64 => {}
            PAGE_FAULT => {
                return Err(requests.refuse(format!("a request for pages has {len} bytes, expected {PAYLOAD}")));
            }
            other => return Err(requests.refuse(format!("unexpected command {other}, expected {PAGE_FAULT}"))),
        }
        let Some(payload) = requests.take::<PAYLOAD>("the range of a request")? else {
            return Err(RequestError::Invalid("the connection ended before the range of a request".into()));
        };
        let begin = Instant::now();
        match answering.load(number(&payload), number(&payload[8..])) {
            Ok(()) => reply(socket, DONE)?,
            Err(RequestError::Invalid(words)) => return Err(requests.refuse(words)),
            Err(error) => return Err(error),
        }
        shared.loader.memory.counters.served(begin.elapsed());
    }
    Ok(false)
}

/// Checks that all ranges are parts of regions.
fn check(shared: &PagerState, ranges: &[RequestRange]) -> Result<(), RequestError> {
    let fits = |range: &RequestRange| {
        let region = shared.loader.memory.regions.get(range.region)?;
        range.address.checked_add(range.len)?;
        let pages = usize::try_from(range.len).ok()? / SMALL_PAGE;
        let whole = range.len.is_multiple_of(SMALL_PAGE as u64) && range.address.is_multiple_of(SMALL_PAGE as u64);
        (whole && range.first.checked_add(pages)? <= region.pages).then_some(())
    };
    match ranges.iter().find(|range| fits(range).is_none()) {
        Some(range) => {
            Err(RequestError::Invalid(format!("invalid range at address {:#x}: not in its region", range.address)))
        }
        None => Ok(()),
    }
}

fn number(bytes: &[u8]) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(value)
}

/// Buffered receiver. The monitor writes a request in two parts, which often arrive together.
struct Requests<'a> {
    socket: BorrowedFd<'a>,
    buffer: [u8; BUFFER],
    start: usize,
    end: usize,
}

impl Requests<'_> {
    /// Takes the next bytes. Returns `None` if the connection ended before the first of them.
    fn take<const LEN: usize>(&mut self, what: &str) -> Result<Option<[u8; LEN]>, RequestError> {
        while self.end - self.start < LEN {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
            match receive(self.socket, &mut self.buffer[self.end..])? {
                0 if self.end == 0 => return Ok(None),
                0 => return Err(RequestError::Invalid(format!("the connection ended within {what}"))),
                count => self.end += count,
            }
        }
        let mut taken = [0; LEN];
        taken.copy_from_slice(&self.buffer[self.start..self.start + LEN]);
        self.start += LEN;
        Ok(Some(taken))
    }

    /// Answers an invalid request with an error, and returns the error.
    fn refuse(&self, words: String) -> RequestError {
        // The peer may have closed the socket already.
        let _ = reply(self.socket, FAILED);
        RequestError::Invalid(words)
    }
}

/// Receives at least one byte; 0 at the end of the stream.
fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    loop {
        // SAFETY: the pointer and the length are those of `buffer`.
        let count = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
        if let Ok(count) = usize::try_from(count) {
            return Ok(count);
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::EINTR) => {}
            Some(libc::ECONNRESET) => return Ok(0),
            _ => return Err(error),
        }
    }
}

fn reply(socket: BorrowedFd<'_>, status: u16) -> io::Result<()> {
    let mut message = [0; HEADER];
    message[..2].copy_from_slice(&status.to_le_bytes());
    let mut rest = message.as_slice();
    while !rest.is_empty() {
        // SAFETY: the pointer and the length are those of `rest`.
        let count = unsafe { libc::send(socket.as_raw_fd(), rest.as_ptr().cast(), rest.len(), libc::MSG_NOSIGNAL) };
        match usize::try_from(count) {
            Ok(count) => rest = &rest[count..],
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

struct Answering<'a> {
    shared: &'a PagerState,
    ranges: &'a [RequestRange],
    /// Address after the last request.
    next: Option<u64>,
    /// Pages, counted over all regions, whose memory was allocated last.
    allocated: (usize, usize),
    scratch: Scratch,
}

impl Answering<'_> {
    /// Makes the pages of a request present in the file.
    fn load(&mut self, address: u64, len: u64) -> Result<(), RequestError> {
        let (region, first, count) = self.find(address, len)?;
        let _bringing = self.shared.loading.read();
        let memory = &self.shared.loader.memory;
        memory.counters.faults.fetch_add(1, Ordering::Relaxed);
        let base = memory.regions[region].base;
        let (start, end) = (base + first, base + first + count);
        let ordered = self.next.replace(address + len) == Some(address);
        let deferred = memory.flags.next(start, end);
        let loaded =
            self.load_deferred((start, end), deferred, ordered).and_then(|()| self.allocate(region, start, end));
        loaded.map_err(|error| {
            let message = error.to_string();
            self.shared.fail(Failure { region, page: first, accessed: true, message });
            RequestError::Load { region, page: first, error }
        })
    }

    fn find(&self, address: u64, len: u64) -> Result<(usize, usize, usize), RequestError> {
        let page = SMALL_PAGE as u64;
        if len == 0 || len > MAX_LEN || !len.is_multiple_of(page) || !address.is_multiple_of(page) {
            let words = format!("invalid request for {len} bytes at address {address:#x}: expected whole pages");
            return Err(RequestError::Invalid(words));
        }
        let within = |range: &&RequestRange| {
            address.checked_sub(range.address).is_some_and(|from| from < range.len && len <= range.len - from)
        };
        let found = self.ranges.iter().find(within).ok_or_else(|| {
            RequestError::Invalid(format!("request for {len} bytes at address {address:#x}, which is not memory"))
        })?;
        // All quotients fit: the range has been checked against its region.
        let pages = |bytes: u64| usize::try_from(bytes / page).unwrap_or(usize::MAX);
        Ok((found.region, found.first + pages(address - found.address), pages(len)))
    }

    fn load_deferred(
        &mut self,
        (start, end): (usize, usize),
        deferred: Option<usize>,
        ordered: bool,
    ) -> Result<(), LoadError> {
        let Some(page) = deferred else { return Ok(()) };
        let (shared, loader) = (self.shared, &self.shared.loader);
        // Another pager may have taken over: this pager could overwrite newer contents.
        if shared.stopping() {
            return Err(LoadError::Ended);
        }
        if ordered {
            loader.memory.counters.missed.fetch_add(1, Ordering::Relaxed);
        } else {
            loader.memory.missed(page);
        }
        if end - start == 1 {
            let window = loader.memory.regions[loader.memory.region_of(start)].window(start);
            shared.demanding.fetch_add(1, Ordering::AcqRel);
            let loaded = loader.load_for_fault(start, window, &mut self.scratch);
            shared.demanding.fetch_sub(1, Ordering::AcqRel);
            if let Loaded::Rest(fetched) = loaded? {
                shared.queue_rest(fetched);
            }
            // Another thread may have claimed the page, and still be writing it.
            return loader.load(start, end, &mut self.scratch);
        }
        for first in (start..end).step_by(MAX_LOAD) {
            let last = end.min(first + MAX_LOAD);
            if last - first < MIN_BULK {
                loader.load(first, last, &mut self.scratch)?;
            } else {
                loader.load_many(first, last, &mut self.scratch)?;
            }
        }
        Ok(())
    }

    /// Allocates the memory of pages, so that pages of zeros exist too; for a single page, that of its whole window.
    fn allocate(&mut self, region: usize, start: usize, end: usize) -> Result<(), LoadError> {
        if self.allocated.0 <= start && end <= self.allocated.1 {
            return Ok(());
        }
        let memory = &self.shared.loader.memory;
        let (first, last) = if end - start == 1 { memory.regions[region].window(start) } else { (start, end) };
        memory.allocate(region, first, last)?;
        self.allocated = (first, last);
        Ok(())
    }
}
