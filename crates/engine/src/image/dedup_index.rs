//! Index of the contents stored in an image, so that duplicate pages are stored once.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;

use twox_hash::XxHash3_128;

use crate::uapi::check;

/// Size in bytes of the secret that makes page hashes unpredictable.
const SECRET_LEN: usize = 192;

/// Map from the 128-bit hash of page contents to the place where the contents are stored. The hash uses a random
/// secret, so that a workload cannot construct two different pages with the same hash.
#[derive(Debug)]
pub struct DedupIndex {
    places: HashMap<u128, (u32, u16), BuildHasherDefault<AsItIs>>,
    secret: [u8; SECRET_LEN],
}

impl DedupIndex {
    /// Creates an empty index.
    ///
    /// # Errors
    /// The error of getrandom(2).
    pub fn new() -> io::Result<Self> {
        Ok(Self { places: HashMap::default(), secret: random()? })
    }

    /// Returns the hash of the contents of a page.
    pub fn hash(&self, contents: &[u8]) -> u128 {
        XxHash3_128::oneshot_with_secret(&self.secret, contents).expect("the secret is long enough")
    }

    /// Returns the storage block and the slot of the contents with this hash, or `None` if the contents are not stored.
    /// A checkpoint identifies a block by a ticket until the block is written.
    pub fn place(&self, hash: u128) -> Option<(u32, u16)> {
        self.places.get(&hash).copied()
    }

    /// Records the storage block, or its ticket, and the slot of the contents with this hash.
    pub fn insert(&mut self, hash: u128, place: (u32, u16)) {
        self.places.insert(hash, place);
    }
}

fn random() -> io::Result<[u8; SECRET_LEN]> {
    let mut bytes = [0; SECRET_LEN];
    // SAFETY: the buffer is valid for writing `SECRET_LEN` bytes. getrandom(2) fills requests of up to 256 bytes
    // completely.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), SECRET_LEN, 0) };
    check(libc::c_int::try_from(got).unwrap_or(-1))?;
    Ok(bytes)
}

/// Hasher for keys that are already hashes: returns the low 64 bits of a key.
#[derive(Debug, Default)]
struct AsItIs(u64);

impl Hasher for AsItIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            self.0 = self.0.rotate_left(8) ^ u64::from(byte);
        }
    }

    #[expect(clippy::cast_possible_truncation, reason = "the low half of a hash is a hash too")]
    fn write_u128(&mut self, hash: u128) {
        self.0 = hash as u64;
    }
}
