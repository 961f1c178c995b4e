//! Images: files of storage blocks, with what is needed to find any page in them (S4, S10, S8).

mod format;
mod reader;
mod writer;

pub use format::{BlockEntry, FLAG_IN_PARENT, ImageError, PageEntry, section};
pub use reader::{Chain, Image, StoredBlock};
pub use writer::{Finished, ImageWriter, Sizes};
