//! Destination side of post-copy: sends page requests and receives pages.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use zerocopy::IntoBytes;

use super::receiver::Incoming;
use super::request::Request;
use super::socket::{Endpoint, Socket};
use super::{POSTCOPY, Progress, WireError, at_least_one, tune};
use crate::block::{Head, Kind};

/// Connections to a [`super::PageServer`]. The pager that owns this source installs the received pages.
#[derive(Debug)]
pub struct PeerSource {
    urgent: Arc<Socket>,
    /// Locked while a request is written.
    writing: Mutex<()>,
    /// Incoming streams; the first carries the replies to requests.
    streams: Vec<Mutex<Incoming>>,
    timeout: Duration,
    cancelled: Arc<AtomicBool>,
    lost: Mutex<Option<String>>,
    taken: AtomicBool,
    ended: AtomicUsize,
    requests: AtomicU64,
    progress: Progress,
}

impl PeerSource {
    /// Wraps new connections: `urgent` for requests and their replies, `streams` for pushed pages. `timeout` bounds the
    /// wait for a reply, and for the next byte within a block.
    ///
    /// # Errors
    /// `InvalidInput` if `streams` is empty; otherwise the error of the socket operation that failed.
    pub fn new(urgent: impl Into<Endpoint>, streams: Vec<impl Into<Endpoint>>, timeout: Duration) -> io::Result<Self> {
        let (cancelled, urgent) = (Arc::new(AtomicBool::new(false)), urgent.into());
        tune(&urgent.fd, libc::TCP_NODELAY, 1);
        let urgent = Arc::new(Socket::new(urgent, timeout, cancelled.clone())?);
        let mut incoming = vec![Mutex::new(Incoming::new(urgent.clone()))];
        for socket in at_least_one(streams)? {
            let socket = Socket::new(socket.into(), timeout, cancelled.clone())?;
            incoming.push(Mutex::new(Incoming::new(Arc::new(socket))));
        }
        Ok(Self {
            urgent,
            writing: Mutex::default(),
            streams: incoming,
            timeout,
            cancelled,
            lost: Mutex::default(),
            taken: AtomicBool::new(false),
            ended: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
            progress: Progress::default(),
        })
    }

    /// Returns the reason why the connection was lost; `None` if it was not lost.
    pub fn lost(&self) -> Option<String> {
        self.lost.lock().clone()
    }

    /// Returns whether the source has pushed all pages.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire) == self.streams.len() - 1
    }

    /// Returns the number of requests sent so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// Returns the counters of the received pages.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// Returns the timeout for replies.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Claims this source for a pager. Returns false if another pager has claimed it.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }

    /// Cancels all transfers.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Returns whether the transfers have been cancelled or the connection was lost.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Cancels all transfers, and records the reason why the connection is lost. Keeps only the first reason.
    pub(crate) fn lose(&self, reason: &dyn std::fmt::Display) {
        let mut lost = self.lost.lock();
        // Do not record errors after a cancellation: they are its consequence.
        if !self.cancelled.swap(true, Ordering::AcqRel) {
            lost.get_or_insert(reason.to_string());
        }
    }

    /// Sends a page request. Requests are small and infrequent, so writing one does not block.
    pub(crate) fn request(&self, request: &Request) {
        let _alone = self.writing.lock();
        if self.cancelled.load(Ordering::Acquire) {
            return;
        }
        match self.urgent.write([request.as_bytes(), &[]]) {
            Ok(()) => drop(self.requests.fetch_add(1, Ordering::Relaxed)),
            Err(error) => self.lose(&error),
        }
    }

    /// Returns the number of incoming streams; the first carries replies.
    pub(crate) fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Reads one stream to its end. Calls `place` for every block, with the verified data pages in `contents`.
    ///
    /// # Errors
    /// Errors of `place` and of the stream, including a timeout while `overdue` reports that a reply is late.
    pub(crate) fn receive<E: From<WireError>>(
        &self,
        stream: usize,
        contents: &mut Vec<u8>,
        overdue: impl Fn() -> bool,
        mut place: impl FnMut(&Head, &mut Vec<u8>) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut input = self.streams[stream].lock();
        let urgent = stream == 0;
        loop {
            // The source starts to push only after the hand-over of the workload, and then pushes without pauses. The
            // stream for replies may be idle unless a reply is late.
            let may_idle = |blocks| if urgent { !overdue() } else { blocks == 0 };
            let head = input.head(POSTCOPY, &self.progress, may_idle)?;
            if head.kind == Kind::Barrier {
                self.ended.fetch_add(usize::from(!urgent), Ordering::AcqRel);
                return if urgent {
                    Err(WireError::Order("barrier on the stream for replies".to_owned()).into())
                } else {
                    Ok(())
                };
            }
            input.contents(&head, contents)?;
            for run in &head.runs {
                self.progress.count(run.class, run.count);
            }
            place(&head, contents)?;
        }
    }
}
