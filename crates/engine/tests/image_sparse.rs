//! Test of sparse images: the cost of opening an image is bounded by the data in the file, and opening can be
//! cancelled.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use pageferry_engine::block::Class;
use pageferry_engine::image::{Image, ImageError, ImageWriter, PageEntry, Sizes};
use xxhash_rust::xxh3::{Xxh3Default, xxh3_64};

const FOOTER: usize = 1024;
const PAGE_MAP: u32 = 1;
const METADATA: u32 = 16;

/// Image whose section `kind` is a hole of `len` bytes, with `checksum` in the footer.
struct Sparse(PathBuf);

impl Sparse {
    fn new(name: &str, kind: u32, len: u64, checksum: u64) -> Self {
        let path = std::env::temp_dir().join(format!("pageferry-sparse-{name}-{}", std::process::id()));
        let sizes = Sizes { page_block: 4096, storage_block: 4096 };
        let mut writer = ImageWriter::new(OwnedFd::from(create(&path)), [7; 16], sizes).unwrap();
        writer.section(METADATA, b"{}").unwrap();
        writer.finish(1, &[PageEntry::plain(Class::Absent, 0)]).unwrap();
        let mut bytes = fs::read(&path).unwrap();
        let mut footer = bytes.split_off(bytes.len() - FOOTER);
        let entry = (40..40 + 24 * 32).step_by(32).find(|&at| footer[at..at + 4] == kind.to_le_bytes()).unwrap();
        let start = 1u64 << 20;
        footer[entry + 8..entry + 16].copy_from_slice(&start.to_le_bytes());
        footer[entry + 16..entry + 24].copy_from_slice(&len.to_le_bytes());
        footer[entry + 24..entry + 32].copy_from_slice(&checksum.to_le_bytes());
        let end = start + len;
        footer[32..40].copy_from_slice(&(end + FOOTER as u64).to_le_bytes());
        footer[FOOTER - 8..].fill(0);
        let sum = xxh3_64(&footer);
        footer[FOOTER - 8..].copy_from_slice(&sum.to_le_bytes());
        let file = create(&path);
        file.write_all_at(&bytes, 0).unwrap();
        file.write_all_at(&footer, end).unwrap();
        Self(path)
    }

    fn file(&self) -> OwnedFd {
        OwnedFd::from(File::open(&self.0).unwrap())
    }
}

impl Drop for Sparse {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

fn create(path: &Path) -> File {
    File::options().read(true).write(true).create(true).truncate(true).open(path).unwrap()
}

fn zeros(mut len: u64) -> u64 {
    let (zeros, mut hash) = (vec![0; 1 << 16], Xxh3Default::new());
    while len > 0 {
        let part = len.min(zeros.len() as u64);
        hash.update(&zeros[..usize::try_from(part).unwrap()]);
        len -= part;
    }
    hash.digest()
}

/// Returns the peak memory use of this process in bytes.
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}

/// This must stay the only test of this file, because it measures the memory use of the process.
#[test]
fn cost_of_an_image_is_bounded_by_its_data() {
    let map = Sparse::new("map", PAGE_MAP, 256 << 20, zeros(256 << 20));
    let before = peak_memory();
    let image = Image::open(map.file()).expect("an image of pages that are absent");
    assert_eq!(image.page_map().len(), 16 << 20);
    assert!(image.page_map().iter().step_by(4096).all(|entry| entry.class() == Some(Class::Absent)));
    assert!(peak_memory() - before < 64 << 20, "{} MiB for a file of a few KiB", (peak_memory() - before) >> 20);

    let mut slices = 0;
    let ended = Image::open_while(map.file(), &mut || {
        slices += 1;
        slices < 4
    });
    assert!(matches!(ended, Err(ImageError::Interrupted)), "{ended:?}");

    let metadata = Sparse::new("metadata", METADATA, 512 << 20, 0);
    let image = Image::open(metadata.file()).expect("an image");
    let refused = image.section(METADATA);
    assert!(matches!(refused, Err(ImageError::Holes(..))), "{:?}", refused.map(|found| found.map(|found| found.len())));
    assert!(peak_memory() - before < 64 << 20, "{} MiB for a file of a few KiB", (peak_memory() - before) >> 20);

    let endless = Sparse::new("endless", PAGE_MAP, 16 << 30, 0);
    assert!(matches!(Image::open(endless.file()), Err(ImageError::Holes(..))));
}
