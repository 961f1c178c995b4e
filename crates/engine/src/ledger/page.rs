//! Body pages: composing them, and telling what is wrong with one.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::IntoBytes;

use super::layout::Entry;
use super::options::part;

/// 64-bit words of a page.
pub(super) const WORDS: usize = crate::SMALL_PAGE / 8;
/// The content of a page.
pub(super) type Words = [u64; WORDS];

/// checksum, number, version, seed
const PREFIX: usize = 4;
/// Step between the counters that are mixed into random words: odd, with bits all over.
pub(super) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes a word so that any change of it changes about half of the bits (a finalizer with two multiplications).
pub(super) fn mix(mut word: u64) -> u64 {
    word ^= word >> 32;
    word = word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^= word >> 32;
    word = word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ (word >> 32)
}

/// Fills `words` with what page `number` holds in `version` (at least 1).
pub(super) fn compose(words: &mut Words, seed: u64, number: u64, version: u64, compressible: f64) {
    let key = mix(mix(seed ^ mix(number)).wrapping_add(version));
    let (random, repeated) = words[PREFIX..].split_at_mut(part(WORDS - PREFIX, 1.0 - compressible));
    let mut counter = key;
    for word in random {
        counter = counter.wrapping_add(GOLDEN);
        *word = mix(counter);
    }
    repeated.fill(key);
    words[1] = number;
    words[2] = version;
    words[3] = seed;
    words[0] = checksum(words);
}

fn checksum(words: &Words) -> u64 {
    xxh3_64(words[1..].as_bytes())
}

/// What a body page turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// What the table says.
    Good,
    /// Zeros where there should be content: as if it had never been written.
    Lost,
    /// Whole, but of another version than the table says: one of the two missed a write.
    Stale,
    /// Whole, but of another place.
    Misplaced,
    /// Not whole: parts of different versions, or foreign bytes.
    Torn,
}

/// Compares a page with its table entry.
pub(super) fn examine(words: &Words, seed: u64, number: u64, expected: Entry) -> Finding {
    if words.iter().all(|word| *word == 0) {
        return if expected.is_zeros() { Finding::Good } else { Finding::Lost };
    }
    if words[0] != checksum(words) || words[3] != seed {
        Finding::Torn
    } else if words[1] != number {
        Finding::Misplaced
    } else if expected.is_zeros() || words[2] != expected.version() {
        Finding::Stale
    } else {
        Finding::Good
    }
}
