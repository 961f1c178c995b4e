//! The destination's end of a post-copy migration: requests out, pages in.

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

/// Connections to a [`super::PageServer`]. What is to be done with the pages is up to the pager that it is given to.
#[derive(Debug)]
pub struct PeerSource {
    urgent: Arc<Socket>,
    /// Held while a request is written.
    asking: Mutex<()>,
    /// The first is that of the answers.
    streams: Vec<Mutex<Incoming>>,
    patience: Duration,
    cancelled: Arc<AtomicBool>,
    lost: Mutex<Option<String>>,
    taken: AtomicBool,
    ended: AtomicUsize,
    requests: AtomicU64,
    progress: Progress,
}

impl PeerSource {
    /// Over fresh connections: one for requests and their answers, the others for what is pushed. `patience`: how long
    /// an answer, or a byte in the middle of a block, may take.
    ///
    /// # Errors
    /// InvalidInput without any stream, or what the kernel says about a socket.
    pub fn new(urgent: impl Into<Endpoint>, streams: Vec<impl Into<Endpoint>>, patience: Duration) -> io::Result<Self> {
        let (cancelled, urgent) = (Arc::new(AtomicBool::new(false)), urgent.into());
        tune(&urgent.fd, libc::TCP_NODELAY, 1);
        let urgent = Arc::new(Socket::new(urgent, patience, cancelled.clone())?);
        let mut incoming = vec![Mutex::new(Incoming::new(urgent.clone()))];
        for socket in at_least_one(streams)? {
            let socket = Socket::new(socket.into(), patience, cancelled.clone())?;
            incoming.push(Mutex::new(Incoming::new(Arc::new(socket))));
        }
        Ok(Self {
            urgent,
            asking: Mutex::default(),
            streams: incoming,
            patience,
            cancelled,
            lost: Mutex::default(),
            taken: AtomicBool::new(false),
            ended: AtomicUsize::new(0),
            requests: AtomicU64::new(0),
            progress: Progress::default(),
        })
    }

    /// Why there is no connection any more, if so.
    pub fn lost(&self) -> Option<String> {
        self.lost.lock().clone()
    }

    /// Whether the source has pushed everything.
    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Acquire) == self.streams.len() - 1
    }

    /// Requests sent so far.
    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    /// What has been received so far.
    pub fn progress(&self) -> &Progress {
        &self.progress
    }

    /// How long an answer may take.
    pub(crate) fn patience(&self) -> Duration {
        self.patience
    }

    /// Claims it for a pager; false: another has it.
    pub(crate) fn take(&self) -> bool {
        !self.taken.swap(true, Ordering::AcqRel)
    }

    /// Ends all that is under way, soon.
    pub(crate) fn cancel(&self) {
        self.cancelled.store(true, Ordering::Release);
    }

    /// Whether nothing comes over it any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// The connection is of no use any more; the first reason is the one that is kept.
    pub(crate) fn lose(&self, reason: &dyn std::fmt::Display) {
        let mut lost = self.lost.lock();
        // Cancelled before: whatever went wrong since then, nobody needs it any more.
        if !self.cancelled.swap(true, Ordering::AcqRel) {
            lost.get_or_insert(reason.to_string());
        }
    }

    /// Asks for pages. Requests are small and few: it is written at once, whatever the source is doing.
    pub(crate) fn ask(&self, request: &Request) {
        let _alone = self.asking.lock();
        if self.cancelled.load(Ordering::Acquire) {
            return;
        }
        match self.urgent.write([request.as_bytes(), &[]]) {
            Ok(()) => drop(self.requests.fetch_add(1, Ordering::Relaxed)),
            Err(error) => self.lose(&error),
        }
    }

    /// Streams to read, the first of them that of the answers.
    pub(crate) fn streams(&self) -> usize {
        self.streams.len()
    }

    /// Reads one stream to its end: calls `place` with every block, whose data pages stand verified in the buffer.
    ///
    /// # Errors
    /// Those of `place`, and of the stream; an answer that does not come though one is `overdue` is one.
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
            // The push begins when the workload has been handed over; then it goes on to its end.
            let may_idle = |blocks| if urgent { !overdue() } else { blocks == 0 };
            let head = input.head(POSTCOPY, &self.progress, may_idle)?;
            if head.kind == Kind::Barrier {
                self.ended.fetch_add(usize::from(!urgent), Ordering::AcqRel);
                return if urgent {
                    Err(WireError::Order("a barrier among answers".to_owned()).into())
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
