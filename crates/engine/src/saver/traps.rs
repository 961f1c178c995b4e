//! Trap threads, which serve writes of the workload to unsaved blocks. There is one thread per process of the workload.

use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::SaveError;
use super::armed::Armed;
use super::staging::Origin;
use super::state::SaverState;
use super::trap_blocks::{COPYING, Copied, RELEASED, Runs, SAVED, UNSAVED};
use crate::SMALL_PAGE;
use crate::faults::{BATCH, Event};
use crate::segment::{Segment, register_for_writes};
use crate::space::AdoptError;
use crate::uapi::{self, Userfault};

/// Time for which a trap thread polls for the next trap before it sleeps, because a wake-up takes longer than a trap.
const SPIN: Duration = Duration::from_micros(30);

/// Registers segments, with one userfaultfd per process. Does not write-protect them.
pub(super) fn register(segments: Vec<Segment>) -> Result<Vec<Armed>, AdoptError> {
    let features = uapi::FEATURE_PAGEFAULT_FLAG_WP | uapi::FEATURE_WP_HUGETLBFS_SHMEM | uapi::FEATURE_WP_UNPOPULATED;
    let registered = register_for_writes(segments, |space| space.full_userfault(features))?;
    Ok(registered.into_iter().map(|(segment, uffd)| Armed { segment, uffd }).collect())
}

/// Returns the userfaultfd of each process.
pub(super) fn processes(armed: &[Armed]) -> Vec<Arc<Userfault>> {
    let mut found: Vec<Arc<Userfault>> = Vec::new();
    for Armed { uffd, .. } in armed {
        if !found.iter().any(|other| Arc::ptr_eq(other, uffd)) {
            found.push(uffd.clone());
        }
    }
    found
}

/// Serves the traps of a process until the peer socket of `wakeup` is closed. Fails the checkpoint on an error.
pub(super) fn serve(shared: &SaverState, uffd: &Arc<Userfault>, wakeup: &UnixStream, slots: &Sender<Copied>) {
    let mut events = Vec::new();
    let mut idle = Instant::now();
    loop {
        events.clear();
        if let Err(error) = uffd.read(&mut events, BATCH) {
            shared.fail(SaveError::Memory(error));
            return;
        }
        for event in &events {
            if let Event::Fault { address, protected: true } = *event {
                trap(shared, uffd, address, slots);
            }
        }
        if !events.is_empty() {
            idle = Instant::now();
        } else if idle.elapsed() < SPIN {
            std::hint::spin_loop();
        } else if sleep(uffd, wakeup) {
            return;
        } else {
            idle = Instant::now();
        }
    }
}

/// Waits for a trap. Returns whether the peer socket of `wakeup` was closed.
fn sleep(uffd: &Arc<Userfault>, wakeup: &UnixStream) -> bool {
    let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut polls = [poll(uffd.as_raw_fd()), poll(wakeup.as_raw_fd())];
    // SAFETY: `polls` consists of two pollfds, and lives through the call.
    let ready = unsafe { libc::poll(polls.as_mut_ptr(), 2, -1) };
    ready > 0 && polls[1].revents != 0
}

fn trap(shared: &SaverState, uffd: &Arc<Userfault>, address: u64, slots: &Sender<Copied>) {
    let begin = Instant::now();
    let holds = |armed: &&Armed| {
        let Segment { address: start, len, .. } = armed.segment;
        Arc::ptr_eq(&armed.uffd, uffd) && (start..start + len).contains(&address)
    };
    let Some(armed) = shared.armed.iter().find(holds) else { return };
    let segment = &armed.segment;
    let area = &shared.areas[segment.region];
    let block = (segment.first_page + segment.page_of(address)) * SMALL_PAGE / area.trap_block;
    if shared.release_before_snapshot(armed, block) {
        return;
    }
    if let Err(error) = save(shared, segment.region, block, slots) {
        shared.fail(error);
    }
    if let Err(error) = shared.release_block(armed, block) {
        shared.fail(error);
    }
    shared.stats.trap(begin.elapsed());
}

fn save(shared: &SaverState, region: usize, block: usize, slots: &Sender<Copied>) -> Result<(), SaveError> {
    let area = &shared.areas[region];
    if area.state(block) == UNSAVED {
        let Some((mut slot, waited)) = shared.staging.take(Origin::Trap) else { return Ok(()) };
        shared.stats.staging_waits.fetch_add(u64::from(waited), Ordering::Relaxed);
        if area.change(block, UNSAVED, COPYING) {
            let copied = area.copy(block, &mut slot);
            area.set(block, SAVED);
            let Runs { present: runs, absent } = copied.map_err(SaveError::Memory)?;
            let page = block * area.trap_block / SMALL_PAGE;
            let _ = slots.send(Copied { region, page, runs, absent, slot, origin: Origin::Trap });
            return Ok(());
        }
        shared.staging.give(slot);
    }
    area.await_saved(block);
    debug_assert!(shared.failed() || area.state(block) != RELEASED);
    Ok(())
}
