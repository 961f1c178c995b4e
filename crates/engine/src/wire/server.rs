//! Source side of post-copy: serves the pages of a paused workload, requested pages first.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use zerocopy::{FromZeros, IntoBytes};

use super::pace::RateLimit;
use super::request::{PageRequest, Request};
use super::sender::{Format, Outgoing};
use super::socket::{Endpoint, Socket};
use super::{POSTCOPY, Progress, WireError, at_least_one, on_all, tune};
use crate::SLOTS;
use crate::mapping::Mapping;
use crate::pages::{AtomicBits, PageSet};
use crate::saver::PageOrigin;
use crate::uapi::short_slices;

/// Maximum number of pages in a pushed block. This limit bounds the delay of a reply to a request that is received
/// during the push of the block.
const CHUNK: usize = 64;
/// Maximum number of unsent bytes in the socket buffer of a pushing stream. Such bytes delay replies on the connection
/// for requests.
const UNSENT: libc::c_int = 256 << 10;

/// Server for the pages of a paused workload: replies to requests and pushes all other pages.
///
/// Each page is sent once, either pushed or in a reply, by the thread that takes it first. The exception is a page for
/// which a thread waits at the destination: it is sent again even if it has been pushed, because the push may be
/// delayed in a queue. The destination uses the copy that it receives first.
#[derive(Debug)]
pub struct PageServer {
    shared: Arc<ServerState>,
    streams: Vec<Mutex<Outgoing>>,
    urgent: Mutex<Option<Outgoing>>,
    answering: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct ServerState {
    regions: Vec<Arc<Mapping>>,
    pages: Vec<usize>,
    /// For each region, the pages that are present.
    data: Vec<PageSet>,
    /// For each region, the pages that have not been sent.
    left: Vec<AtomicBits>,
    remaining: AtomicUsize,
    /// Region and page at which the push continues.
    next: Mutex<(usize, usize)>,
    cancelled: Arc<AtomicBool>,
    /// Error that ended the replies to requests, until `push` returns it.
    lost: Mutex<Option<WireError>>,
    reason: OnceLock<String>,
    requests: AtomicU64,
    progress: Progress,
}

impl PageServer {
    /// Creates a server for the pages `missing` at the destination. The workload must no longer write to `regions`.
    /// Requests and replies use `urgent`; pages are pushed over `streams`.
    ///
    /// # Errors
    /// `InvalidInput` if `streams` is empty or if the sets do not match the regions; otherwise the error of the socket
    /// or mapping operation that failed.
    pub fn new(
        regions: Vec<Arc<Mapping>>,
        missing: &[PageSet],
        urgent: impl Into<Endpoint>,
        streams: Vec<impl Into<Endpoint>>,
        format: Format,
        timeout: Duration,
    ) -> io::Result<Self> {
        let pages: Vec<usize> = regions.iter().map(|mapping| mapping.pages()).collect();
        if !missing.iter().map(PageSet::pages).eq(pages.iter().copied()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "missing pages do not match the regions: expected one set per region, with as many pages as the region",
            ));
        }
        let (cancelled, limit) = (Arc::new(AtomicBool::new(false)), Arc::new(RateLimit::new(format.bandwidth)));
        let outgoing = |socket: Endpoint, option, value| {
            tune(&socket.fd, option, value);
            let socket = Socket::new(socket, timeout, cancelled.clone())?;
            Ok(Outgoing::new(socket, format, &limit, &cancelled))
        };
        let urgent = outgoing(urgent.into(), libc::TCP_NODELAY, 1)?.urgent();
        let push = |socket: Endpoint| outgoing(socket, libc::TCP_NOTSENT_LOWAT, UNSENT).map(Mutex::new);
        let streams = at_least_one(streams.into_iter().map(Into::into).map(push).collect::<io::Result<_>>()?)?;
        let shared = ServerState {
            data: regions
                .iter()
                .map(|mapping| PageOrigin::Shared(mapping.clone()).data_pages())
                .collect::<io::Result<_>>()?,
            left: missing.iter().map(AtomicBits::from).collect(),
            remaining: AtomicUsize::new(missing.iter().map(PageSet::count).sum()),
            next: Mutex::new((0, 0)),
            regions,
            pages,
            cancelled,
            lost: Mutex::default(),
            reason: OnceLock::new(),
            requests: AtomicU64::new(0),
            progress: Progress::default(),
        };
        Ok(Self { shared: Arc::new(shared), streams, urgent: Mutex::new(Some(urgent)), answering: Mutex::default() })
    }

    /// Starts the thread that replies to requests until the peer closes the connection or the server is cancelled. Does
    /// nothing if the thread is running.
    ///
    /// # Errors
    /// The error of creating the thread.
    pub fn start(&self) -> io::Result<()> {
        let Some(urgent) = self.urgent.lock().take() else { return Ok(()) };
        let shared = self.shared.clone();
        let thread =
            std::thread::Builder::new().name("pf-answer".to_owned()).spawn(move || shared.answer_all(urgent))?;
        *self.answering.lock() = Some(thread);
        Ok(())
    }

    /// Pushes all pages that have not been sent, followed by a barrier on every stream.
    ///
    /// # Errors
    /// The first error of any stream, or the error of the request connection, which cancels the push as well.
    pub fn push(&self) -> Result<(), WireError> {
        let pushed = on_all(&self.streams, &self.shared.cancelled, |stream| self.shared.push(stream));
        match pushed {
            Err(WireError::Cancelled) => {
                let lost = self.shared.lost.lock().take();
                Err(lost.unwrap_or(WireError::Cancelled))
            }
            other => other,
        }
    }

    /// Cancels the push and the replies to requests.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
    }

    /// Returns the error that ended the replies to requests, if any.
    pub fn lost(&self) -> Option<String> {
        self.shared.reason.get().cloned()
    }

    /// Returns the counters of the pages sent so far.
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// Returns the number of requests served so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Returns the number of pages that have not been sent.
    pub fn remaining(&self) -> usize {
        self.shared.remaining.load(Ordering::Acquire)
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        self.cancel();
        if let Some(thread) = self.answering.lock().take() {
            let _ = thread.join();
        }
    }
}

