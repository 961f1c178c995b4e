//! Speed at which one thread compresses the data pages of an image in memory with a codec.
//!
//! `cargo run --release -p pageferry-engine --example codec_speed -- IMAGE CODEC`. Prints MiB of pages per second, and
//! the compression ratio. The other work of a checkpoint is not included: copying, detection of zeros, patterns and
//! duplicates, and writing.

use std::fs::File;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::block::{Builder, Class, Codec};
use pageferry_engine::image::{Chain, Image, PageReader};

const STORAGE_BLOCK: usize = 1 << 20;
const MAX_PAGES: usize = (512 << 20) / SMALL_PAGE;
const TURNS: usize = 3;

/// Returns the contents of the data pages of an image, at most `MAX_PAGES` pages.
fn contents(chain: &Chain) -> Result<Vec<u8>, Box<dyn std::error::Error>> {
    let map = chain.images()[0].page_map();
    let data = (0..map.len()).filter(|&page| map[page].class() == Some(Class::Data)).take(MAX_PAGES);
    let mut reader = PageReader::new(chain);
    let mut found = Vec::new();
    for page in data {
        found.resize(found.len() + SMALL_PAGE, 0);
        let at = found.len() - SMALL_PAGE;
        reader.read(page, &mut found[at..])?;
    }
    Ok(found)
}

/// Compresses the pages in `contents`. Returns the time in seconds, and the size of the storage blocks in bytes.
fn code(contents: &[u8], codec: Codec, page_block: usize) -> (f64, usize) {
    let mut builder = Builder::new(codec, page_block, STORAGE_BLOCK);
    let begin = Instant::now();
    let mut coded = 0;
    for block in contents.chunks(STORAGE_BLOCK) {
        for (number, page) in block.chunks(SMALL_PAGE).enumerate() {
            builder.push_data(number, page);
        }
        coded += builder.build(0, 0, 0).payload.len();
    }
    (begin.elapsed().as_secs_f64(), coded)
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [path, codec] = words.as_slice() else { return Err("usage: codec_speed IMAGE CODEC".into()) };
    let codec = Codec::named(codec).ok_or("invalid codec: expected none, lz4 or zstd")?;
    let image = Image::open(File::open(path)?.into())?;
    let page_block = image.page_block();
    let contents = contents(&Chain::new(vec![Arc::new(image)])?)?;
    let mut best = f64::INFINITY;
    let mut coded = 0;
    for _ in 0..TURNS {
        let (seconds, bytes) = code(&contents, codec, page_block);
        best = best.min(seconds);
        coded = bytes;
    }
    #[expect(clippy::cast_precision_loss, reason = "printed figures")]
    let (mib, ratio) = (contents.len() as f64 / f64::from(1 << 20), contents.len() as f64 / coded.max(1) as f64);
    writeln!(io::stdout(), "{:.1} {ratio:.3}", mib / best)?;
    Ok(())
}
