//! Body pages: generation and verification of their contents.

use zerocopy::IntoBytes;

use super::options::part;

/// Number of 64-bit words of a page.
pub(super) const WORDS: usize = pageferry_engine::SMALL_PAGE / 8;
/// Contents of a page.
pub(super) type Words = [u64; WORDS];

/// Number of words before the random contents: checksum, number, version and seed.
const PREFIX: usize = 4;
/// Increment of the counter that is mixed into random words: odd, with about half of its bits set.
pub(super) const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

/// Mixes a word: a change of any bit changes about half of the bits of the result (finaliser with two multiplications).
pub(super) fn mix(mut word: u64) -> u64 {
    word ^= word >> 32;
    word = word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^= word >> 32;
    word = word.wrapping_mul(0xd6e8_feb8_6659_fd93);
    word ^ (word >> 32)
}

/// Table entry: version of a body page, which is the number of its writes, and whether the page is zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Entry(pub(super) u64);

impl Entry {
    pub(super) fn new(version: u64, zeros: bool) -> Self {
        Self(version << 1 | u64::from(zeros))
    }

    pub(super) fn version(self) -> u64 {
        self.0 >> 1
    }

    pub(super) fn is_zeros(self) -> bool {
        self.0 & 1 == 1
    }

    /// Returns a hash of this entry and the number of its page. The hashes of a table are summed, so that the sum can
    /// be updated when an entry changes.
    pub(super) fn hash(self, number: usize) -> u64 {
        mix((number as u64 + 1).wrapping_mul(GOLDEN).wrapping_add(self.0))
    }
}

/// Generates the contents of page `number` in `version` (at least 1).
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
    pageferry_engine::checksum::checksum(words[1..].as_bytes())
}

/// Result of checking a body page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Finding {
    /// Page that matches its table entry.
    Good,
    /// Zero page that should have contents.
    Lost,
    /// Intact page whose version differs from that in its table entry: the page or the entry has missed a write.
    Stale,
    /// Intact copy of another page.
    Misplaced,
    /// Damaged page, with parts of different versions or foreign bytes.
    Torn,
}

/// Checks a page against its table entry.
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
