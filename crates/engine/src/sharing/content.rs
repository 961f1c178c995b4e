//! Classification of the contents of a base page for sharing.

use zerocopy::IntoBytes;

use crate::SMALL_PAGE;
use crate::checksum::checksum;

/// Number of 64-bit words of a base page.
pub const WORDS: usize = SMALL_PAGE / size_of::<u64>();

/// Contents of a base page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Zeros.
    Zero,
    /// Repeated 8-byte word other than zero.
    Pattern(u64),
    /// Any other contents, by their hash. Pages with the same hash may differ: compare them before sharing.
    Data(u64),
}

impl Content {
    /// Classifies the contents of a page. `words` must be a copy of the page, because the workload may write to the
    /// page itself.
    pub fn of(words: &[u64; WORDS]) -> Self {
        let first = words[0];
        // For most data pages, the second word differs from the first.
        if words.iter().any(|&word| word != first) {
            return Self::Data(checksum(words.as_bytes()));
        }
        if first == 0 { Self::Zero } else { Self::Pattern(first) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_patterns_and_data_are_distinguished() {
        assert_eq!(Content::of(&[0; WORDS]), Content::Zero);
        assert_eq!(Content::of(&[0x6b6b; WORDS]), Content::Pattern(0x6b6b));
        for at in [0, 1, 255, WORDS - 1] {
            let mut words = [0; WORDS];
            words[at] = 1;
            assert!(matches!(Content::of(&words), Content::Data(_)), "word {at} differs");
        }
        let (mut one, mut other) = ([7; WORDS], [7; WORDS]);
        (one[9], other[8]) = (8, 8);
        assert_ne!(Content::of(&one), Content::of(&other));
    }
}
