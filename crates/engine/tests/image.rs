//! Tests of image files: a round trip preserves the contents, damage is detected, and an untrusted image causes no
//! crash.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Builder, Class, Codec};
use pageferry_engine::image::{
    Chain, FLAG_IN_PARENT, Finding, Image, ImageError, ImageWriter, PageEntry, PageReader, Sizes, differences, fill,
    flatten, pattern, stored_pages, verify, verify_unused,
};
use proptest::prelude::*;
use xxhash_rust::xxh3::xxh3_64;

const SIZES: Sizes = Sizes { page_block: 2 * SMALL_PAGE, storage_block: 4 * SMALL_PAGE };

/// Expected class and contents of a page.
#[derive(Debug, Clone, PartialEq)]
enum Page {
    Absent,
    Pattern(u64),
    Data(u8),
    /// Page whose contents are in the parent image.
    Parent,
}

impl Page {
    fn contents(&self, number: usize) -> Option<Vec<u8>> {
        let mut page = vec![0; SMALL_PAGE];
        match self {
            Self::Absent => {}
            Self::Pattern(word) => fill(&mut page, *word),
            Self::Data(seed) => {
                let byte = |at: usize| (at.wrapping_mul(usize::from(*seed | 1)) ^ (at >> 5) ^ number) & 0xff;
                page.iter_mut().enumerate().for_each(|(at, out)| *out = u8::try_from(byte(at)).unwrap());
            }
            Self::Parent => return None,
        }
        Some(page)
    }
}

struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Self {
        // Use a file system in memory if possible, because these tests write small files many times.
        let memory = Path::new("/dev/shm");
        let parent = if memory.is_dir() { memory.to_owned() } else { std::env::temp_dir() };
        let path = parent.join(format!("pageferry-image-{name}-{}", std::process::id()));
        fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn create(path: &Path) -> OwnedFd {
    File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap().into()
}

fn open(path: &Path) -> Result<Image, ImageError> {
    Image::open(File::open(path).unwrap().into())
}

/// Writes an image of one region. The page map entries of `Page::Parent` are those of `parent`.
fn write(path: &Path, pages: &[Page], codec: Codec, parent: Option<&Image>) {
    let mut writer = ImageWriter::new(create(path), [7; 16], SIZES).unwrap();
    let mut builder = Builder::new(codec, SIZES.page_block, SIZES.storage_block);
    let (mut map, mut block) = (Vec::new(), 0);
    for (number, page) in pages.iter().enumerate() {
        let entry = match page {
            Page::Absent => PageEntry::plain(Class::Absent, 0),
            Page::Pattern(0) => PageEntry::plain(Class::Zero, 0),
            Page::Pattern(word) => PageEntry::plain(Class::Pattern, *word),
            Page::Parent => PageEntry { flags: FLAG_IN_PARENT, ..parent.unwrap().page_map()[number] },
            Page::Data(_) => {
                if builder.is_full() {
                    block = writer.append(&builder.build(0, 0, u64::from(block))).unwrap() + 1;
                }
                let contents = page.contents(number).unwrap();
                let slot = u16::try_from(builder.push_data(number, &contents)).unwrap();
                PageEntry::stored(Class::Data, xxh3_64(&contents), block, slot)
            }
        };
        map.push(entry);
    }
    if !builder.is_empty() {
        writer.append(&builder.build(0, 0, u64::from(block))).unwrap();
    }
    writer.section(16, b"about this image").unwrap();
    writer.finish(1, &map).unwrap();
}

fn read_all(chain: &Chain) -> Result<Vec<Vec<u8>>, ImageError> {
    let mut reader = PageReader::new(chain);
    (0..chain.images()[0].page_map().len())
        .map(|page| {
            let mut out = vec![0xee; SMALL_PAGE];
            reader.read(page, &mut out).map(|()| out)
        })
        .collect()
}

fn findings(chain: &Chain) -> Vec<Finding> {
    let stored = stored_pages(&chain.images()[0]);
    let mut all = verify(chain, &stored, 1000);
    all.extend(verify_unused(&chain.images()[0], &stored));
    all
}

fn any_page() -> impl Strategy<Value = Page> {
    prop_oneof![
        Just(Page::Absent),
        Just(Page::Pattern(0)),
        any::<u64>().prop_map(Page::Pattern),
        any::<u8>().prop_map(Page::Data),
        any::<u8>().prop_map(Page::Data),
    ]
}

fn any_codec() -> impl Strategy<Value = Codec> {
    prop_oneof![Just(Codec::None), Just(Codec::Lz4), Just(Codec::Zstd)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn chains_read_as_written(
        base in prop::collection::vec(any_page(), 1..40),
        changes in prop::collection::vec(prop::option::of(any_page()), 40),
        codec in any_codec(),
    ) {
        let folder = Folder::new(&format!("chain{}", rand_name()));
        write(&folder.file("base"), &base, codec, None);
        let parent = Arc::new(open(&folder.file("base")).unwrap());
        let child: Vec<_> =
            base.iter().zip(&changes).map(|(_, change)| change.clone().unwrap_or(Page::Parent)).collect();
        write(&folder.file("child"), &child, codec, Some(&parent));
        let image = Arc::new(open(&folder.file("child")).unwrap());
        let chain = Chain::new(vec![image, parent.clone()]).unwrap();
        let expected: Vec<_> = base
            .iter()
            .zip(&child)
            .enumerate()
            .map(|(number, (old, new))| new.contents(number).or_else(|| old.contents(number)).unwrap())
            .collect();
        prop_assert_eq!(read_all(&chain).unwrap(), expected.clone());
        prop_assert_eq!(findings(&chain), vec![]);

        // The flattened image has the same contents without a parent.
        let mut writer = ImageWriter::new(create(&folder.file("flat")), [9; 16], SIZES).unwrap();
        let map = flatten(&chain, &mut writer, codec, SIZES, &[base.len()]).unwrap();
        writer.finish(1, &map).unwrap();
        let flat = Chain::new(vec![Arc::new(open(&folder.file("flat")).unwrap())]).unwrap();
        prop_assert_eq!(read_all(&flat).unwrap(), expected.clone());
        prop_assert_eq!(findings(&flat), vec![]);
        prop_assert_eq!(differences(&flat, &chain, 0, base.len()).unwrap(), vec![]);

        // Exactly the changed pages differ from the parent.
        let old = Chain::new(vec![parent]).unwrap();
        let before = read_all(&old).unwrap();
        let changed: Vec<_> = (0..base.len()).filter(|&page| before[page] != expected[page]).collect();
        let found = differences(&old, &chain, 0, base.len()).unwrap();
        prop_assert_eq!(found.iter().flat_map(|&(start, end)| start..end).collect::<Vec<_>>(), changed);
    }

    #[test]
    fn untrusted_bytes_do_no_harm(mut bytes in prop::collection::vec(any::<u8>(), 0..6000), keep in any::<bool>()) {
        let folder = Folder::new(&format!("noise{}", rand_name()));
        let path = folder.file("image");
        if keep {
            // Keep the start of a valid image, which passes more checks than noise.
            write(&path, &[Page::Data(3), Page::Pattern(5)], Codec::Lz4, None);
            let real = fs::read(&path).unwrap();
            let half = bytes.len().min(real.len() / 2);
            bytes = [&real[..real.len() - half], &bytes[..half]].concat();
        }
        fs::write(&path, &bytes).unwrap();
        if let Ok(image) = open(&path) {
            let chain = Chain::new(vec![Arc::new(image)]).unwrap();
            let _ = read_all(&chain);
            let _ = findings(&chain);
        }
    }

    #[test]
    fn pattern_detection_checks_every_bit(word in any::<u64>(), at in 0..SMALL_PAGE, bit in 0u32..8) {
        let mut page = vec![0; SMALL_PAGE];
        fill(&mut page, word);
        prop_assert_eq!(pattern(&page), Some(word));
        page[at] ^= 1u8 << bit;
        prop_assert_eq!(pattern(&page), None);
    }
}

fn rand_name() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[test]
fn every_changed_byte_of_an_uncompressed_image_is_detected_or_harmless() {
    change_every_byte(Codec::None);
}

#[test]
fn every_changed_byte_of_an_lz4_image_is_detected_or_harmless() {
    change_every_byte(Codec::Lz4);
}

#[test]
fn every_changed_byte_of_a_zstd_image_is_detected_or_harmless() {
    change_every_byte(Codec::Zstd);
}

/// Changes every byte of a small image, in one bit or completely. Panics if a change is not detected but has an effect.
fn change_every_byte(codec: Codec) {
    let folder = Folder::new(&format!("flip-{codec:?}"));
    let pages = [Page::Absent, Page::Data(1), Page::Pattern(0), Page::Data(2), Page::Pattern(9), Page::Data(3)];
    let path = folder.file("image");
    write(&path, &pages, codec, None);
    let good = fs::read(&path).unwrap();
    let expected = read_all(&Chain::new(vec![Arc::new(open(&path).unwrap())]).unwrap()).unwrap();
    let mut harmless = 0;
    let file = File::options().read(true).write(true).open(&path).unwrap();
    for at in 0..good.len() {
        for mask in [0x01, 0xff] {
            file.write_all_at(&[good[at] ^ mask], at as u64).unwrap();
            harmless += u32::from(survives(&path, &expected, &format!("byte {at}, {codec:?}")));
            file.write_all_at(&good[at..=at], at as u64).unwrap();
        }
    }
    // Only changes of the padding between parts and of one section may stay undetected.
    assert!(harmless < 2 * 5 * 4096, "{harmless}");
}

/// Returns whether a changed image is read with the expected contents. Returns false if it is rejected when it is
/// opened, or if reading fails and verification reports damage. Panics in all other cases.
fn survives(path: &Path, expected: &[Vec<u8>], what: &str) -> bool {
    let Ok(image) = open(path) else { return false };
    let about = image.section(16);
    let chain = Chain::new(vec![Arc::new(image)]).unwrap();
    let Ok(read) = read_all(&chain) else {
        assert_ne!(findings(&chain), vec![], "{what}");
        return false;
    };
    assert_eq!(read, expected, "{what}");
    assert!(about.is_err() || about.unwrap().as_deref() == Some(b"about this image"), "{what}");
    true
}

#[test]
fn truncated_image_is_rejected() {
    let folder = Folder::new("cut");
    let path = folder.file("image");
    write(&path, &[Page::Data(1), Page::Data(2)], Codec::None, None);
    let good = fs::read(&path).unwrap();
    for len in (0..good.len()).step_by(97) {
        fs::write(&path, &good[..len]).unwrap();
        assert!(matches!(open(&path), Err(ImageError::NoFooter)), "{len} bytes");
    }
    fs::write(&path, [good.as_slice(), b"x"].concat()).unwrap();
    assert!(matches!(open(&path), Err(ImageError::NoFooter)));
}

#[test]
fn read_of_a_shrunken_file_fails() {
    let folder = Folder::new("shrink");
    let path = folder.file("image");
    write(&path, &[Page::Data(1), Page::Data(2)], Codec::None, None);
    let chain = Chain::new(vec![Arc::new(open(&path).unwrap())]).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
    assert!(read_all(&chain).is_err());
}

#[test]
fn missing_and_mismatched_parents_are_rejected() {
    let folder = Folder::new("orphan");
    write(&folder.file("base"), &[Page::Data(1), Page::Data(2)], Codec::None, None);
    let parent = open(&folder.file("base")).unwrap();
    write(&folder.file("child"), &[Page::Parent, Page::Data(5)], Codec::None, Some(&parent));
    let alone = Chain::new(vec![Arc::new(open(&folder.file("child")).unwrap())]).unwrap();
    assert!(matches!(read_all(&alone), Err(ImageError::InParent(0))));
    write(&folder.file("other"), &[Page::Data(1)], Codec::None, None);
    let images = vec![alone.images()[0].clone(), Arc::new(open(&folder.file("other")).unwrap())];
    assert!(Chain::new(images).is_err(), "parent of another size");
    assert!(Chain::new(Vec::new()).is_err(), "empty chain");
}

#[test]
fn unsupported_versions_and_features_are_named() {
    let folder = Folder::new("version");
    let path = folder.file("image");
    write(&path, &[Page::Data(1)], Codec::None, None);
    let good = fs::read(&path).unwrap();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes[56..64].fill(0);
        let checksum = xxh3_64(&bytes[..64]);
        bytes[56..64].copy_from_slice(&checksum.to_le_bytes());
        fs::write(&path, &bytes).unwrap();
        open(&path).unwrap_err()
    };
    assert!(matches!(with(0, b'X'), ImageError::Magic(_)));
    assert!(matches!(with(8, 2), ImageError::Version(2)));
    assert!(matches!(with(12, 4), ImageError::Features(4)));
    assert!(matches!(with(24, 1), ImageError::Value { what: "page-block size", .. }));
}

/// Pseudo-random numbers from a seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        xxh3_64(&self.0.to_le_bytes())
    }

    fn below(&mut self, end: usize) -> usize {
        usize::try_from(self.next() % end.max(1) as u64).unwrap()
    }

    /// Returns a random position in an image. On average, at least half of the positions are in the last 9 KiB, which
    /// contain the index.
    fn place(&mut self, len: usize) -> usize {
        let back = if self.next() & 1 == 0 { len.min(9 * 1024) } else { len };
        len - back + self.below(back)
    }
}

