//! Contents that an image has already, so that equal pages are stored once.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};
use std::io;

use xxhash_rust::xxh3::xxh3_128_with_secret;

use crate::uapi::check;

/// Bytes of the secret that makes page hashes unpredictable.
const SECRET_LEN: usize = 192;

/// Where contents stand, by their 128-bit hash under a secret of this set alone: nobody can make two pages that differ
/// and are taken for the same.
#[derive(Debug)]
pub struct KnownPages {
    places: HashMap<u128, (u32, u16), BuildHasherDefault<AsItIs>>,
    secret: [u8; SECRET_LEN],
}

impl KnownPages {
    /// Nothing is known.
    ///
    /// # Errors
    /// What getrandom(2) says.
    pub fn new() -> io::Result<Self> {
        Ok(Self { places: HashMap::default(), secret: random()? })
    }

    /// Of the contents of a page.
    pub fn hash(&self, contents: &[u8]) -> u128 {
        xxh3_128_with_secret(contents, &self.secret)
    }

    /// Storage block (or what stands for its number) and slot of contents with that hash.
    pub fn place(&self, hash: u128) -> Option<(u32, u16)> {
        self.places.get(&hash).copied()
    }

    /// Contents with that hash stand there now.
    pub fn insert(&mut self, hash: u128, place: (u32, u16)) {
        self.places.insert(hash, place);
    }
}

fn random() -> io::Result<[u8; SECRET_LEN]> {
    let mut bytes = [0; SECRET_LEN];
    // SAFETY: the buffer has the length given; a request this small is filled in one call.
    let got = unsafe { libc::getrandom(bytes.as_mut_ptr().cast(), SECRET_LEN, 0) };
    check(libc::c_int::try_from(got).unwrap_or(-1))?;
    Ok(bytes)
}

/// Hashes that are hashed already.
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

    #[expect(clippy::cast_possible_truncation, reason = "half of a hash is one")]
    fn write_u128(&mut self, hash: u128) {
        self.0 = hash as u64;
    }
}
