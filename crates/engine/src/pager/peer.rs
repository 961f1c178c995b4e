//! A peer as the source: accesses ask for their window and wait, whoever receives its pages installs and maps them.
//!
//! Nobody here waits for the network while holding what somebody else needs: a demand thread asks and goes on to the
//! next access; each stream has a thread that reads, verifies and installs; what has been asked for is kept until it is
//! there, so that another connection can go on where one was lost. Until then accesses wait.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use thiserror::Error;

use super::Shared;
use super::memory::{LoadError, Memory, Scratch};
use super::source::{Brought, Source};
use crate::uapi::short_slices;
use crate::wire::{MAX_REQUEST, PeerSource, Request, WireError};

/// Pages that are asked for at a time where nobody waits at an access: answers to those have none of them before them.
const BATCH: usize = 64;
/// How often somebody who waits looks whether the connection is still there.
const SLICE: Duration = Duration::from_millis(20);

/// The other end, through one connection after the other.
#[derive(Debug)]
pub struct Peer {
    link: Mutex<Arc<PeerSource>>,
    /// Ranges that have been asked for and are not there yet.
    waiting: Mutex<HashMap<(usize, usize), Want>>,
    changed: Condvar,
}

#[derive(Debug, Clone, Copy)]
struct Want {
    /// The page that the access is to, where it can be had alone.
    page: Option<usize>,
    /// Whether it is an access that waits (still).
    accessed: bool,
    since: Instant,
    /// When the connection was asked.
    asked: Instant,
}

/// What ends a connection.
#[derive(Debug, Error)]
enum Trouble {
    #[error(transparent)]
    Wire(#[from] WireError),
    #[error(transparent)]
    Load(#[from] LoadError),
}

impl Peer {
    pub fn new(link: Arc<PeerSource>) -> Self {
        Self { link: Mutex::new(link), waiting: Mutex::default(), changed: Condvar::new() }
    }

    /// The connection, or the last one.
    pub fn link(&self) -> Arc<PeerSource> {
        self.link.lock().clone()
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<(usize, usize), Want>> {
        self.waiting.lock()
    }

    /// Goes on with another connection: asks it for everything that is waited for.
    pub fn reconnect(&self, memory: &Memory, link: Arc<PeerSource>) {
        *self.link.lock() = link.clone();
        let wanted: Vec<_> = self
            .waiting()
            .iter_mut()
            .map(|(range, want)| {
                want.asked = Instant::now();
                (*range, want.page)
            })
            .collect();
        wanted.into_iter().for_each(|(range, page)| send(memory, &link, range, page));
    }

    /// Asks for the window of an access, unless that has been done; `page` is the one accessed, where it can be alone.
    pub fn bring(&self, memory: &Memory, range: (usize, usize), page: Option<usize>) -> Brought {
        self.ask(memory, range, page, true);
        let (first, end) = page.map_or(range, |page| (page, page + 1));
        if memory.flags.next(first, end).is_none() { Brought::All } else { Brought::Later }
    }

    fn ask(&self, memory: &Memory, range: (usize, usize), page: Option<usize>, accessed: bool) {
        let now = Instant::now();
        let want = Want { page, accessed, since: now, asked: now };
        {
            let mut waiting = self.waiting();
            // It is taken out when its pages come: of those that have come already nobody would do that.
            if memory.flags.next(range.0, range.1).is_none() || waiting.contains_key(&range) {
                return;
            }
            waiting.insert(range, want);
        }
        send(memory, &self.link(), range, page);
    }

    /// Pages have been installed: what is not waited for any more is struck out.
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

    /// Whether an answer takes too long.
    fn is_overdue(&self, patience: Duration) -> bool {
        self.waiting().values().any(|want| want.asked.elapsed() > patience)
    }

    /// Brings what is missing of a range, for who reads it past the workload's page tables.
    pub fn load(&self, memory: &Memory, first: usize, end: usize) -> Result<(), LoadError> {
        let mut at = first;
        while let Some(page) = memory.flags.next(at, end) {
            at = end.min(page + BATCH).min(memory.regions[memory.region_of(page)].end());
            self.ask(memory, (page, at), None, false);
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
}

fn send(memory: &Memory, link: &PeerSource, (first, end): (usize, usize), page: Option<usize>) {
    let region = memory.region_of(first);
    let base = memory.regions[region].base;
    for start in (first..end).step_by(MAX_REQUEST) {
        let stop = end.min(start + MAX_REQUEST);
        link.ask(&Request::new(region, (start - base, stop - base), page.map(|page| page - base)));
    }
}

/// Installs what comes over one stream of a connection until it ends, or somebody ends it.
pub fn receive(shared: &Shared, link: &PeerSource, stream: usize) {
    let Source::Peer(peer) = &shared.memory.source else { return };
    short_slices();
    let mut scratch = Scratch::default();
    let mut buffer = Vec::new();
    let overdue = || peer.is_overdue(link.patience());
    let ended: Result<(), Trouble> = link.receive(stream, &mut buffer, overdue, |head, contents| {
        std::mem::swap(contents, &mut scratch.contents);
        let installed = shared.memory.install_sent(head, &mut scratch);
        std::mem::swap(contents, &mut scratch.contents);
        peer.settle(&shared.memory);
        Ok(installed?)
    });
    if let Err(error) = ended
        && shared.memory.flags.any()
    {
        link.lose(&error);
    }
}
