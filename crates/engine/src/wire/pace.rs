//! Send rate: a bandwidth limit shared by all streams, and adaptive compression.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::WireError;
use crate::block::Codec;

/// Longest sleep between two checks for cancellation.
const SLICE: Duration = Duration::from_millis(20);
/// Maximum unused sending time that later sends may make up for. It compensates for sleeps that last too long.
const BURST: Duration = Duration::from_millis(20);

/// Bandwidth limit, shared by all streams of a sender.
#[derive(Debug)]
pub(super) struct RateLimit {
    bandwidth: u64,
    /// Time at which, at the limited rate, all bytes counted so far have been sent.
    due: Mutex<Instant>,
}

impl RateLimit {
    /// Creates a limit in bytes per second; 0 means unlimited.
    pub(super) fn new(bandwidth: u64) -> Self {
        Self { bandwidth, due: Mutex::new(Instant::now()) }
    }

    /// Counts bytes to send. Returns the time from which these bytes may be sent.
    fn take(&self, bytes: usize, now: Instant) -> Instant {
        #[expect(clippy::cast_precision_loss, reason = "a rate")]
        let time = Duration::from_secs_f64(bytes as f64 / self.bandwidth as f64);
        let mut due = self.due.lock();
        let start = (*due).max(now.checked_sub(BURST).unwrap_or(now));
        *due = start + time;
        start
    }

    /// Counts bytes to send, and waits until these bytes may be sent. Does not wait for urgent bytes.
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

    /// Waits until the limit allows another send. Bytes that are counted during the wait prolong the wait.
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

/// Number of blocks between two trials of the other mode: initial value and maximum.
const GAPS: (u32, u32) = (32, 1024);
/// Number of blocks of a trial. The first half is not measured: it only fills or drains the socket buffers.
const TRIAL: u32 = 16;
/// Factor by which the other mode must be faster to be selected.
const GAIN: f64 = 1.2;

/// Adaptive compression: selects the faster mode by its measured cost, in seconds per uncompressed byte for packing and
/// writing together.
///
/// The cost of a mode is known only from using it: compression hides the speed of the link, and without compression the
/// compression ratio is unknown. The other mode is therefore tried for [`TRIAL`] blocks at increasing intervals. The
/// interval is reset when a trial shows that the other mode is faster. While blocks are compressed, no trial takes
/// place as long as writing takes longer than packing, because then the link is the bottleneck.
#[derive(Debug)]
pub(super) struct Adaptive {
    codec: Codec,
    enabled: bool,
    packed: bool,
    /// Cost of uncompressed and of compressed blocks, in seconds per byte.
    cost: [f64; 2],
    /// Share of packing in the cost of compressed blocks, in seconds per byte.
    packing: f64,
    gap: u32,
    /// Number of blocks until the next trial, or until the end of the current trial.
    left: u32,
    trying: bool,
}

impl Adaptive {
    /// Creates the policy. If `enabled` is false, every block is compressed.
    pub(super) fn new(codec: Codec, enabled: bool) -> Self {
        let enabled = enabled && codec != Codec::None;
        Self { codec, enabled, packed: true, cost: [0.0; 2], packing: 0.0, gap: GAPS.0, left: GAPS.0, trying: false }
    }

    /// Returns the codec for the next block.
    pub(super) fn codec(&self) -> Codec {
        if self.packed != self.trying { self.codec } else { Codec::None }
    }

    /// Returns whether `codec` differs from the configured codec.
    pub(super) fn is_bypassed_by(&self, codec: Codec) -> bool {
        codec != self.codec
    }

    /// Records the times of packing and writing a block of `raw` uncompressed bytes.
    pub(super) fn record(&mut self, raw: usize, packing: Duration, writing: Duration) {
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

    /// Starts a trial, or evaluates the trial that has ended.
    fn turn(&mut self) {
        let (ours, other) = (usize::from(self.packed), usize::from(!self.packed));
        if self.trying {
            self.trying = false;
            let better = self.cost[other] * GAIN < self.cost[ours];
            self.packed = self.packed != better;
            self.gap = if better { GAPS.0 } else { (self.gap * 2).min(GAPS.1) };
        } else {
            // Skip the trial if the link or the codec is clearly the bottleneck.
            let writing = if self.packed { self.cost[1] - self.packing } else { self.cost[0] };
            self.trying = if self.packed { writing < self.packing } else { writing > self.packing };
            self.cost[other] = 0.0;
        }
        self.left = if self.trying { TRIAL } else { self.gap };
    }
}

/// Updates a moving average with weight 1/8; the first value initialises it.
fn average(average: &mut f64, value: f64) {
    *average = if *average == 0.0 { value } else { *average + (value - *average) / 8.0 };
}

#[cfg(test)]
mod tests {
    use super::*;

