//! Peer as the origin of contents. A demand thread requests the window of a fault; the thread that receives the pages
//! maps them.
//!
//! No thread waits for the network while it holds a lock that other threads need. After a request, the demand thread
//! continues with the next fault. Each stream has a thread that reads, verifies and installs blocks. Requests are
//! recorded until their pages are present, so that they can be repeated on another connection if the current one is
//! lost. Faulting threads stay blocked until their pages are present.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use thiserror::Error;

use super::memory::{LoadError, Memory, Scratch};
use crate::block::Head;
use crate::uapi::short_slices;
use crate::wire::{MAX_REQUEST, PeerSource, Request, WireError};

/// Maximum number of pages per request that is not caused by a fault. This limit bounds the delay of replies to faults.
const BATCH: usize = 64;
/// Interval at which a waiting thread checks the connection.
const SLICE: Duration = Duration::from_millis(20);

/// Peer that holds the deferred contents, reached through one connection at a time.
#[derive(Debug)]
pub struct Peer {
    link: Mutex<Arc<PeerSource>>,
    /// Requested page ranges that have deferred pages.
    waiting: Mutex<HashMap<(usize, usize), Want>>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy)]
struct Want {
    /// Faulting page; `None` without a fault, or if the page cannot be mapped alone.
    page: Option<usize>,
    /// Whether a fault still waits for the range.
    accessed: bool,
    since: Instant,
    /// Time of the last request.
    requested: Instant,
}

/// Reason why a connection is no longer used.
#[derive(Debug, Error)]
enum LinkError {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Load(#[from] LoadError),
}

impl Peer {
    pub fn new(link: Arc<PeerSource>) -> Self {
        Self { link: Mutex::new(link), waiting: Mutex::default(), changed: Condvar::new() }
    }

    /// Returns the current connection, even if it is lost.
    pub fn link(&self) -> Arc<PeerSource> {
        self.link.lock().clone()
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<(usize, usize), Want>> {
        self.waiting.lock()
    }

    /// Switches to another connection, and repeats all requests on it.
    pub fn reconnect(&self, memory: &Memory, link: Arc<PeerSource>) {
        *self.link.lock() = link.clone();
        let wanted: Vec<_> = self
            .waiting()
            .iter_mut()
            .map(|(range, want)| {
                want.requested = Instant::now();
                (*range, want.page)
            })
            .collect();
        wanted.into_iter().for_each(|(range, page)| send(memory, &link, range, page));
    }

    /// Requests the window of a fault, unless the window has already been requested. `page` is the faulting page, if it
    /// can be mapped alone. Returns whether that page is present; without `page`, whether the whole window is present.
    pub fn fetch(&self, memory: &Memory, range: (usize, usize), page: Option<usize>) -> bool {
        self.request(memory, range, page, true);
        let (first, end) = page.map_or(range, |page| (page, page + 1));
        memory.flags.next(first, end).is_none()
    }

    fn request(&self, memory: &Memory, range: (usize, usize), page: Option<usize>, accessed: bool) {
        let now = Instant::now();
        let want = Want { page, accessed, since: now, requested: now };
        {
            let mut waiting = self.waiting();
            // Do not add an entry for present pages: entries are removed only when pages are installed.
            if memory.flags.next(range.0, range.1).is_none() || waiting.contains_key(&range) {
                return;
            }
            waiting.insert(range, want);
        }
        send(memory, &self.link(), range, page);
    }

    /// Removes the requests whose pages have been installed. Counts the service time of each fault whose page is
    /// present.
    fn settle(&self, memory: &Memory) {
        let mut waiting = self.waiting();
        let before = waiting.len();
        waiting.retain(|&(first, end), want| {
            let missing = memory.flags.next(first, end).is_some();
            if want.accessed && want.page.map_or(!missing, |page| !memory.flags.is_set(page)) {
                memory.counters.served(want.since.elapsed());
                want.accessed = false;
            }
            missing
        });
        if waiting.len() < before {
            self.changed.notify_all();
        }
    }

    /// Returns whether a request with deferred pages is older than `timeout`.
    fn is_overdue(&self, timeout: Duration) -> bool {
        self.waiting().values().any(|want| want.requested.elapsed() > timeout)
    }

    /// Loads the deferred pages of a range, for readers that bypass the workload's page tables.
    pub fn load(&self, memory: &Memory, first: usize, end: usize) -> Result<(), LoadError> {
        let mut at = first;
        while let Some(page) = memory.flags.next(at, end) {
            at = end.min(page + BATCH).min(memory.regions[memory.region_of(page)].end());
            self.request(memory, (page, at), None, false);
            let mut waiting = self.waiting();
            while memory.flags.next(page, at).is_some() {
                let link = self.link();
                if link.is_cancelled() {
                    let reason = link.lost().unwrap_or_else(|| "the pager has been stopped".to_owned());
                    return Err(LoadError::Lost(reason));
                }
                self.changed.wait_for(&mut waiting, SLICE);
            }
        }
        Ok(())
    }

    /// Reads one stream of a connection until the stream ends or the connection is cancelled, and installs its pages
    /// through `install`. On an error, marks the connection as lost if there are deferred pages.
    pub fn receive(
        &self,
        memory: &Memory,
        link: &PeerSource,
        stream: usize,
        install: impl Fn(&Head, &mut Scratch) -> Result<(), LoadError>,
    ) {
        short_slices();
        let mut scratch = Scratch::default();
        let mut buffer = Vec::new();
        let overdue = || self.is_overdue(link.timeout());
        let ended: Result<(), LinkError> = link.receive(stream, &mut buffer, overdue, |head, contents| {
            std::mem::swap(contents, &mut scratch.contents);
            let installed = install(head, &mut scratch);
            std::mem::swap(contents, &mut scratch.contents);
            self.settle(memory);
            Ok(installed?)
        });
        if let Err(error) = ended
            && memory.flags.any()
        {
            link.lose(&error);
        }
    }
}

fn send(memory: &Memory, link: &PeerSource, (first, end): (usize, usize), page: Option<usize>) {
    let region = memory.region_of(first);
    let base = memory.regions[region].base;
    for start in (first..end).step_by(MAX_REQUEST) {
        let stop = end.min(start + MAX_REQUEST);
        link.request(&Request::new(region, (start - base, stop - base), page.map(|page| page - base)));
    }
}
