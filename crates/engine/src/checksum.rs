//! Checksums of storage blocks and images, and signatures of pages: xxh3-64, with the vector instructions of this CPU.

use std::hash::Hasher;

use twox_hash::XxHash3_64;

/// Returns the checksum of `bytes`.
pub fn checksum(bytes: &[u8]) -> u64 {
    XxHash3_64::oneshot(bytes)
}

/// Returns the checksum of `bytes` with a seed.
pub fn checksum_with_seed(bytes: &[u8], seed: u64) -> u64 {
    XxHash3_64::oneshot_with_seed(seed, bytes)
}

/// Checksum of bytes that are added in parts.
pub struct Checksum(XxHash3_64);

impl Checksum {
    /// Creates the checksum of no bytes.
    pub fn new() -> Self {
        Self(XxHash3_64::new())
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        self.0.write(bytes);
    }

    /// Returns the checksum of all bytes added so far.
    pub fn digest(&self) -> u64 {
        self.0.finish()
    }
}

impl Default for Checksum {
    fn default() -> Self {
        Self::new()
    }
}
