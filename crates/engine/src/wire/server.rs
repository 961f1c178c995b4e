//! The source's end of a post-copy migration: the pages of a paused workload, those asked for ahead of all others.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use parking_lot::Mutex;
use zerocopy::{FromZeros, IntoBytes};

use super::pace::Limit;
use super::request::{Asked, Request};
use super::sender::{Format, Outgoing, data_pages};
use super::socket::{Endpoint, Socket};
use super::{POSTCOPY, Progress, WireError, at_least_one, on_all, tune};
use crate::SLOTS;
use crate::mapping::Mapping;
use crate::pages::{AtomicBits, PageSet};
use crate::uapi::short_slices;

/// Pages of a block that is pushed: an access that comes meanwhile waits for no more than that.
const PIECE: usize = 64;
/// Bytes that may wait in the kernel for the link: an answer on another connection has those before it.
const UNSENT: libc::c_int = 256 << 10;

/// Serves pages of a paused workload: answers requests, and pushes everything else.
///
/// A page goes once, by push or by answer, whoever takes it first; only the page that an access waits for goes again
/// when it has been pushed already, for it may be far back in a queue. The first of both counts at the destination.
#[derive(Debug)]
pub struct PageServer {
    shared: Arc<Shared>,
    streams: Vec<Mutex<Outgoing>>,
    urgent: Mutex<Option<Outgoing>>,
    answering: Mutex<Option<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    regions: Vec<Arc<Mapping>>,
    pages: Vec<usize>,
    /// Per region, the pages that are in memory.
    data: Vec<PageSet>,
    /// Per region, the pages that are still to be sent.
    left: Vec<AtomicBits>,
    remaining: AtomicUsize,
    /// Region and page of it that the push goes on from.
    next: Mutex<(usize, usize)>,
    cancelled: Arc<AtomicBool>,
    /// Why requests are not answered any more.
    lost: Mutex<Option<WireError>>,
    reason: OnceLock<String>,
    requests: AtomicU64,
    progress: Progress,
}

impl PageServer {
    /// For `missing` pages of `regions`, which nobody writes to any more; `urgent` is for requests and their answers,
    /// the `streams` are for the push.
    ///
    /// # Errors
    /// InvalidInput without any stream or for sets that do not fit, or what the kernel says about a socket or a region.
    pub fn new(
        regions: Vec<Arc<Mapping>>,
        missing: &[PageSet],
        urgent: impl Into<Endpoint>,
        streams: Vec<impl Into<Endpoint>>,
        format: Format,
        patience: Duration,
    ) -> io::Result<Self> {
        let pages: Vec<usize> = regions.iter().map(|mapping| mapping.pages()).collect();
        if !missing.iter().map(PageSet::pages).eq(pages.iter().copied()) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "one set of pages for each region, over its pages",
            ));
        }
        let (cancelled, limit) = (Arc::new(AtomicBool::new(false)), Arc::new(Limit::new(format.bandwidth)));
        let outgoing = |socket: Endpoint, option, value| {
            tune(&socket.fd, option, value);
            let socket = Socket::new(socket, patience, cancelled.clone())?;
            Ok(Outgoing::new(socket, format, &limit, &cancelled))
        };
        let urgent = outgoing(urgent.into(), libc::TCP_NODELAY, 1)?.urgent();
        let push = |socket: Endpoint| outgoing(socket, libc::TCP_NOTSENT_LOWAT, UNSENT).map(Mutex::new);
        let streams = at_least_one(streams.into_iter().map(Into::into).map(push).collect::<io::Result<_>>()?)?;
        let shared = Shared {
            data: regions.iter().map(|mapping| data_pages(mapping)).collect::<io::Result<_>>()?,
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

    /// Answers requests from now on, until the peer closes the connection, or it is cancelled.
    pub fn start(&self) -> io::Result<()> {
        let Some(urgent) = self.urgent.lock().take() else { return Ok(()) };
        let shared = self.shared.clone();
        let thread =
            std::thread::Builder::new().name("pf-answer".to_owned()).spawn(move || shared.answer_all(urgent))?;
        *self.answering.lock() = Some(thread);
        Ok(())
    }

    /// Sends all pages that are still to be sent, and the end of it on every stream.
    ///
    /// # Errors
    /// Those of the streams. What goes wrong with requests ends the push too, and is told here.
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

    /// Ends all that is under way, soon; requests are not answered any more.
    pub fn cancel(&self) {
        self.shared.cancelled.store(true, Ordering::Release);
    }

    /// Why requests are not answered any more, if so.
    pub fn lost(&self) -> Option<String> {
        self.shared.reason.get().cloned()
    }

    /// What has been sent so far.
    pub fn progress(&self) -> &Progress {
        &self.shared.progress
    }

    /// Requests answered so far.
    pub fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Pages that are still to be sent.
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

impl Shared {
    fn answer_all(&self, mut urgent: Outgoing) {
        short_slices();
        let Err(error) = self.answer_each(&mut urgent);
        let everything = self.remaining.load(Ordering::Acquire) == 0;
        // When everything has been sent the peer may go.
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
                // Nobody needs anything at the moment.
                if !matches!(error, WireError::Stalled(_)) {
                    return Err(error);
                }
            }
            urgent.socket.read(rest)?;
            let Asked { region, first, end, page } = request.check(&self.pages)?;
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
            // Answers count for the limit: after many of them a page taken and not sent would be nobody's for long.
            out.turn()?;
            let Some((region, pages)) = self.piece() else { break };
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

    /// The next pages to push, which are the caller's to send: none of one large page before all of another.
    fn piece(&self) -> Option<(usize, Vec<usize>)> {
        let mut next = self.next.lock();
        let (from, at) = *next;
        let count = self.left.len();
        // The rest of its region, the regions after it in turn, and at last the start of its own.
        let turns = (0..=count).map(|turn| ((from + turn) % count, if turn == 0 { at } else { 0 }));
        for (region, at) in turns {
            let Some(first) = self.left[region].next(at) else { continue };
            let end = (first / SLOTS + 1) * SLOTS;
            let taken = (first..end.min(self.pages[region])).filter(|&page| self.take(region, page));
            let pages: Vec<usize> = taken.take(PIECE).collect();
            // Of those that were there a moment ago, answers may have taken all.
            *next = (region, pages.last().map_or(first, |page| page + 1));
            return Some((region, pages));
        }
        None
    }

    /// Takes a page upon oneself; false: it was sent, or somebody else is at it.
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
