//! Estimate of the savings from sending only the difference between a page and its previously sent version.
//!
//! `cargo run --release -p pageferry-engine --example delta -- BEFORE AFTER CODEC`. BEFORE and AFTER are files with the
//! old and the new contents of the same pages, all of which differ. Prints four numbers: the size of the storage blocks
//! of the new pages and of the differences (exclusive or), in bytes, and the speed of each compression in one thread,
//! in MiB of pages per second. The speed for differences includes their computation.

use std::io::{self, Write};
use std::time::Instant;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Builder, Codec};

const STORAGE_BLOCK: usize = 1 << 20;
const PAGE_BLOCK: usize = 64 << 10;

/// Returns the size of the storage blocks of `pages` in bytes.
fn code(pages: &[u8], codec: Codec) -> usize {
    let mut builder = Builder::new(codec, PAGE_BLOCK, STORAGE_BLOCK);
    let mut coded = 0;
    for block in pages.chunks(STORAGE_BLOCK) {
        for (number, page) in block.chunks(SMALL_PAGE).enumerate() {
            builder.push_data(number, page);
        }
        coded += builder.build(0, 0, 0).payload.len();
    }
    coded
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [before, after, codec] = words.as_slice() else { return Err("usage: delta BEFORE AFTER CODEC".into()) };
    let codec = Codec::named(codec).ok_or("invalid codec: expected none, lz4 or zstd")?;
    let (before, after) = (std::fs::read(before)?, std::fs::read(after)?);
    if before.len() != after.len() || after.is_empty() || after.len() % SMALL_PAGE != 0 {
        return Err("invalid files: expected two files with the same number of whole pages, at least one".into());
    }
    let begin = Instant::now();
    let whole = code(&after, codec);
    let whole_seconds = begin.elapsed().as_secs_f64();
    let begin = Instant::now();
    let differences: Vec<u8> = before.iter().zip(&after).map(|(old, new)| old ^ new).collect();
    let delta = code(&differences, codec);
    let delta_seconds = begin.elapsed().as_secs_f64();
    #[expect(clippy::cast_precision_loss, reason = "printed figures")]
    let mib = after.len() as f64 / f64::from(1 << 20);
    writeln!(io::stdout(), "{whole} {delta} {:.1} {:.1}", mib / whole_seconds, mib / delta_seconds)?;
    Ok(())
}
