//! Staging buffer: slots that hold copied blocks until they are classified. Half of the slots are reserved for traps.

use parking_lot::{Condvar, Mutex};

/// Origin of a request for a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// Trap thread: a thread of the workload is blocked.
    Trap,
    /// Sweep or rounds: the workload is not blocked.
    Sweep,
}

/// Slots for copied blocks.
#[derive(Debug)]
pub(super) struct Staging {
    state: Mutex<State>,
    more: Condvar,
    /// Size of a slot in bytes.
    slot: usize,
    /// Number of slots reserved for traps.
    reserve: usize,
}

#[derive(Debug)]
struct State {
    free: Vec<Box<[u8]>>,
    closed: bool,
}

impl Staging {
    /// Allocates `count` slots of `slot` bytes, but at least two: one for traps, one for the sweep.
    pub(super) fn new(slot: usize, count: usize) -> Self {
        let count = count.max(2);
        // Do not fill the slots with zeros: the kernel would allocate zeroed memory only at the first write, which a
        // trap thread makes while a thread of the workload is blocked.
        let free = (0..count).map(|_| vec![1; slot].into_boxed_slice()).collect();
        Self { state: Mutex::new(State { free, closed: false }), more: Condvar::new(), slot, reserve: count / 2 }
    }

    /// Takes a slot, after waiting until one is available. Returns the slot and whether the caller had to wait, or
    /// `None` if the buffer is closed.
    pub(super) fn take(&self, origin: Origin) -> Option<(Box<[u8]>, bool)> {
        let left = if origin == Origin::Trap { 0 } else { self.reserve };
        let mut state = self.state.lock();
        let mut waited = false;
        while state.free.len() <= left && !state.closed {
            waited = true;
            self.more.wait(&mut state);
        }
        if state.closed { None } else { state.free.pop().map(|slot| (slot, waited)) }
    }

    /// Takes a slot without waiting. Allocates a slot if none is free.
    pub(super) fn take_now(&self) -> Box<[u8]> {
        let free = self.state.lock().free.pop();
        free.unwrap_or_else(|| vec![1; self.slot].into_boxed_slice())
    }

    /// Puts a slot back into the buffer, and wakes the threads that wait for a slot.
    pub(super) fn give(&self, slot: Box<[u8]>) {
        self.state.lock().free.push(slot);
        self.more.notify_all();
    }

    /// Closes the buffer: all waiting and later calls of `take` return `None`.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.more.notify_all();
    }
}
