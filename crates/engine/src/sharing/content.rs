//! What a small page holds, as far as sharing cares.

use xxhash_rust::xxh3::xxh3_64;
use zerocopy::IntoBytes;

use crate::SMALL_PAGE;

/// Words of a small page.
pub const WORDS: usize = SMALL_PAGE / size_of::<u64>();

/// The content of a small page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros only.
    Zero,
    /// One word of 8 bytes over and over, which is not zero.
    Pattern(u64),
    /// Anything else, by its hash. Pages of one hash *may* be the same: whoever shares them compares them first.
    Data(u64),
}

impl Content {
    /// Of a copy of a page: what is in memory may be written to meanwhile.
    pub fn of(words: &[u64; WORDS]) -> Self {
        let first = words[0];
        // Nearly all pages of data are told from patterns by their second word.
        if words.iter().any(|&word| word != first) {
            return Self::Data(xxh3_64(words.as_bytes()));
        }
        if first == 0 { Self::Zero } else { Self::Pattern(first) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_zeros_patterns_and_data_apart() {
        assert_eq!(Content::of(&[0; WORDS]), Content::Zero);
        assert_eq!(Content::of(&[0x6b6b; WORDS]), Content::Pattern(0x6b6b));
        for at in [0, 1, 255, WORDS - 1] {
            let mut words = [0; WORDS];
            words[at] = 1;
            assert!(matches!(Content::of(&words), Content::Data(_)), "a single word differs at {at}");
        }
        let (mut one, mut other) = ([7; WORDS], [7; WORDS]);
        (one[9], other[8]) = (8, 8);
        assert_ne!(Content::of(&one), Content::of(&other));
    }
}
