//! Storage blocks on their way into the file: compressed by some threads, written by one.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender};

use super::SaveError;
use super::shared::Shared;
use crate::block::{Builder, Built};
use crate::image::ImageWriter;

/// A storage block that holds all its pages.
#[derive(Debug)]
pub(super) struct Full {
    /// Stands for its number, which it gets when it is written.
    pub(super) ticket: u32,
    pub(super) region: usize,
    pub(super) builder: Builder,
}

/// A storage block as it goes into the file.
#[derive(Debug)]
pub(super) struct Packed {
    ticket: u32,
    /// Length of the part before the payload.
    head: usize,
    bytes: Vec<u8>,
}

/// The image without its index, and which ticket became which block.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) image: ImageWriter,
    pub(super) numbers: HashMap<u32, u32>,
}

/// Compresses blocks until there are no more.
pub(super) fn pack(
    full: &Receiver<Full>,
    free: &Sender<Builder>,
    buffers: &Receiver<Vec<u8>>,
    packed: &Sender<Packed>,
) {
    for Full { ticket, region, mut builder } in full {
        let Ok(mut bytes) = buffers.recv() else { return };
        let built = builder.build(u32::try_from(region).unwrap_or(u32::MAX), 0, u64::from(ticket));
        bytes.clear();
        bytes.extend_from_slice(built.head);
        bytes.extend_from_slice(built.payload);
        let head = built.head.len();
        let _ = free.send(builder);
        if packed.send(Packed { ticket, head, bytes }).is_err() {
            return;
        }
    }
}

/// Writes blocks until there are no more. After an error they are only counted out, so that nobody waits for ever.
pub(super) fn write(
    shared: &Shared,
    mut image: ImageWriter,
    packed: &Receiver<Packed>,
    spare: &Sender<Vec<u8>>,
) -> Written {
    let mut numbers = HashMap::new();
    for Packed { ticket, head, bytes } in packed {
        if !shared.failed() {
            match image.append(&Built { head: &bytes[..head], payload: &bytes[head..] }) {
                Ok(number) => drop(numbers.insert(ticket, number)),
                Err(error) => shared.fail(SaveError::Write(error)),
            }
            shared.stats.blocks.fetch_add(1, Ordering::Relaxed);
            shared.stats.stored.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            shared.stats.writes.store(image.writes(), Ordering::Relaxed);
        }
        let _ = spare.send(bytes);
    }
    shared.finished();
    Written { image, numbers }
}
