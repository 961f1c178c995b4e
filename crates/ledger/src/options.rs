//! Options of a ledger: amount and distribution of its writes.

use super::LedgerError;

/// Options of a ledger. Fractions are between 0 and 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Number of partitions, which is also the number of writer threads in all processes together.
    pub threads: usize,
    /// Seed of all pseudo-random choices.
    pub seed: u64,
    /// Write rate in bytes per second of all threads together; `None` means unlimited.
    pub rate: Option<u64>,
    /// Fraction of the filled pages that is rewritten.
    pub working_set: f64,
    /// Whether the working set is spread over all filled pages; otherwise, it consists of the first pages of each
    /// partition.
    pub scatter: bool,
    /// Skew of the writes, 1 to 1000. With 1, the writes to the working set are uniform. With k > 1, the first fraction
    /// x of the working set receives x^(1/k) of the writes.
    pub skew: f64,
    /// Fraction of the writes that zero a page.
    pub zero_fraction: f64,
    /// Fraction of the pages that is filled at creation. All other pages are never accessed.
    pub fill: f64,
    /// Fraction of each page's contents that consists of one repeated word.
    pub compressible: f64,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: 1,
            seed: 1,
            rate: None,
            working_set: 1.0,
            scatter: false,
            skew: 1.0,
            zero_fraction: 0.0,
            fill: 1.0,
            compressible: 0.0,
        }
    }
}

/// Maximum number of threads.
const MAX_THREADS: usize = 1024;

impl Options {
    /// Checks that every option is in its range.
    pub(super) fn check(&self) -> Result<(), LedgerError> {
        let fractions = [
            ("working_set", self.working_set),
            ("zero_fraction", self.zero_fraction),
            ("fill", self.fill),
            ("compressible", self.compressible),
        ];
        for (name, value) in fractions {
            if !(0.0..=1.0).contains(&value) {
                return Err(LedgerError::BadOption(format!("invalid {name} {value}: expected 0 to 1")));
            }
        }
        if !(1.0..=1000.0).contains(&self.skew) {
            return Err(LedgerError::BadOption(format!("invalid skew {}: expected 1 to 1000", self.skew)));
        }
        if !(1..=MAX_THREADS).contains(&self.threads) {
            let threads = self.threads;
            return Err(LedgerError::BadOption(format!("invalid threads {threads}: expected 1 to {MAX_THREADS}")));
        }
        if self.rate == Some(0) {
            return Err(LedgerError::BadOption("invalid rate 0: expected at least 1; pause the ledger instead".into()));
        }
        Ok(())
    }

    /// Number of header words for the options.
    pub(super) const WORDS: usize = 9;

    pub(super) fn to_words(&self) -> [u64; Self::WORDS] {
        [
            self.threads as u64,
            self.seed,
            self.rate.unwrap_or(0),
            self.working_set.to_bits(),
            u64::from(self.scatter),
            self.skew.to_bits(),
            self.zero_fraction.to_bits(),
            self.fill.to_bits(),
            self.compressible.to_bits(),
        ]
    }

    pub(super) fn from_words(words: [u64; Self::WORDS]) -> Result<Self, LedgerError> {
        let [threads, seed, rate, working_set, scatter, skew, zero_fraction, fill, compressible] = words;
        let options = Self {
            threads: usize::try_from(threads).unwrap_or(usize::MAX),
            seed,
            rate: (rate != 0).then_some(rate),
            working_set: f64::from_bits(working_set),
            scatter: scatter != 0,
            skew: f64::from_bits(skew),
            zero_fraction: f64::from_bits(zero_fraction),
            fill: f64::from_bits(fill),
            compressible: f64::from_bits(compressible),
        };
        options.check()?;
        Ok(options)
    }
}

/// Returns `fraction` of `whole`, rounded down and at most `whole`.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a fraction of a usize, not negative")]
pub(super) fn part(whole: usize, fraction: f64) -> usize {
    ((whole as f64 * fraction) as usize).min(whole)
}

/// Converts a random word to a number in [0, 1).
pub(super) fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}
