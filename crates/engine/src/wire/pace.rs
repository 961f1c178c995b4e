//! How fast blocks leave: a limit for all streams together, and a codec that is left out where it only slows down.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::WireError;
use crate::block::Codec;

/// Longest sleep of a stream that is ahead of the limit: then it looks whether it has been cancelled.
const SLICE: Duration = Duration::from_millis(20);
/// So much of a limit that was not used may be caught up with: what sleeps take longer than they should.
const BURST: Duration = Duration::from_millis(20);

/// Most bytes per second, over all streams that share it.
#[derive(Debug)]
pub(super) struct Limit {
    bandwidth: u64,
    /// When all bytes so far should have left.
    due: Mutex<Instant>,
}

impl Limit {
    /// Without any for 0 bytes per second.
    pub(super) fn new(bandwidth: u64) -> Self {
        Self { bandwidth, due: Mutex::new(Instant::now()) }
    }

    /// Counts bytes that leave now; returns when they may.
    fn take(&self, bytes: usize, now: Instant) -> Instant {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let time = Duration::from_secs_f64(bytes as f64 / self.bandwidth as f64);
        let mut due = self.due.lock();
        let start = (*due).max(now.checked_sub(BURST).unwrap_or(now));
        *due = start + time;
        start
    }

    /// Waits until so many bytes may leave; those that are `urgent` count, and leave at once.
    pub(super) fn wait(&self, bytes: usize, urgent: bool, cancelled: &AtomicBool) -> Result<(), WireError> {
        if self.bandwidth == 0 {
            return Ok(());
        }
        let start = self.take(bytes, Instant::now());
        if urgent {
            return Ok(());
        }
        sleep_until(|| start, cancelled)
    }

    /// Waits until something may leave at once, whatever leaves meanwhile.
    pub(super) fn wait_for_turn(&self, cancelled: &AtomicBool) -> Result<(), WireError> {
        sleep_until(|| *self.due.lock(), cancelled)
    }
}

fn sleep_until(time: impl Fn() -> Instant, cancelled: &AtomicBool) -> Result<(), WireError> {
    loop {
        let early = time().saturating_duration_since(Instant::now());
        if early.is_zero() {
            return Ok(());
        }
        if cancelled.load(Ordering::Relaxed) {
            return Err(WireError::Cancelled);
        }
        std::thread::sleep(early.min(SLICE));
    }
}

/// Blocks between two trials of the other way, first and most.
const GAPS: (u32, u32) = (32, 1024);
/// Blocks of a trial; the first half of them only fills, or empties, what the kernel has of buffers.
const TRIAL: u32 = 16;
/// What the other way must be faster by.
const GAIN: f64 = 1.2;

/// Whether to compress, by what both ways have cost: time per byte before compression, packing and writing together.
///
/// Neither is known without trying: a codec hides how fast the link is, and without it one does not see how well the
/// data compresses. So the other way is tried for some blocks now and then, the less often the more often it was no
/// better; compressing on, not at all while writing takes longer than packing, for then the link is what is slow.
#[derive(Debug)]
pub(super) struct Adaptive {
    codec: Codec,
    enabled: bool,
    packed: bool,
    /// Seconds per byte, of plain and of packed blocks.
    cost: [f64; 2],
    /// Of packed blocks, what packing takes.
    packing: f64,
    gap: u32,
    /// Blocks to the next trial, then blocks of the trial that are left.
    left: u32,
    trying: bool,
}

impl Adaptive {
    /// With `enabled` false it is always the codec.
    pub(super) fn new(codec: Codec, enabled: bool) -> Self {
        let enabled = enabled && codec != Codec::None;
        Self { codec, enabled, packed: true, cost: [0.0; 2], packing: 0.0, gap: GAPS.0, left: GAPS.0, trying: false }
    }

    /// The codec of the next block.
    pub(super) fn codec(&self) -> Codec {
        if self.packed != self.trying { self.codec } else { Codec::None }
    }

    /// Whether that is not the codec that was asked for.
    pub(super) fn left_out(&self, codec: Codec) -> bool {
        codec != self.codec
    }

    /// A block of `raw` bytes has left: how long it took to pack it, and to write it.
    pub(super) fn note(&mut self, raw: usize, packing: Duration, writing: Duration) {
        if !self.enabled || raw == 0 {
            return;
        }
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let per_byte = |time: Duration| time.as_secs_f64() / raw as f64;
        let packed = self.packed != self.trying;
        if packed {
            average(&mut self.packing, per_byte(packing));
        }
        if !self.trying || self.left <= TRIAL / 2 {
            average(&mut self.cost[usize::from(packed)], per_byte(packing + writing));
        }
        self.left = self.left.saturating_sub(1);
        if self.left == 0 {
            self.turn();
        }
    }

