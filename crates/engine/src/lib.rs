//! Per-page and per-fault work of pageferry.
//!
//! Everything here is mechanism; policy, flows and control protocols are Python. The parts, from the bottom up:
//!
//! * [`uapi`]: kernel interfaces that the `libc` crate does not know yet.
//! * [`faults`]: what a userfaultfd reports, and the answers.
//! * [`mapping`]: shared mappings of the files that back a workload's memory.
//! * [`space`]: address spaces of other processes: adoption, and calls made on or in them.
//! * [`segment`]: where these map a workload's memory.
//! * [`pages`]: sets of small pages, the currency of every flow.
//! * [`trace`]: write traces over a workload's memory (S2).
//! * `discards`: memory that is given back meanwhile.
//! * [`truncated`]: memory files that become shorter.
//! * [`activity`]: which small pages of large ones are accessed (S3).
//! * [`block`]: storage blocks, the one form in which pages leave memory.
//! * [`image`]: files of storage blocks, in which any page is found at once.
//! * [`placer`]: received pages into their slots, and into the workload's page tables (S1, S5, S6, S7).
//! * [`wire`]: storage blocks over sockets.
//! * [`saver`]: memory as of one instant, saved while the workload runs (S4).
//! * [`pager`]: contents of pages on access, from images or a peer (S8, S10).
//! * [`sharing`]: pages whose content stands elsewhere too (S9).
//! * [`ledger`]: the built-in workload, in which every lost, stale or torn write shows.

pub mod activity;
pub mod block;
pub mod closed;
mod discards;
pub mod faults;
pub mod image;
pub mod ledger;
pub mod mappers;
pub mod mapping;
pub mod pager;
pub mod pages;
pub mod placer;
pub mod saver;
pub mod segment;
pub mod sharing;
pub mod space;
pub mod trace;
pub mod truncated;
pub mod uapi;
pub mod wire;

/// Size of a small page, bytes.
pub const SMALL_PAGE: usize = 4 << 10;
/// Size of a large page, bytes.
pub const LARGE_PAGE: usize = 2 << 20;
/// Small pages in a large page.
pub const SLOTS: usize = LARGE_PAGE / SMALL_PAGE;
