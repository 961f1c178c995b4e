//! The staging buffer: slots that hold copied blocks until they are packed. A part of them is for traps alone.

use parking_lot::{Condvar, Mutex};

/// Who wants a slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Origin {
    /// A thread of the workload waits.
    Trap,
    /// Nobody waits.
    Sweep,
}

/// A fixed number of slots.
#[derive(Debug)]
pub(super) struct Staging {
    state: Mutex<State>,
    more: Condvar,
    /// Bytes of a slot.
    slot: usize,
    /// Slots that the sweep leaves free.
    reserve: usize,
}

#[derive(Debug)]
struct State {
    free: Vec<Box<[u8]>>,
    closed: bool,
}

impl Staging {
    /// At least two slots: one for traps, one for the sweep.
    pub(super) fn new(slot: usize, count: usize) -> Self {
        let count = count.max(2);
        // Not zeros: those would be allocated at the first trap, while the workload waits.
        let free = (0..count).map(|_| vec![1; slot].into_boxed_slice()).collect();
        Self { state: Mutex::new(State { free, closed: false }), more: Condvar::new(), slot, reserve: count / 2 }
    }

    /// A slot, and whether one had to be waited for; none once closed.
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

    /// A slot at once, a new one if need be.
    pub(super) fn take_now(&self) -> Box<[u8]> {
        let free = self.state.lock().free.pop();
        free.unwrap_or_else(|| vec![1; self.slot].into_boxed_slice())
    }

    /// Takes a slot back.
    pub(super) fn give(&self, slot: Box<[u8]>) {
        self.state.lock().free.push(slot);
        self.more.notify_all();
    }

    /// From now on nobody gets a slot, and nobody waits for one.
    pub(super) fn close(&self) {
        self.state.lock().closed = true;
        self.more.notify_all();
    }
}
