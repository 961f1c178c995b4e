//! Demand: threads that answer accesses. One of them waits for the next access, the others serve.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::memory::Scratch;
use super::source::Brought;
use super::{Failure, Shared};
use crate::SMALL_PAGE;
use crate::faults::Event;
use crate::uapi::{self, Userfault};

/// How often a thread that waits looks whether it should end.
const PATIENCE: Duration = Duration::from_millis(100);

/// A userfaultfd, and accesses read from it that nobody serves yet.
#[derive(Debug)]
pub struct Inbox {
    uffd: Arc<Userfault>,
    waiting: Mutex<VecDeque<u64>>,
}

impl Inbox {
    pub fn new(uffd: Arc<Userfault>) -> Self {
        Self { uffd, waiting: Mutex::default() }
    }
}

/// Serves the accesses of one address space until the pager ends.
pub fn serve(shared: &Shared, inbox: &Inbox) {
    uapi::short_slices();
    let (mut scratch, mut events) = (Scratch::default(), Vec::new());
    while !shared.stopping() {
        let Some(address) = next(shared, inbox, &mut events) else { continue };
        let begin = Instant::now();
        shared.demanding.fetch_add(1, Ordering::AcqRel);
        let brought = answer(shared, inbox, address, &mut scratch);
        shared.demanding.fetch_sub(1, Ordering::AcqRel);
        // What was asked for is served when it has come.
        if !matches!(brought, Some(Brought::Later)) {
            shared.memory.counters.served(begin.elapsed());
        }
        if let Some(Brought::Rest(fetched)) = brought {
            shared.ask(fetched);
        }
    }
}

/// The next access. While we wait here, whoever else would wait does so at the lock.
fn next(shared: &Shared, inbox: &Inbox, events: &mut Vec<Event>) -> Option<u64> {
    let mut waiting = inbox.waiting.lock();
    if waiting.is_empty() && inbox.uffd.wait(PATIENCE).ok()? {
        // Removals go on once they have been read: then no contents may be on their way to those pages.
        let _alone = shared.memory.removing.write();
        events.clear();
        shared.memory.take_reports();
        if inbox.uffd.read(events).is_err() {
            std::thread::sleep(PATIENCE);
        }
        let mut removed = Vec::new();
        for event in events.iter() {
            match *event {
                Event::Fault { address, protected: false } => waiting.push_back(address),
                Event::Fault { .. } => {}
                Event::Removal { start, end } => removed.extend(shared.pages_at(&inbox.uffd, start, end)),
            }
        }
        if !removed.is_empty() {
            shared.memory.removed(removed);
        }
    }
    waiting.pop_front()
}

/// Brings the page and lets the thread go on, now or when it has come; nothing where that cannot be.
fn answer(shared: &Shared, inbox: &Inbox, address: u64, scratch: &mut Scratch) -> Option<Brought> {
    let memory = &shared.memory;
    memory.counters.faults.fetch_add(1, Ordering::Relaxed);
    let Some(page) = shared.page_at(&inbox.uffd, address) else {
        let _ = inbox.uffd.wake(address, SMALL_PAGE as u64);
        return None;
    };
    match memory.touch(page, scratch) {
        Ok(brought) => Some(brought),
        Err(error) => {
            let (region, base) = (memory.region_of(page), memory.regions[memory.region_of(page)].base);
            let failure = Failure { region, page: page - base, accessed: true, message: error.to_string() };
            let new = shared.fail(failure);
            if shared.fatal {
                if new {
                    eprintln!("pageferry: page {} of region {region} cannot be read: {error}", page - base);
                }
                // There is nobody else to stop it: the access ends in SIGBUS, never in zeros. While a discard waits to
                // be read that cannot be: it is tried again.
                let len = memory.regions[region].page_size as u64;
                let start = address / len * len;
                if inbox.uffd.poison(start, len).is_err_and(|error| error.raw_os_error() == Some(libc::EAGAIN)) {
                    let _ = inbox.uffd.wake(start, len);
                }
            }
            None
        }
    }
}
