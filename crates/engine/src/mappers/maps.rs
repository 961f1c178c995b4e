//! Shared mappings of files in an address space: selected by the kernel (PROCMAP_QUERY), or parsed from a maps file.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::AsRawFd;

use crate::uapi::{READ, WRITE, check, ioc};

/// `struct procmap_query`
#[repr(C)]
#[derive(Default)]
struct ProcmapQuery {
    size: u64,
    query_flags: u64,
    query_addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    vma_page_size: u64,
    vma_offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    vma_name_size: u32,
    build_id_size: u32,
    vma_name_addr: u64,
    build_id_addr: u64,
}

const PROCMAP_QUERY: u64 = ioc(READ | WRITE, 0x66, 17, size_of::<ProcmapQuery>());
const _: () = assert!(PROCMAP_QUERY == 0xc068_6611);
const VMA_WRITABLE: u64 = 0x02;
const VMA_SHARED: u64 = 0x08;
const COVERING_OR_NEXT_VMA: u64 = 0x10;
const FILE_BACKED_VMA: u64 = 0x20;

/// End of the path of the engine's library, without a version: each process has loaded only one.
const ENGINE: &[u8] = b"/_engine.abi3.so";

/// Shared mapping of a file.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub struct Line {
    pub start: u64,
    pub end: u64,
    pub offset: u64,
    /// Device number, encoded like `st_dev`.
    pub device: u64,
    pub inode: u64,
    pub writable: bool,
}

/// Reader of maps files, with buffers that are reused.
#[derive(Debug, Default)]
pub struct Reader {
    /// Whether the kernel does not support PROCMAP_QUERY.
    unsupported: bool,
    text: Vec<u8>,
    lines: Vec<Line>,
}

impl Reader {
    /// Returns the shared mappings of files in the address space of an open maps file; none if the address space no
    /// longer exists.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn shared(&mut self, maps: &File) -> io::Result<&[Line]> {
        if !self.unsupported && self.query(maps).is_err() {
            // ENOTTY means that the kernel does not support the request. After any other error, such as EINTR, a
            // mapping may be missing too.
            self.unsupported = true;
        }
        if self.unsupported {
            self.parse(maps)?;
        }
        Ok(&self.lines)
    }

    /// Returns whether an address space contains pageferry's engine; `None` if the address space no longer exists.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn contains_engine(&mut self, mut maps: &File) -> io::Result<Option<bool>> {
        self.text.clear();
        maps.rewind()?;
        maps.read_to_end(&mut self.text)?;
        Ok((!self.text.is_empty()).then(|| self.text.windows(ENGINE.len()).any(|part| part == ENGINE)))
    }

    /// Collects the mappings with PROCMAP_QUERY (Linux 6.11).
    fn query(&mut self, maps: &File) -> io::Result<()> {
        self.lines.clear();
        let mut query = ProcmapQuery {
            size: size_of::<ProcmapQuery>() as u64,
            query_flags: COVERING_OR_NEXT_VMA | FILE_BACKED_VMA | VMA_SHARED,
            ..ProcmapQuery::default()
        };
        loop {
            // SAFETY: `query` is valid for reading and writing, and requests neither a name nor a build ID.
            match check(unsafe { libc::ioctl(maps.as_raw_fd(), PROCMAP_QUERY, &raw mut query) }) {
                Ok(_) => {}
                // ENOENT: no further mapping. ESRCH: no address space.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ESRCH)) => return Ok(()),
                Err(error) => return Err(error),
            }
            self.lines.push(Line {
                start: query.vma_start,
                end: query.vma_end,
                offset: query.vma_offset,
                device: libc::makedev(query.dev_major, query.dev_minor),
                inode: query.inode,
                writable: query.vma_flags & VMA_WRITABLE != 0,
            });
            query.query_addr = query.vma_end;
        }
    }

    /// Collects the mappings from the text of the maps file.
    fn parse(&mut self, mut maps: &File) -> io::Result<()> {
        self.lines.clear();
        self.text.clear();
        maps.rewind()?;
        maps.read_to_end(&mut self.text)?;
        self.lines.extend(self.text.split(|&byte| byte == b'\n').filter_map(parse_line));
        Ok(())
    }
}

/// Parses a line of a maps file: `start-end rwxs offset major:minor inode path`. Returns `None` for a private mapping.
/// Ignores the path.
fn parse_line(line: &[u8]) -> Option<Line> {
    let mut fields = line.splitn(6, |&byte| byte == b' ');
    let (range, permissions) = (fields.next()?, fields.next()?);
    if permissions.get(3) != Some(&b's') {
        return None;
    }
    let mut text = || std::str::from_utf8(fields.next()?).ok();
    let number = |digits: &str| u64::from_str_radix(digits, 16).ok();
    let (start, end) = std::str::from_utf8(range).ok()?.split_once('-')?;
    let offset = number(text()?)?;
    let (major, minor) = text()?.split_once(':')?;
    let device = libc::makedev(u32::from_str_radix(major, 16).ok()?, u32::from_str_radix(minor, 16).ok()?);
    let inode = text()?.parse().ok()?;
    Some(Line {
        start: number(start)?,
        end: number(end)?,
        offset,
        device,
        inode,
        writable: permissions.get(1) == Some(&b'w'),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsFd, FromRawFd};

    use crate::mapping::Mapping;

    #[test]
    fn queried_and_parsed_mappings_are_the_same() {
        // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
        let file = unsafe { File::from_raw_fd(libc::memfd_create(c"a b\n c".as_ptr(), libc::MFD_CLOEXEC)) };
        file.set_len(1 << 20).expect("the file can be extended");
        let _mappings = [0, 1 << 16].map(|offset| Mapping::new(file.as_fd(), 1 << 16, offset).expect("a mapping"));
        let maps = File::open("/proc/self/maps").expect("maps");
        let (mut queried, mut parsed) = (Reader::default(), Reader::default());
        parsed.parse(&maps).expect("the file can be read");
        assert!(parsed.lines.iter().filter(|line| line.end - line.start >= 1 << 16).count() >= 1);
        match queried.query(&maps) {
            Ok(()) => assert_eq!(queried.lines, parsed.lines),
            Err(error) if error.raw_os_error() == Some(libc::ENOTTY) => eprintln!("skipped: no PROCMAP_QUERY"),
            Err(error) => panic!("{error}"),
        }
    }

    #[test]
    fn line_of_a_private_mapping_is_ignored() {
        assert_eq!(parse_line(b"7f0000000000-7f0000001000 rw-p 00000000 00:01 12 /memfd:x"), None);
    }

    #[test]
    fn line_of_a_shared_mapping_is_parsed() {
        let line = parse_line(b"7f0000000000-7f0000001000 r--s 0000a000 fd:01 12                 /a b (deleted)");
        let device = libc::makedev(0xfd, 1);
        let (start, end) = (0x7f00_0000_0000, 0x7f00_0000_1000);
        assert_eq!(line, Some(Line { start, end, offset: 0xa000, device, inode: 12, writable: false }));
    }
}
