//! Search of /proc for processes that map a file or have it open for writing, in our PID namespace and its descendants.
//!
//! All files of /proc are read as bytes, in one pass, without the GIL: a program that keeps the interpreter busy would
//! otherwise delay the search by seconds.

use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

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
    /// Length, bytes.
    pub length: u64,
    /// Offset in the file, bytes.
    pub offset: u64,
    /// Whether the mapping is currently writable.
    pub writable: bool,
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
/// If /proc cannot be listed.
pub fn scan(files: &[FileId]) -> io::Result<Found> {
    let mut found = Found::default();
    for entry in fs::read_dir("/proc")? {
        let name = entry?.file_name();
        let Some(pid) = std::str::from_utf8(name.as_bytes()).ok().and_then(|text| text.parse::<i32>().ok()) else {
            continue;
        };
        let folder = Path::new("/proc").join(&name);
        let mapped = maps(&folder, pid, files, &mut found);
        let opened = descriptors(&folder, pid, files, &mut found);
        match mapped.and(opened) {
            Ok(()) => found.read += 1,
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                if has_memory(&folder) {
                    found.unreadable.push(pid);
                }
            }
            Err(_) => {} // exited during the scan
        }
    }
    Ok(found)
}

fn maps(folder: &Path, pid: i32, files: &[FileId], found: &mut Found) -> io::Result<()> {
    let text = fs::read(folder.join("maps"))?;
    for line in text.split(|&byte| byte == b'\n') {
        let Some(mapping) = parse(line) else { continue };
        let same = |file: &FileId| (file.mapped_device, file.inode) == (mapping.device, mapping.inode);
        if let (true, Some(file)) = (mapping.shared, files.iter().position(same)) {
            found.mappings.push(FileMapping {
                file,
                pid,
                address: mapping.start,
                length: mapping.end - mapping.start,
                offset: mapping.offset,
                writable: mapping.writable,
            });
        }
    }
    Ok(())
}

struct Line {
    start: u64,
    end: u64,
    offset: u64,
    device: u64,
    inode: u64,
    shared: bool,
    writable: bool,
}

/// Parses a line of a maps file: `start-end rwxs offset major:minor inode path`. Ignores the path.
fn parse(line: &[u8]) -> Option<Line> {
    let mut fields = line.split(|&byte| byte == b' ').filter(|field| !field.is_empty());
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let (start, end) = text()?.split_once('-')?;
    let permissions = text()?.as_bytes();
    let offset = text()?;
    let (major, minor) = text()?.split_once(':')?;
    let inode = text()?.parse().ok()?;
    let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
    Some(Line {
        start: number(start)?,
        end: number(end)?,
        offset: number(offset)?,
        device: libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?),
        inode,
        shared: permissions.get(3) == Some(&b's'),
        writable: permissions.get(1) == Some(&b'w'),
    })
}

fn descriptors(folder: &Path, pid: i32, files: &[FileId], found: &mut Found) -> io::Result<()> {
    for entry in fs::read_dir(folder.join("fd"))? {
        let path = entry?.path();
        let Ok(status) = fs::metadata(&path) else { continue }; // closed during the scan
        let same = |file: &FileId| (file.device, file.inode) == (status.dev(), status.ino());
        let Some(file) = files.iter().position(same) else { continue };
        // The permissions of the link show the mode in which the file is open.
        let open_for_writing = fs::symlink_metadata(&path).is_ok_and(|link| link.mode() & 0o200 != 0);
        let number = path.file_name().and_then(|name| name.to_str()?.parse().ok());
        if let (true, Some(number)) = (open_for_writing, number) {
            found.writers.push((file, pid, number));
        }
    }
    Ok(())
}

/// Returns whether a process has memory. Zombies and kernel threads have none; kernel threads have PF_KTHREAD set in
/// field 9 of stat, the flags.
fn has_memory(folder: &Path) -> bool {
    const KERNEL_THREAD: u64 = 0x0020_0000;
    let Ok(text) = fs::read(folder.join("stat")) else { return false };
    let Some(end) = text.iter().rposition(|&byte| byte == b')') else { return true };
    let mut fields = text[end + 1..].split(|&byte| byte == b' ').filter(|field| !field.is_empty());
    let state = fields.next();
    let flags = fields.nth(5).and_then(|field| std::str::from_utf8(field).ok()?.parse::<u64>().ok());
    !matches!(state, Some(b"Z" | b"X" | b"x")) && flags.is_none_or(|flags| flags & KERNEL_THREAD == 0)
}
