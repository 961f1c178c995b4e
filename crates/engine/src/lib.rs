//! Per-page and per-fault mechanisms of pageferry. Policy, flows and control protocols are in Python.
//!
//! The modules, bottom up:
//!
//! * [`uapi`]: kernel interfaces that the `libc` crate lacks.
//! * [`faults`]: events of a userfaultfd, and their resolution.
//! * [`file_systems`]: types of file systems, and detached mounts for memory files.
//! * [`closed`]: memory that is read-only after the hand-over of its workload.
//! * [`mapping`]: shared mappings of the files that back a workload's memory.
//! * [`mappers`]: processes that map a file or have it open for writing.
//! * [`space`]: address spaces of other processes: adoption, and system calls in them.
//! * [`segment`]: mappings of a workload's memory in these address spaces.
//! * [`pages`]: sets of base pages.
//! * [`trace`]: write traces (S2).
//! * `hole_notifications`: notifications of memory discarded during an operation.
//! * [`probing`]: memory accesses and system calls of feature probes.
//! * [`truncated`]: memory files truncated during an operation.
//! * [`activity`]: accessed base pages of huge pages (S3).
//! * [`checksum`]: checksums and signatures.
//! * [`block`]: storage blocks, the unit in which pages are sent and stored.
//! * [`image`]: files of storage blocks with an index of all pages.
//! * [`private_mappings`]: private pages of a clone that is received.
//! * [`placer`]: placement of received pages, and population of page tables (S1, S5, S6, S7).
//! * [`wire`]: storage blocks over sockets.
//! * [`saver`]: lazy checkpoints (S4).
//! * [`pager`]: loading of pages on demand, from images or a peer (S8, S10).
//! * [`sharing`]: duplicate pages (S9).

pub mod activity;
pub mod block;
pub mod checksum;
pub mod closed;
pub mod faults;
pub mod file_systems;
mod hole_notifications;
pub mod image;
pub mod mappers;
pub mod mapping;
pub mod pager;
pub mod pages;
pub mod placer;
pub mod private_mappings;
pub mod probing;
pub mod saver;
pub mod segment;
pub mod sharing;
pub mod space;
pub mod trace;
pub mod truncated;
pub mod uapi;
pub mod wire;

/// Size of a base page in bytes.
pub const SMALL_PAGE: usize = 4 << 10;
/// Size of a huge page in bytes.
pub const LARGE_PAGE: usize = 2 << 20;
/// Number of base pages per huge page.
pub const SLOTS: usize = LARGE_PAGE / SMALL_PAGE;