fn mutate(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    let len = bytes.len();
    let (at, from, count) = (numbers.place(len), numbers.place(len), 1 + numbers.below(600));
    match numbers.below(6) {
        0 => bytes[at] ^= 1 << numbers.below(8),
        1 => {
            let values =
                [0, 1, u64::MAX, 1 << 31, 1 << 32, len as u64, (len as u64).saturating_sub(1024), numbers.next()];
            let (at, value) = (at / 8 * 8, values[numbers.below(values.len())]);
            bytes.splice(at..(at + 8).min(len), value.to_le_bytes().into_iter().take(len - at));
        }
        2 => {
            let part = bytes[from..(from + count).min(len)].to_vec();
            let end = (at + part.len()).min(len);
            bytes[at..end].copy_from_slice(&part[..end - at]);
        }
        3 => bytes[at..(at + count).min(len)].fill(0),
        4 => bytes.truncate(at.max(1)),
        _ => bytes.extend(std::iter::repeat_n(at.to_le_bytes()[0], count)),
    }
}

/// Updates the checksums of header, sections and footer, so that only other values can be invalid.
fn seal(bytes: &mut [u8]) {
    const FOOTER: usize = 1024;
    let checked = |bytes: &mut [u8], at: usize| {
        bytes[at..at + 8].fill(0);
        let checksum = xxh3_64(bytes);
        bytes[at..at + 8].copy_from_slice(&checksum.to_le_bytes());
    };
    let number = |bytes: &[u8], at: usize| {
        usize::try_from(u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())).unwrap_or(usize::MAX)
    };
    if bytes.len() < 64 + FOOTER {
        return;
    }
    checked(&mut bytes[..64], 56);
    let footer = bytes.len() - FOOTER;
    for entry in (footer + 40..footer + 40 + 24 * 32).step_by(32) {
        let (start, len) = (number(bytes, entry + 8), number(bytes, entry + 16));
        if let Some(section) = start.checked_add(len).and_then(|end| bytes.get(start..end)) {
            let checksum = xxh3_64(section);
            bytes[entry + 24..entry + 32].copy_from_slice(&checksum.to_le_bytes());
        }
    }
    checked(&mut bytes[footer..], FOOTER - 8);
}