impl ServerState {
    fn answer_all(&self, mut urgent: Outgoing) {
        short_slices();
        let Err(error) = self.answer_each(&mut urgent);
        let everything = self.remaining.load(Ordering::Acquire) == 0;
        // The peer may close the connection once all pages have been sent.
        if matches!(error, WireError::Cancelled) || (everything && matches!(error, WireError::Closed)) {
            return;
        }
        let _ = self.reason.set(error.to_string());
        self.lost.lock().get_or_insert(error);
        self.cancelled.store(true, Ordering::Release);
    }

    fn answer_each(&self, urgent: &mut Outgoing) -> Result<std::convert::Infallible, WireError> {
        loop {
            let mut request = Request::new_zeroed();
            let (first, rest) = request.as_mut_bytes().split_at_mut(1);
            while let Err(error) = urgent.socket.read(first) {
                // The peer may stay silent while no thread waits for a page.
                if !matches!(error, WireError::Stalled(_)) {
                    return Err(error);
                }
            }
            urgent.socket.read(rest)?;
            let PageRequest { region, first, end, page } = request.check(&self.pages)?;
            self.requests.fetch_add(1, Ordering::Relaxed);
            *self.next.lock() = (region, end);
            if let Some(page) = page {
                self.take(region, page);
                self.add(urgent, region, page);
                urgent.flush(region, POSTCOPY, &self.progress)?;
            }
            for page in (first..end).filter(|&page| self.take(region, page)) {
                self.add(urgent, region, page);
                if urgent.is_full() {
                    urgent.flush(region, POSTCOPY, &self.progress)?;
                }
            }
            urgent.flush(region, POSTCOPY, &self.progress)?;
        }
    }

    fn push(&self, stream: &Mutex<Outgoing>) -> Result<(), WireError> {
        let mut out = stream.lock();
        short_slices();
        loop {
            // Replies consume bandwidth too: wait before pages are taken, so that taken pages are not delayed by the
            // limit.
            out.wait_for_turn()?;
            let Some((region, pages)) = self.chunk() else { break };
            for page in pages {
                self.add(&mut out, region, page);
                if out.is_full() {
                    out.flush(region, POSTCOPY, &self.progress)?;
                }
            }
            out.flush(region, POSTCOPY, &self.progress)?;
        }
        out.barrier(POSTCOPY, &self.progress)
    }

    /// Takes up to `CHUNK` pages of one 2 MiB unit to push. Returns their region and indices; the list of indices is
    /// empty if concurrent replies have taken the pages. Returns `None` if no pages are left. The push completes a unit
    /// before it starts another.
    fn chunk(&self) -> Option<(usize, Vec<usize>)> {
        let mut next = self.next.lock();
        let (from, at) = *next;
        let count = self.left.len();
        // Visit the current region from `at` on, then all other regions, and finally the start of the current region.
        let turns = (0..=count).map(|turn| ((from + turn) % count, if turn == 0 { at } else { 0 }));
        for (region, at) in turns {
            let Some(first) = self.left[region].next(at) else { continue };
            let end = (first / SLOTS + 1) * SLOTS;
            let taken = (first..end.min(self.pages[region])).filter(|&page| self.take(region, page));
            let pages: Vec<usize> = taken.take(CHUNK).collect();
            // Concurrent replies may have taken all of these pages.
            *next = (region, pages.last().map_or(first, |page| page + 1));
            return Some((region, pages));
        }
        None
    }

    /// Claims a page for sending. Returns false if the page has been sent or claimed.
    fn take(&self, region: usize, page: usize) -> bool {
        let taken = self.left[region].take(page);
        if taken {
            self.remaining.fetch_sub(1, Ordering::AcqRel);
        }
        taken
    }

    fn add(&self, out: &mut Outgoing, region: usize, page: usize) {
        if self.data[region].contains(page) {
            out.push_page(&self.regions[region], page, &self.progress);
        } else {
            out.push_absent(page, 1, &self.progress);
        }
    }
}
