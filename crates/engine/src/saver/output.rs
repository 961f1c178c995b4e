//! Output of storage blocks: several threads compress the blocks, and one thread writes them.

use std::collections::HashMap;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Receiver, Sender};

use super::SaveError;
use super::state::SaverState;
use crate::block::{Builder, Built};
use crate::image::ImageWriter;

/// Storage block that is being filled or has been filled, before compression.
#[derive(Debug)]
pub(super) struct Full {
    /// Placeholder for the block number, which is assigned when the block is written.
    pub(super) ticket: u32,
    pub(super) region: usize,
    pub(super) builder: Builder,
}

/// Compressed storage block in its file format.
#[derive(Debug)]
pub(super) struct Packed {
    ticket: u32,
    /// Length in bytes of the header, the runs and the page-block table, which precede the payload.
    head: usize,
    bytes: Vec<u8>,
}

/// Image without its index, and the block number of each ticket.
#[derive(Debug)]
pub(super) struct Written {
    pub(super) image: ImageWriter,
    pub(super) numbers: HashMap<u32, u32>,
}

/// Compresses blocks until the channel is closed.
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

/// Writes blocks until the channel is closed. After an error, discards the remaining blocks, so that no sender blocks.
pub(super) fn write(
    shared: &SaverState,
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
