//! Images: files of storage blocks, with what is needed to find any page in them (S4, S10, S8).

mod contents;
mod flatten;
mod format;
mod known;
mod reader;
mod store;
mod verify;
mod writer;

pub use contents::{PageReader, differences, fill, pattern};
pub use flatten::flatten;
pub use format::{BlockEntry, FLAG_IN_PARENT, ImageError, PageEntry, section};
pub use known::KnownPages;
pub use reader::{Chain, Image, StoredBlock};
pub use store::PageStore;
pub use verify::{Finding, stored_pages, verify, verify_unused};
pub use writer::{Finished, ImageWriter, Sizes};
