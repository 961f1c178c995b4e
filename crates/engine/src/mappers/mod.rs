//! Search of /proc for processes that map a file or have it open for writing, in our PID namespace and its descendants.
//!
//! All of /proc is read without the GIL: a program that keeps the interpreter busy would otherwise delay the search by
//! seconds. The kernel selects the shared mappings of files (PROCMAP_QUERY), so that no maps file is formatted and
//! parsed; kernels before 6.11 provide only the maps file. One system call per process suffices to recognise kernel
//! threads.

mod descriptors;
mod maps;

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::ffi::OsStrExt;

use crate::space::apart::{NAME, is_own};
use crate::uapi::check;
use descriptors::Listing;
use maps::Reader;

/// Identity of a file, as reported by stat(2) and in the maps files of /proc. For file systems with subvolumes, the
/// devices in the two reports differ.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FileId {
    /// Device number (`st_dev`).
    pub device: u64,
    /// Inode number (`st_ino`).
    pub inode: u64,
    /// Device number in maps files, encoded like `st_dev`.
    pub mapped_device: u64,
}

/// Shared mapping of one of the files searched for.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct FileMapping {
    /// Index of the file in the argument of [`scan`].
    pub file: usize,
    /// ID of the process that maps the file.
    pub pid: i32,
    /// Start address in the process.
    pub address: u64,
    /// Length in bytes.
    pub length: u64,
    /// Offset in the file, in bytes.
    pub offset: u64,
    /// Whether the mapping is currently writable.
    pub writable: bool,
    /// Whether the process has loaded pageferry's engine.
    pub engine: bool,
}

/// Result of a scan of /proc.
#[derive(Debug, Default)]
pub struct Found {
    /// Shared mappings of the files.
    pub mappings: Vec<FileMapping>,
    /// Descriptors open for writing, as (index of the file, process ID, descriptor).
    pub writers: Vec<(usize, i32, i32)>,
    /// IDs of processes with memory that the caller has no permission to inspect.
    pub unreadable: Vec<i32>,
    /// Number of processes inspected.
    pub read: usize,
}

/// Scans all processes for shared mappings of `files`, and for descriptors of `files` that are open for writing.
/// Ignores processes that exit during the scan.
///
/// # Errors
/// If /proc cannot be listed, or if a process cannot be inspected for a reason other than its exit or a lack of
/// permission, such as EMFILE or ENOMEM: the result would lack its mappings.
pub fn scan(files: &[FileId]) -> io::Result<Found> {
    let mut scan = Scan::new(files, File::open("/proc")?);
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = std::str::from_utf8(name.as_bytes()).ok().and_then(|text| text.parse::<i32>().ok()) else {
            continue;
        };
        match scan.process(pid) {
            Ok(()) => scan.found.read += 1,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                if scan.has_memory(pid) {
                    scan.found.unreadable.push(pid);
                }
            }
            Err(error) if has_exited(&error) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(scan.found)
}

/// Scan of all processes, with buffers that are reused.
struct Scan<'a> {
    files: &'a [FileId],
    proc: File,
    reader: Reader,
    listing: Listing,
    found: Found,
}

impl<'a> Scan<'a> {
    fn new(files: &'a [FileId], proc: File) -> Self {
        Self { files, proc, reader: Reader::default(), listing: Listing::default(), found: Found::default() }
    }

    fn process(&mut self, pid: i32) -> io::Result<()> {
        if is_own(pid) {
            return Ok(());
        }
        let folder = pid.to_string();
        if self.may_have_memory(&folder)? {
            return self.task(pid, &folder);
        }
        // A thread group keeps its memory and its descriptors after its first thread has exited. All remaining threads
        // share the memory.
        if self.has_threads(&folder)? {
            for entry in fs::read_dir(format!("/proc/{folder}/task"))? {
                let task = format!("{folder}/task/{}", entry?.file_name().display());
                if !self.may_have_memory(&task)? {
                    continue;
                }
                match self.task(pid, &task) {
                    Err(error) if has_exited(&error) => {}
                    result => return result,
                }
            }
        }
        Ok(())
    }

    /// Searches the mappings and the descriptors of a task. `folder`: path of the task in /proc.
    fn task(&mut self, pid: i32, folder: &str) -> io::Result<()> {
        let maps = open_at(&self.proc, &format!("{folder}/maps"), libc::O_RDONLY)?;
        let before = self.found.mappings.len();
        for line in self.reader.shared(&maps)? {
            let same = |file: &FileId| (file.mapped_device, file.inode) == (line.device, line.inode);
            if let Some(file) = self.files.iter().position(same) {
                self.found.mappings.push(FileMapping {
                    file,
                    pid,
                    address: line.start,
                    length: line.end - line.start,
                    offset: line.offset,
                    writable: line.writable,
                    engine: false,
                });
            }
        }
        if self.found.mappings.len() > before {
            if self.shares_memory_with_parent(folder) {
                self.found.mappings.truncate(before);
                return Ok(());
            }
            self.note_engine(&maps, folder, before)?;
        }
        let open = open_at(&self.proc, &format!("{folder}/fd"), libc::O_RDONLY | libc::O_DIRECTORY)?;
        let before = self.found.writers.len();
        let writers = &mut self.found.writers;
        self.listing.writable(&open, self.files, |file, number| writers.push((file, pid, number)))?;
        if self.found.writers.len() > before && self.shares_memory_with_parent(folder) {
            self.found.writers.truncate(before);
        }
        Ok(())
    }