    const RAW: usize = 512 << 10;

    /// Sends blocks over a simulated link. Returns the number of compressed blocks among the last 1000, and the number
    /// of mode changes.
    fn run(adaptive: &mut Adaptive, blocks: u32, packing: u64, link: u64, ratio: u64) -> (u32, u32) {
        let (mut packed, mut changes, mut before) = (0, 0, Codec::Lz4);
        // Fill and capacity of a socket buffer, in microseconds of sending. The buffer hides the link until it is full.
        let (mut queued, room) = (0u64, 4000u64);
        for number in 0..blocks {
            let codec = adaptive.codec();
            let (pack, send) = if codec == Codec::None { (1, link) } else { (packing, link * ratio / 100) };
            queued = queued.saturating_sub(pack) + send;
            let blocked = queued.saturating_sub(room) + 5;
            queued = queued.saturating_sub(blocked);
            adaptive.record(RAW, Duration::from_micros(pack), Duration::from_micros(blocked));
            packed += u32::from(number + 1000 >= blocks && codec != Codec::None);
            changes += u32::from(codec != before);
            before = codec;
        }
        (packed, changes)
    }

    #[test]
    fn codec_is_bypassed_on_a_fast_link() {
        let mut adaptive = Adaptive::new(Codec::Lz4, true);
        let (packed, changes) = run(&mut adaptive, 4000, 1000, 50, 50);
        assert!(packed < 100 && changes < 20, "{packed} packed, {changes} changes");
    }

    #[test]
    fn codec_is_used_on_a_slow_link() {
        let mut adaptive = Adaptive::new(Codec::Lz4, true);
        assert_eq!(run(&mut adaptive, 4000, 1000, 5000, 50), (1000, 0));
        // The policy keeps compression with a small gain, because compression costs little on this link.
        let (packed, changes) = run(&mut adaptive, 4000, 1000, 1500, 30);
        assert!(packed > 900 && changes < 20, "{packed} packed, {changes} changes");
    }

    #[test]
    fn codec_follows_changes_of_the_link() {
        let mut adaptive = Adaptive::new(Codec::Zstd, true);
        assert!(run(&mut adaptive, 4000, 2000, 50, 40).0 < 100);
        assert!(run(&mut adaptive, 8000, 2000, 20_000, 40).0 > 900);
        assert!(run(&mut adaptive, 8000, 2000, 50, 40).0 < 100);
    }

    #[test]
    fn disabled_adaptation_always_uses_the_codec() {
        let mut adaptive = Adaptive::new(Codec::Lz4, false);
        assert_eq!(run(&mut adaptive, 2000, 1000, 1, 50), (1000, 0));
        assert_eq!(Adaptive::new(Codec::None, true).codec(), Codec::None);
    }

    #[test]
    fn turn_waits_for_urgent_bytes() {
        let (limit, cancelled, start) = (RateLimit::new(1 << 20), AtomicBool::new(false), Instant::now());
        let urgent = || limit.wait(256 << 10, true, &cancelled).expect("urgent bytes do not wait");
        urgent();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| limit.wait_for_turn(&cancelled).map(|()| start.elapsed()));
            std::thread::sleep(Duration::from_millis(5));
            urgent(); // during the wait of the other thread
            let waited = waiting.join().expect("no panic").expect("not cancelled");
            assert!(waited + BURST >= Duration::from_millis(500), "{waited:?}");
        });
        limit.wait(1 << 30, true, &cancelled).expect("urgent bytes do not wait");
        cancelled.store(true, Ordering::Relaxed);
        assert!(matches!(limit.wait_for_turn(&cancelled), Err(WireError::Cancelled)));
        assert!(RateLimit::new(0).wait_for_turn(&AtomicBool::new(false)).is_ok(), "no limit");
    }

    #[test]
    fn limit_holds_in_every_second() {
        let (limit, start) = (RateLimit::new(1 << 20), Instant::now());
        let mut now = start;
        for _ in 0..200 {
            now = now.max(limit.take(64 << 10, now));
        }
        // Of 200 blocks of 1/16 s each, the last may be sent when the other 199 have been sent.
        let early = Duration::from_secs_f64(199.0 / 16.0).saturating_sub(now - start);
        assert!(early <= BURST, "{early:?} early");
        let idle = now + Duration::from_secs(100);
        assert!(limit.take(1 << 20, idle) <= idle);
        assert!(limit.take(1, idle) >= idle + Duration::from_secs(1) - BURST, "idle time is not caught up with");
    }
}
