//! Images: files of storage blocks with an index of all pages (S4, S8, S10).

mod dedup_index;
mod flatten;
mod format;
mod page_appender;
mod page_reader;
mod reader;
mod supply;
mod verify;
mod writer;

pub use dedup_index::DedupIndex;
pub use flatten::flatten;
pub use format::{BlockEntry, FLAG_IN_PARENT, ImageError, PageEntry, section};
pub use page_appender::PageAppender;
pub use page_reader::{PageReader, differences, fill, pattern};
pub use reader::{Chain, Image, StoredBlock};
pub use supply::{Number, Supply, request_in_background};
pub use verify::{Finding, stored_pages, verify, verify_unused};
pub use writer::{Finished, ImageWriter, Sizes};
