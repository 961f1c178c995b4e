//! What a ledger writes, how much, and where.

use super::LedgerError;

/// How a ledger is made and written. Fractions are between 0 and 1.
#[derive(Debug, Clone, PartialEq)]
pub struct Options {
    /// Partitions, and so writer threads in all processes together.
    pub threads: usize,
    /// Everything pseudo-random follows from it.
    pub seed: u64,
    /// Bytes written per second by all threads together; `None` for as fast as they can.
    pub rate: Option<u64>,
    /// Part of the filled pages that is ever written again.
    pub working_set: f64,
    /// Spread the working set over all filled pages, instead of having it at the start of each partition.
    pub scatter: bool,
    /// 1 writes all of the working set alike; k > 1 puts a share of x^(1/k) of the writes into the first part x of it.
    pub skew: f64,
    /// Part of the writes that make a page all zeros.
    pub zero_fraction: f64,
    /// Part of the pages that is filled when the ledger is made; the others are never touched.
    pub fill: f64,
    /// Part of each page's content that is one repeated word.
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

/// More threads than this are a mistake.
const MOST_THREADS: usize = 1024;

impl Options {
    /// Whether every option is in its range.
    pub(super) fn check(&self) -> Result<(), LedgerError> {
        let fractions = [
            ("working_set", self.working_set),
            ("zero_fraction", self.zero_fraction),
            ("fill", self.fill),
            ("compressible", self.compressible),
        ];
        for (name, value) in fractions {
            if !(0.0..=1.0).contains(&value) {
                return Err(LedgerError::BadOption(format!("{name} is {value}; it must be between 0 and 1")));
            }
        }
        if !(1.0..=1000.0).contains(&self.skew) {
            return Err(LedgerError::BadOption(format!("skew is {}; it must be between 1 and 1000", self.skew)));
        }
        if !(1..=MOST_THREADS).contains(&self.threads) {
            let threads = self.threads;
            return Err(LedgerError::BadOption(format!("{threads} threads; it must be 1 to {MOST_THREADS}")));
        }
        if self.rate == Some(0) {
            return Err(LedgerError::BadOption("a rate of 0: leave the ledger paused instead".into()));
        }
        Ok(())
    }

    /// Words that the header holds the options in.
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

/// `fraction` of `whole`, rounded down; never more than `whole`.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a fraction of a usize, not negative")]
pub(super) fn part(whole: usize, fraction: f64) -> usize {
    ((whole as f64 * fraction) as usize).min(whole)
}

/// A random word as a number in [0, 1).
pub(super) fn unit(random: u64) -> f64 {
    (random >> 11) as f64 / (1_u64 << 53) as f64
}