    /// A trial is due, or has ended.
    fn turn(&mut self) {
        let (ours, other) = (usize::from(self.packed), usize::from(!self.packed));
        if self.trying {
            self.trying = false;
            let better = self.cost[other] * GAIN < self.cost[ours];
            self.packed = self.packed != better;
            self.gap = if better { GAPS.0 } else { (self.gap * 2).min(GAPS.1) };
        } else {
            // The link alone decides, or the codec alone would: no need to try.
            let writing = if self.packed { self.cost[1] - self.packing } else { self.cost[0] };
            self.trying = if self.packed { writing < self.packing } else { writing > self.packing };
            self.cost[other] = 0.0;
        }
        self.left = if self.trying { TRIAL } else { self.gap };
    }
}

/// Moves an average an eighth of the way to a value; the first value is the average.
fn average(average: &mut f64, value: f64) {
    *average = if *average == 0.0 { value } else { *average + (value - *average) / 8.0 };
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: usize = 512 << 10;

    /// Sends blocks over a modelled link; returns how many of the last 1000 went packed, and how often it changed.
    fn run(adaptive: &mut Adaptive, blocks: u32, packing: u64, link: u64, ratio: u64) -> (u32, u32) {
        let (mut packed, mut changes, mut before) = (0, 0, Codec::Lz4);
        // What the kernel's buffer has room for hides the link, in microseconds of it.
        let (mut queued, room) = (0u64, 4000u64);
        for number in 0..blocks {
            let codec = adaptive.codec();
            let (pack, send) = if codec == Codec::None { (1, link) } else { (packing, link * ratio / 100) };
            queued = queued.saturating_sub(pack) + send;
            let blocked = queued.saturating_sub(room) + 5;
            queued = queued.saturating_sub(blocked);
            adaptive.note(RAW, Duration::from_micros(pack), Duration::from_micros(blocked));
            packed += u32::from(number + 1000 >= blocks && codec != Codec::None);
            changes += u32::from(codec != before);
            before = codec;
        }
        (packed, changes)
    }

    #[test]
    fn the_codec_is_left_out_on_a_fast_link() {
        let mut adaptive = Adaptive::new(Codec::Lz4, true);
        let (packed, changes) = run(&mut adaptive, 4000, 1000, 50, 50);
        assert!(packed < 100 && changes < 20, "{packed} packed, {changes} changes");
    }

    #[test]
    fn the_codec_is_used_on_a_slow_link() {
        let mut adaptive = Adaptive::new(Codec::Lz4, true);
        assert_eq!(run(&mut adaptive, 4000, 1000, 5000, 50), (1000, 0));
        // What does not become smaller is not worth the time either, but costs next to nothing here.
        let (packed, changes) = run(&mut adaptive, 4000, 1000, 1500, 30);
        assert!(packed > 900 && changes < 20, "{packed} packed, {changes} changes");
    }

    #[test]
    fn it_follows_the_link() {
        let mut adaptive = Adaptive::new(Codec::Zstd, true);
        assert!(run(&mut adaptive, 4000, 2000, 50, 40).0 < 100);
        assert!(run(&mut adaptive, 8000, 2000, 20_000, 40).0 > 900);
        assert!(run(&mut adaptive, 8000, 2000, 50, 40).0 < 100);
    }

    #[test]
    fn only_when_asked_to() {
        let mut adaptive = Adaptive::new(Codec::Lz4, false);
        assert_eq!(run(&mut adaptive, 2000, 1000, 1, 50), (1000, 0));
        assert_eq!(Adaptive::new(Codec::None, true).codec(), Codec::None);
    }

    #[test]
    fn a_turn_comes_when_all_that_was_urgent_has_left() {
        let (limit, cancelled, start) = (Limit::new(1 << 20), AtomicBool::new(false), Instant::now());
        let urgent = || limit.wait(256 << 10, true, &cancelled).expect("it leaves at once");
        urgent();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limit.wait_for_turn(&cancelled).map(|()| start.elapsed()));
            std::thread::sleep(Duration::from_millis(5));
            urgent(); // while it waits
            let waited = waiting.join().expect("no panic").expect("not cancelled");
            assert!(waited + BURST >= Duration::from_millis(500), "{waited:?}");
        });
        limit.wait(1 << 30, true, &cancelled).expect("it leaves at once");
        cancelled.store(true, Ordering::Relaxed);
        assert!(matches!(limit.wait_for_turn(&cancelled), Err(WireError::Cancelled)));
        assert!(Limit::new(0).wait_for_turn(&AtomicBool::new(false)).is_ok(), "no limit");
    }

    #[test]
    fn a_limit_holds_over_any_second() {
        let (limit, start) = (Limit::new(1 << 20), Instant::now());
        let mut now = start;
        for _ in 0..200 {
            now = now.max(limit.take(64 << 10, now));
        }
        // Of 200 blocks of a sixteenth of a second each, the last may leave when the others have.
        let early = Duration::from_secs_f64(199.0 / 16.0).saturating_sub(now - start);
        assert!(early <= BURST, "{early:?} early");
        let idle = now + Duration::from_secs(100);
        assert!(limit.take(1 << 20, idle) <= idle);
        assert!(limit.take(1, idle) >= idle + Duration::from_secs(1) - BURST, "an idle time is not made up for");
    }
}