    /// Records, in the mappings from index `before` on, whether their task has loaded the engine. Removes these
    /// mappings if they no longer exist.
    ///
    /// A child has all mappings of its parent until it executes another program. The open maps file belongs to the
    /// address space in which the mappings were found, so the file shows whether that address space contains the
    /// engine.
    fn note_engine(&mut self, maps: &File, folder: &str, before: usize) -> io::Result<()> {
        match self.reader.contains_engine(maps)? {
            Some(engine) => self.found.mappings[before..].iter_mut().for_each(|mapping| mapping.engine = engine),
            // The task has executed another program. The mappings of a task that has exited are kept, because it may
            // have written to the file.
            None if self.may_have_memory(folder)? => self.found.mappings.truncate(before),
            None => {}
        }
        Ok(())
    }

    /// Returns whether a process injects system calls on behalf of its parent. Such a process shares the memory and the
    /// descriptors of its parent, and the scan finds the parent as well.
    fn shares_memory_with_parent(&self, folder: &str) -> bool {
        const KCMP_VM: libc::c_int = 1;
        let stat = |folder: &str| fs::read_to_string(format!("/proc/{folder}/stat")).ok();
        let Some(text) = stat(folder) else { return false };
        let Some((head, fields)) = text.rsplit_once(") ") else { return false };
        if head.split_once('(').is_none_or(|(_, name)| name.as_bytes() != NAME.to_bytes()) {
            return false;
        }
        let parent = fields.split(' ').nth(1).and_then(|field| field.parse::<libc::pid_t>().ok());
        let (Some(parent), Ok(pid)) = (parent, folder.parse::<libc::pid_t>()) else { return false };
        // SAFETY: the call takes integers.
        unsafe { libc::syscall(libc::SYS_kcmp, pid, parent, KCMP_VM, 0, 0) == 0 }
    }

    /// Returns false for a task without memory, that is, a kernel thread or a task that has exited. Such a task has no
    /// executable.
    fn may_have_memory(&self, folder: &str) -> io::Result<bool> {
        let (path, mut target) = (CString::new(format!("{folder}/exe"))?, [0u8; 1]);
        // SAFETY: the path is NUL-terminated, and the kernel writes at most one byte to `target`.
        let read =
            unsafe { libc::readlinkat(self.proc.as_raw_fd(), path.as_ptr(), target.as_mut_ptr().cast(), target.len()) };
        // For all other errors, the search itself reports why it cannot inspect the task.
        Ok(read >= 0 || io::Error::last_os_error().raw_os_error() != Some(libc::ENOENT))
    }

    /// Returns whether a process has more than one thread: the directory `task` has a link for each thread, besides the
    /// two links of an empty directory.
    fn has_threads(&self, folder: &str) -> io::Result<bool> {
        let status = status_at(self.proc.as_raw_fd(), &CString::new(format!("{folder}/task"))?, 0, libc::STATX_NLINK)?;
        Ok(status.stx_nlink > 3)
    }

    /// Returns whether a process has memory. Zombies and kernel threads have none; kernel threads have PF_KTHREAD set
    /// in field 9 of stat, the flags.
    fn has_memory(&self, pid: i32) -> bool {
        const KERNEL_THREAD: u64 = 0x0020_0000;
        let text = match fs::read(format!("/proc/{pid}/stat")) {
            Ok(text) => text,
            Err(error) => return !has_exited(&error),
        };
        let Some(end) = text.iter().rposition(|&byte| byte == b')') else { return true };
        let mut fields = text[end + 1..].split(|&byte| byte == b' ').filter(|field| !field.is_empty());
        let state = fields.next();
        let flags = fields.nth(5).and_then(|field| std::str::from_utf8(field).ok()?.parse::<u64>().ok());
        !matches!(state, Some(b"Z" | b"X" | b"x")) && flags.is_none_or(|flags| flags & KERNEL_THREAD == 0)
    }
}

/// Returns whether an error of a file in /proc/PID means that the process or thread no longer exists.
fn has_exited(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH))
}

/// Opens a path relative to a directory.
fn open_at(directory: &File, path: &str, flags: libc::c_int) -> io::Result<File> {
    let path = CString::new(path)?;
    // SAFETY: the path is NUL-terminated.
    let file = check(unsafe { libc::openat(directory.as_raw_fd(), path.as_ptr(), flags | libc::O_CLOEXEC) })?;
    // SAFETY: the descriptor is new and has no other owner.
    Ok(unsafe { File::from_raw_fd(file) })
}

/// Calls statx(2) for a path relative to a directory. Does not wait for the servers of network file systems.
fn status_at(
    directory: RawFd,
    path: &std::ffi::CStr,
    flags: libc::c_int,
    mask: libc::c_uint,
) -> io::Result<libc::statx> {
    // SAFETY: the structure consists of integers, for which zero is valid.
    let mut status: libc::statx = unsafe { std::mem::zeroed() };
    let flags = flags | libc::AT_STATX_DONT_SYNC;
    // SAFETY: the path is NUL-terminated, and `status` is valid for writing.
    check(unsafe { libc::statx(directory, path.as_ptr(), flags, mask, &raw mut status) })?;
    Ok(status)
}