/// Damaged images, and images of untrusted origin with valid checksums, are rejected, or read without a crash. Only
/// images with valid checksums may be read with other contents. The environment variable `PAGEFERRY_FUZZ` sets the
/// number of attempts per codec.
#[test]
fn mutated_images_do_no_harm() {
    let tries = std::env::var("PAGEFERRY_FUZZ").ok().and_then(|text| text.parse().ok()).unwrap_or(1500);
    let folder = Folder::new("mutate");
    let pages = [Page::Absent, Page::Data(1), Page::Pattern(0), Page::Data(2), Page::Pattern(9), Page::Data(3)];
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd] {
        let path = folder.file("image");
        write(&path, &pages, codec, None);
        let good = fs::read(&path).unwrap();
        let expected = read_all(&Chain::new(vec![Arc::new(open(&path).unwrap())]).unwrap()).unwrap();
        let mut opened = 0;
        for seed in 0..tries {
            let (mut numbers, mut bytes) = (Numbers(seed), good.clone());
            for _ in 0..=numbers.below(4) {
                mutate(&mut bytes, &mut numbers);
            }
            let sealed = numbers.next() & 1 == 0;
            if sealed {
                seal(&mut bytes);
            }
            fs::write(&path, &bytes).unwrap();
            if !sealed {
                survives(&path, &expected, &format!("seed {seed}, {codec:?}"));
            } else if let Ok(image) = open(&path) {
                opened += 1;
                if let Ok(chain) = Chain::new(vec![Arc::new(image)]) {
                    let _ = (read_all(&chain), findings(&chain));
                }
            }
        }
        assert!(opened > tries / 20, "{opened} of {tries} passed the checks of the index");
    }
}
