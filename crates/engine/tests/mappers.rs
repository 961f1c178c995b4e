//! Scan of /proc for processes that map a file or have it open for writing, compared with a plain implementation.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};

use pageferry_engine::SMALL_PAGE;
use pageferry_engine::mappers::{FileId, FileMapping, scan};
use pageferry_engine::mapping::Mapping;

const LEN: usize = 16 * SMALL_PAGE;

fn memory_file() -> File {
    // SAFETY: the name is NUL-terminated. The descriptor is new and has no other owner; `from_raw_fd` panics on -1.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"mapped file".as_ptr(), 0)) };
    file.set_len(LEN as u64).expect("the file can be extended");
    file
}

fn id(file: &File) -> FileId {
    let status = file.metadata().expect("metadata");
    FileId { device: status.dev(), inode: status.ino(), mapped_device: status.dev() }
}

type Mappings = BTreeSet<(usize, i32, u64, u64, u64, bool)>;
type Writers = BTreeSet<(usize, i32, i32)>;

fn found(files: &[FileId]) -> (Mappings, Writers) {
    let found = scan(files).expect("/proc can be scanned");
    let mapping = |one: &FileMapping| (one.file, one.pid, one.address, one.length, one.offset, one.writable);
    (found.mappings.iter().map(mapping).collect(), found.writers.iter().copied().collect())
}

/// Reads the maps file and the descriptors of every process.
fn plain(files: &[FileId]) -> (Mappings, Writers) {
    let (mut mappings, mut writers) = (Mappings::new(), Writers::new());
    for entry in fs::read_dir("/proc").expect("/proc can be listed") {
        let folder = entry.expect("an entry").path();
        let Some(pid) = folder.file_name().and_then(|name| name.to_str()?.parse::<i32>().ok()) else { continue };
        let text = fs::read(folder.join("maps")).unwrap_or_default();
        mappings.extend(String::from_utf8_lossy(&text).lines().filter_map(|line| mapping(line, pid, files)));
        for entry in fs::read_dir(folder.join("fd")).into_iter().flatten().flatten() {
            let Ok(status) = fs::metadata(entry.path()) else { continue };
            let same = |file: &FileId| (file.device, file.inode) == (status.dev(), status.ino());
            let mode = fs::symlink_metadata(entry.path()).map_or(0, |link| link.mode());
            if let Some(file) = files.iter().position(same).filter(|_| mode & 0o200 != 0) {
                writers.insert((file, pid, entry.file_name().to_str().expect("a number").parse().expect("a number")));
            }
        }
    }
    (mappings, writers)
}

fn mapping(line: &str, pid: i32, files: &[FileId]) -> Option<(usize, i32, u64, u64, u64, bool)> {
    let hexadecimal = |digits| u64::from_str_radix(digits, 16).expect("a number");
    let fields: Vec<_> = line.split_whitespace().collect();
    let (start, end) = fields.first()?.split_once('-')?;
    let (major, minor) = fields.get(3)?.split_once(':')?;
    let number = |digits| u32::try_from(hexadecimal(digits)).expect("a device number");
    let (device, inode) = (libc::makedev(number(major), number(minor)), fields.get(4)?.parse::<u64>().ok()?);
    let file = files.iter().position(|file| (file.mapped_device, file.inode) == (device, inode))?;
    let length = hexadecimal(end) - hexadecimal(start);
    let shared = fields[1].ends_with('s');
    shared.then(|| (file, pid, hexadecimal(start), length, hexadecimal(fields[2]), fields[1].contains('w')))
}

/// Returns the part of a result that concerns these processes.
fn of(pids: &[i32], (mut mappings, mut writers): (Mappings, Writers)) -> (Mappings, Writers) {
    mappings.retain(|mapping| pids.contains(&mapping.1));
    writers.retain(|writer| pids.contains(&writer.1));
    (mappings, writers)
}

/// Starts a process that sleeps, after `prepare`.
fn sleeper(prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) -> Child {
    let mut command = Command::new("sleep");
    // SAFETY: `prepare` only makes system calls between fork and exec.
    unsafe { command.pre_exec(prepare) };
    command.arg("60").stdout(Stdio::null()).spawn().expect("sleep can be started")
}

fn end(mut child: Child) {
    child.kill().expect("the process can be killed");
    child.wait().expect("the process can be waited for");
}

#[test]
fn scan_and_plain_implementation_find_the_same_processes() {
    let files = [memory_file(), memory_file(), memory_file()];
    let ids = files.each_ref().map(id);
    let whole = Mapping::new(files[0].as_fd(), LEN, 0).expect("a mapping");
    let part = Mapping::new(files[0].as_fd(), SMALL_PAGE, SMALL_PAGE as u64).expect("a mapping");
    // SAFETY: the range is a page of our mapping, to which this test does not write.
    unsafe { libc::mprotect(whole.page(2).cast(), SMALL_PAGE, libc::PROT_READ) };
    let reader = File::open(format!("/proc/self/fd/{}", files[2].as_raw_fd())).expect("opened read-only");
    let number = files[1].as_raw_fd();
    let writer = sleeper(move || {
        // SAFETY: the descriptor is open; the number of the copy is free.
        if unsafe { libc::dup2(number, 900) } == 900 { Ok(()) } else { Err(io::Error::last_os_error()) }
    });
    let ours = std::process::id().cast_signed();
    // A child that another test forks between the two scans has these files as well.
    let known = [ours, writer.id().cast_signed()];
    let first = of(&known, found(&ids));
    assert_eq!(first, of(&known, plain(&ids)));
    let addresses: BTreeSet<_> = first.0.iter().filter(|one| one.1 == ours).map(|one| (one.2, one.4, one.5)).collect();
    assert!(addresses.contains(&(whole.address() + 2 * SMALL_PAGE as u64, 2 * SMALL_PAGE as u64, false)));
    assert!(addresses.contains(&(part.address(), SMALL_PAGE as u64, true)));
    assert!(first.1.contains(&(1, writer.id().cast_signed(), 900)));
    assert!(!first.1.contains(&(2, ours, reader.as_raw_fd())));
    end(writer);
    assert!(!found(&ids).1.iter().any(|writer| writer.2 == 900));
}

#[test]
fn process_whose_first_thread_has_exited_is_found() {
    let file = memory_file();
    let mapping = Mapping::new(file.as_fd(), LEN, 0).expect("a mapping");
    // SAFETY: the child inherits the mapping and starts a thread, which allocates memory. glibc supports that in the child
    // of a process with threads.
    let child = unsafe { libc::fork() };
    if child == 0 {
        std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_secs(60)));
        // SAFETY: the call takes integers, and ends only this thread.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let is_zombie = || {
        let text = fs::read_to_string(format!("/proc/{child}/stat")).expect("the process exists");
        text.rsplit_once(") ").is_some_and(|(_, fields)| fields.starts_with('Z'))
    };
    while !is_zombie() {
        std::thread::yield_now();
    }
    let (mappings, writers) = found(&[id(&file)]);
    drop(mapping);
    // SAFETY: the process is a child of this one.
    unsafe {
        libc::kill(child, libc::SIGKILL);
        libc::waitpid(child, std::ptr::null_mut(), 0);
    }
    assert!(mappings.iter().any(|mapping| mapping.1 == child));
    assert!(writers.iter().any(|writer| writer.1 == child));
}
