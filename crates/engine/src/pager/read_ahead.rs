//! Read-ahead: finds faults in the order of the storage blocks, and gives the blocks that the next faults need (S10).

use std::collections::VecDeque;
use std::ops::Range;

use super::blocks::Number;

/// Maximum number of sequences that are followed at a time. Threads of a workload can each read a part of an array.
const SEQUENCES: usize = 8;
/// Number of storage blocks to load ahead at the beginning of a sequence. It is doubled until it is `MAX_WINDOW`.
const MIN_WINDOW: u32 = 2;
/// Maximum number of storage blocks to load ahead, of 1 MiB before compression.
const MAX_WINDOW: u32 = 16;

/// Recent faults. Faults that follow each other in an image form a sequence.
#[derive(Debug, Default)]
pub struct ReadAhead {
    /// Sequences, that of the latest fault last.
    sequences: VecDeque<Sequence>,
}

#[derive(Debug)]
struct Sequence {
    image: usize,
    /// Storage block of the latest fault.
    last: u32,
    /// First storage block after those that were given to be loaded ahead. Their pages cause no faults.
    end: u32,
    /// Number of storage blocks to load ahead; 0 if one block only has had faults.
    window: u32,
}

impl ReadAhead {
    /// Records a fault in a storage block of an image with `count` blocks. Returns the blocks to load ahead.
    pub fn record(&mut self, (image, block): Number, count: u32) -> Range<u32> {
        // Two threads can record two faults in the opposite order.
        let follows = |one: &Sequence| one.image == image && (one.last.saturating_sub(1)..=one.end).contains(&block);
        let Some(found) = self.sequences.iter().position(follows).and_then(|at| self.sequences.remove(at)) else {
            if self.sequences.len() >= SEQUENCES {
                self.sequences.pop_front();
            }
            self.sequences.push_back(Sequence { image, last: block, end: block.saturating_add(1), window: 0 });
            return 0..0;
        };
        let mut sequence = found;
        let mut ahead = 0..0;
        if block > sequence.last {
            sequence.window = (sequence.window * 2).clamp(MIN_WINDOW, MAX_WINDOW);
            let first = sequence.end.max(block.saturating_add(1));
            ahead = first..block.saturating_add(1).saturating_add(sequence.window).min(count).max(first);
            (sequence.last, sequence.end) = (block, ahead.end);
        }
        self.sequences.push_back(sequence);
        ahead
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recorded(faults: &[u32]) -> Vec<Range<u32>> {
        let mut found = ReadAhead::default();
        faults.iter().map(|&block| found.record((0, block), 100)).collect()
    }

    #[test]
    fn faults_in_order_load_more_and_more_blocks_ahead() {
        assert_eq!(recorded(&[5, 5, 6, 6, 9, 14, 23]), [0..0, 0..0, 7..9, 0..0, 10..14, 15..23, 24..40]);
    }

    #[test]
    fn faults_out_of_order_load_nothing_ahead() {
        assert!(recorded(&[5, 9, 2, 50, 48, 7, 99, 30]).iter().all(Range::is_empty));
    }

    #[test]
    fn sequences_of_several_threads_do_not_disturb_each_other() {
        assert_eq!(recorded(&[10, 50, 11, 51, 14, 54]), [0..0, 0..0, 12..14, 52..54, 15..19, 55..59]);
    }

    #[test]
    fn blocks_are_loaded_ahead_once_and_only_up_to_the_last() {
        // The second fault is in a block that is being loaded ahead.
        assert_eq!(recorded(&[95, 96, 97, 99]), [0..0, 97..99, 99..100, 100..100]);
    }

    #[test]
    fn fault_that_is_recorded_too_late_does_not_end_the_sequence() {
        assert_eq!(recorded(&[5, 6, 9, 8, 10, 14]), [0..0, 7..9, 10..14, 0..0, 14..19, 19..31]);
    }

    #[test]
    fn sequences_are_of_one_image() {
        let mut found = ReadAhead::default();
        assert!(found.record((0, 5), 100).is_empty());
        assert!(found.record((1, 6), 100).is_empty());
        assert_eq!(found.record((0, 6), 100), 7..9);
    }
}
