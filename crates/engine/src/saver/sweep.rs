//! Background sweep: saves all blocks that traps do not save, at a limited rate, and unprotects them in large ranges.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use super::staging::Origin;
use super::state::SaverState;
use super::trace_handover::Kept;
use super::trap_blocks::{Area, COPYING, Copied, Runs, SAVED, UNSAVED};
use super::{SaveError, trouble};
use crate::{LARGE_PAGE, SMALL_PAGE};

/// Longest sleep between two checks for cancellation.
const SLICE: Duration = Duration::from_millis(20);

/// Time to wait for notifications of discards. The kernel sends them after the discard.
const NOTICE: Duration = Duration::from_millis(5);

/// Saves all blocks that traps have not saved. Fails the checkpoint on an error, or if memory was discarded. Returns
/// early if the checkpoint has failed.
pub(super) fn run(shared: &SaverState, slots: &Sender<Copied>, bandwidth: u64) {
    let mut pace = RateLimit::new(bandwidth);
    for region in 0..shared.areas.len() {
        if let Err(error) = region_of(shared, slots, region, &mut pace) {
            shared.fail(error);
            return;
        }
    }
    std::thread::sleep(NOTICE);
    match shared.discards.seen() {
        Ok(false) => {}
        Ok(true) => shared.fail(SaveError::Discarded),
        Err(error) => shared.fail(SaveError::Memory(error)),
    }
}

fn region_of(
    shared: &SaverState,
    slots: &Sender<Copied>,
    region: usize,
    pace: &mut RateLimit,
) -> Result<(), SaveError> {
    let area = &shared.areas[region];
    let blocks_at_once = (LARGE_PAGE / area.trap_block).max(1);
    let mut kept = shared.follow.as_ref().map(|_| Kept::default());
    // In hugetlbfs, scan once: a page allocated later was a hole at the snapshot point.
    let known = if area.hugetlb { Some(area.source.data_ranges().map_err(SaveError::Memory)?) } else { None };
    for first in (0..area.blocks()).step_by(blocks_at_once) {
        let end = (first + blocks_at_once).min(area.blocks());
        let (from, to) = (area.bounds(first).0, area.bounds(end - 1).0 + area.bounds(end - 1).1);
        let data = match &known {
            Some(ranges) => ranges.clone(),
            None => area.source.data_within(from, to).map_err(SaveError::Memory)?,
        };
        if let Some(kept) = &mut kept {
            kept.begin(from, to - from);
        }
        for block in first..end {
            let (start, len) = area.bounds(block);
            if data.iter().any(|&(from, to)| from < start + len && start < to) {
                save(shared, slots, region, block, pace, kept.as_mut())?;
            } else {
                // An unsaved block is protected: if it has no data now, it had none at the snapshot point.
                area.change(block, UNSAVED, SAVED);
            }
        }
        (first..end).for_each(|block| area.await_saved(block));
        match &kept {
            Some(kept) => shared.hand_over(region, from, to, kept)?,
            None => shared.release(region, from, to - from)?,
        }
    }
    Ok(())
}

fn save(
    shared: &SaverState,
    slots: &Sender<Copied>,
    region: usize,
    block: usize,
    pace: &mut RateLimit,
    kept: Option<&mut Kept>,
) -> Result<(), SaveError> {
    let area: &Area = &shared.areas[region];
    if area.state(block) != UNSAVED {
        return Ok(());
    }
    pace.wait(|| shared.failed());
    let Some((mut slot, _)) = shared.staging.take(Origin::Sweep) else { return Err(SaveError::Cancelled) };
    if !area.change(block, UNSAVED, COPYING) {
        shared.staging.give(slot);
        return Ok(());
    }
    let copied = area.copy(block, &mut slot);
    area.set(block, SAVED);
    let Runs { present: runs, absent } = copied.map_err(trouble)?;
    if let Some(kept) = kept {
        for &(first, end) in &runs {
            let (first, end) = (first * SMALL_PAGE, end * SMALL_PAGE);
            kept.keep(area.bounds(block).0 + first, &slot[first..end]);
        }
    }
    pace.count(area.bounds(block).1);
    shared.stats.swept.fetch_add(1, Ordering::Relaxed);
    let page = area.bounds(block).0 / SMALL_PAGE;
    let _ = slots.send(Copied { region, page, runs, absent, slot, origin: Origin::Sweep });
    Ok(())
}

/// Rate limit of copies while the workload runs: at most `bandwidth` bytes per second since `since`, unlimited if 0.
/// `bytes` is the number of bytes copied so far.
#[derive(Debug)]
pub(super) struct RateLimit {
    since: Instant,
    bytes: u64,
    bandwidth: u64,
}

impl RateLimit {
    pub(super) fn new(bandwidth: u64) -> Self {
        Self { since: Instant::now(), bytes: 0, bandwidth }
    }

    /// Counts `bytes` copied bytes.
    pub(super) fn count(&mut self, bytes: usize) {
        self.bytes += bytes as u64;
    }

    /// Sleeps while the copies are ahead of the limit. Returns early if `given_up` returns true.
    pub(super) fn wait(&self, given_up: impl Fn() -> bool) {
        if self.bandwidth == 0 {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let due = Duration::from_secs_f64(self.bytes as f64 / self.bandwidth as f64);
        while !given_up() {
            match due.checked_sub(self.since.elapsed()) {
                Some(early) if early > Duration::from_micros(200) => std::thread::sleep(early.min(SLICE)),
                _ => return,
            }
        }
    }
}
