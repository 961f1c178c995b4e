//! Operations on one partition: selection of the next page, and order of the writes.

use std::sync::atomic::{AtomicBool, Ordering};

use super::LedgerError;
use super::layout::{Counters, Layout, load, store};
use super::options::{part, unit};
use super::page::{Entry, Finding, GOLDEN, WORDS, Words, compose, examine, mix};

/// Writer of one partition.
pub(super) struct Writer<'a> {
    layout: &'a Layout,
    partition: usize,
    counters: Counters<'a>,
    filled: usize,
    next: Box<Words>,
    found: Box<Words>,
}

impl<'a> Writer<'a> {
    pub(super) fn new(layout: &'a Layout, partition: usize) -> Self {
        Self {
            layout,
            partition,
            counters: layout.counters(partition),
            filled: layout.filled(partition),
            next: Box::new([0; WORDS]),
            found: Box::new([0; WORDS]),
        }
    }

    /// Returns whether there are no pages to write.
    pub(super) fn idle(&self) -> bool {
        self.filled == 0
    }

    /// Performs the next operation, and updates the counters. The caller must then call `check`, which is not part of
    /// the measured time.
    pub(super) fn write(&mut self) -> Written {
        let operation = self.counters.writes().saturating_sub(self.filled as u64);
        let (index, zeros) = choose(self.layout, self.partition, operation);
        let number = self.layout.partition(self.partition).start + index;
        let before = Entry(self.layout.entry(number).load(Ordering::Relaxed));
        load(self.layout.body(number), &mut self.found);
        self.put(number, Entry::new(before.version() + 1, zeros), before.hash(number));
        Written { number, before }
    }

    /// Checks the page that the last operation has overwritten, and counts it if it was damaged. The thread must call
    /// this function before it may pause.
    pub(super) fn check(&self, written: &Written) {
        let seed = self.layout.options.seed;
        if examine(&self.found, seed, written.number as u64, written.before) != Finding::Good {
            self.counters.count_bad(written.number);
        }
    }

    /// Writes the page, its table entry and the counters, in this order. `replaced` is the hash of the previous table
    /// entry, which is subtracted from the sum of the table.
    fn put(&mut self, number: usize, entry: Entry, replaced: u64) {
        if entry.is_zeros() {
            self.next.fill(0);
        } else {
            let options = &self.layout.options;
            compose(&mut self.next, options.seed, number as u64, entry.version(), options.compressible);
        }
        store(self.layout.body(number), &self.next);
        self.layout.entry(number).store(entry.0, Ordering::Release);
        self.counters.count_write(entry.hash(number).wrapping_sub(replaced));
    }

    /// Writes version 1 of all pages to be filled. Fails if `cancel` is set.
    fn fill(&mut self, cancel: &AtomicBool) -> Result<(), LedgerError> {
        self.counters.reset();
        let options = &self.layout.options;
        let first = self.layout.partition(self.partition).start;
        for number in first..first + self.filled {
            if cancel.load(Ordering::Relaxed) {
                return Err(LedgerError::Interrupted);
            }
            let chance = unit(mix(options.seed ^ mix(number as u64)));
            self.put(number, Entry::new(1, chance < options.zero_fraction), 0);
        }
        Ok(())
    }
}

/// Page that an operation has overwritten, with its previous table entry.
pub(super) struct Written {
    number: usize,
    before: Entry,
}

/// Fills all partitions, with one thread each.
pub(super) fn fill(layout: &Layout, cancel: &AtomicBool) -> Result<(), LedgerError> {
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..layout.options.threads)
            .map(|partition| scope.spawn(move || Writer::new(layout, partition).fill(cancel)))
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Err(LedgerError::ThreadDied)))
    })
}

/// Returns the page that an operation writes, relative to the partition, and whether the operation zeroes the page.
pub(super) fn choose(layout: &Layout, partition: usize, operation: u64) -> (usize, bool) {
    let options = &layout.options;
    let filled = layout.filled(partition);
    let draw = mix(mix(options.seed.wrapping_add(mix(partition as u64 + 1))).wrapping_add(operation));
    let working_set = part(filled, options.working_set).max(1);
    let place = if options.skew > 1.0 { unit(draw).powf(options.skew) } else { unit(draw) };
    let rank = part(working_set, place).min(working_set - 1);
    let index = if options.scatter { rank * filled / working_set } else { rank };
    (index, unit(mix(draw.wrapping_add(GOLDEN))) < options.zero_fraction)
}
