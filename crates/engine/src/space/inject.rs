//! System calls made inside another process, on one of its threads, by ptrace.
//!
//! One thread is stopped (PTRACE_SEIZE + INTERRUPT), its registers and signal mask are saved, it is single-stepped over
//! a `syscall` instruction of its own vdso with our arguments, and everything is put back. Other threads run on. A
//! system call that the stop interrupted is restarted by the kernel, as after any signal.
//!
//! What a stop must not disturb:
//!
//! - *32-bit code.* The numbers of system calls are those of 64-bit code. A thread that is stopped in 32-bit code (all
//!   code of a 32-bit process, some code of Wine) is refused before anything is changed, because there the same numbers
//!   are other calls. An x32 process runs in 64-bit mode, where the number alone selects the call: it is not refused.
//! - *Restarts.* `orig_rax` of the thread is put back with its other registers, so that the kernel restarts the call
//!   that the stop interrupted, whichever instruction made it; our own calls leave its restart block alone.
//! - *Restartable sequences.* See [`super::rseq`].
//! - *Stacks.* Nothing is pushed, called or returned from: red zones, signal frames and shadow stacks stay as they are.
//!
//! A tracer is a thread: when it ends the kernel lets go of what it traced. So injection has a thread of its own, and a
//! process that did not stop in time is not left to stop later, for as long as we live.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::rseq;
use crate::{SMALL_PAGE, uapi};

/// How long a thread may take to stop. It stops at once unless it is in an uninterruptible sleep.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long a call may take: to unmap a terabyte takes the kernel some time.
const CALL: Duration = Duration::from_secs(60);
/// How long another tracer is waited for.
const OTHERS: Duration = Duration::from_secs(1);
/// Signals by which the kernel reports what an instruction did.
const FORCED: [libc::c_int; 6] = [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];
/// How often a thread is stopped again that had become another program, or was in 32-bit code.
const ATTEMPTS: usize = 20;
/// Selector of 64-bit user code. No other one is 64-bit: neither the 32-bit one (0x23) nor any of a local table.
const CODE_64: u64 = 0x33;
/// The `syscall` instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
const SIGSET_LEN: usize = size_of::<u64>();
const PAGE: u64 = SMALL_PAGE as u64;

/// Why no system call could be made in another process.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// The right to trace the process is missing.
    #[error("process {0} may not be traced: run as root or with CAP_SYS_PTRACE, and see kernel.yama.ptrace_scope")]
    NotPermitted(libc::pid_t),
    /// Somebody else (a debugger, strace) traces it.
    #[error("process {0} is being traced by process {1}: detach that tracer first")]
    Traced(libc::pid_t, String),
    /// It has a system-call filter that cannot be suspended.
    #[error(
        "process {0} runs under a seccomp filter that this user may not suspend: run as root (CAP_SYS_ADMIN), or start \
         it without the filter"
    )]
    Seccomp(libc::pid_t),
    /// It did not stop.
    #[error("process {0} did not stop within {1:?}: it waits in the kernel (state D in ps)")]
    Stuck(libc::pid_t, Duration),
    /// It ended meanwhile.
    #[error("process {0} is gone")]
    Gone(libc::pid_t),
    /// No `syscall` instruction was found that could be executed.
    #[error("process {0} has no vdso to make a system call from (or starts one program after the other)")]
    NoVdso(libc::pid_t),
    /// It was stopped in code in which the numbers of system calls are others.
    #[error(
        "process {0} runs 32-bit code (code selector {1:#x}): system calls can be made in 64-bit code only; manage a \
         64-bit program"
    )]
    Code32(libc::pid_t, u64),
    /// It was stopped in a restartable sequence that the kernel would not restart either.
    #[error("process {0} is in a restartable sequence (rseq) that cannot be aborted: {1}")]
    Sequence(libc::pid_t, &'static str),
    /// Somebody else's userfaultfd is on it.
    #[error(
        "memory of process {0} at {1:#x} is registered with another userfaultfd (a trace or a post-copy under way): \
         end that first ({2})"
    )]
    Registered(libc::pid_t, u64, io::Error),
    /// Page faults of its system calls, or any of its page faults, cannot be handled.
    #[error("page faults of process {0} cannot be handled (userfaultfd: {1}); {remedy}", remedy = faults_remedy(.1))]
    NoFaults(libc::pid_t, io::Error),
    /// The call was made and failed.
    #[error("a system call made in the process failed: {0}")]
    Call(io::Error),
    /// Anything else.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// What makes userfaultfd available after this error. Rights do not help where the system call does not exist.
fn faults_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "use a kernel with CONFIG_USERFAULTFD, or a seccomp profile that allows userfaultfd",
        _ => "run it as root, set vm.unprivileged_userfaultfd=1, or give its user access to /dev/userfaultfd",
    }
}

/// Does `work` on the stopped main thread of a process.
pub(super) fn on_stopped<T: Send>(
    pid: libc::pid_t,
    work: impl FnOnce(&Stopped) -> Result<T, AdoptError> + Send,
) -> Result<T, AdoptError> {
    on_stopped_within(CALL, pid, work)
}

/// As `on_stopped`; each call may take so long.
fn on_stopped_within<T: Send>(
    patience: Duration,
    pid: libc::pid_t,
    work: impl FnOnce(&Stopped) -> Result<T, AdoptError> + Send,
) -> Result<T, AdoptError> {
    let panicked = |_| Err(AdoptError::Io(io::Error::other("the injecting thread panicked")));
    let inject = || work(&Stopped::attach(pid, patience)?);
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("pf-inject".to_owned()).spawn_scoped(scope, inject)?;
        thread.join().unwrap_or_else(panicked)
    })
}

/// A thread that is stopped, to be put back as it was when this is dropped.
#[derive(Debug)]
pub struct Stopped {
    pid: libc::pid_t,
    saved: libc::user_regs_struct,
    mask: u64,
    instruction: u64,
    /// Signals that came meanwhile, to be sent again once the thread has its registers back.
    held: Cell<u64>,
    /// How long a call may take.
    patience: Duration,
}

impl Stopped {
    fn attach(pid: libc::pid_t, patience: Duration) -> Result<Self, AdoptError> {
        let mut last = AdoptError::NoVdso(pid);
        for _ in 0..ATTEMPTS {
            match Self::attach_once(pid, patience) {
                // Between two programs there is nothing, and what is in 32-bit code may be in 64-bit code soon.
                Err(error @ (AdoptError::NoVdso(_) | AdoptError::Code32(..) | AdoptError::Sequence(..))) => {
                    last = error;
                    std::thread::sleep(Duration::from_millis(1));
                }
                ended => return ended,
            }
        }
        Err(last)
    }

    fn attach_once(pid: libc::pid_t, patience: Duration) -> Result<Self, AdoptError> {
        let instruction = find_syscall(pid)?;
        let options = if has_seccomp(pid) { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        seize(pid, options)?;
        // From here on every way out must detach.
        Self::stop(pid, instruction, patience).inspect_err(|_| detach(pid))
    }

    /// Stops a seized thread. Nothing of it is changed before all that could be refused is known.
    fn stop(pid: libc::pid_t, instruction: u64, patience: Duration) -> Result<Self, AdoptError> {
        interrupt(pid)?;
        let mut saved = std::mem::MaybeUninit::<libc::user_regs_struct>::zeroed();
        request(libc::PTRACE_GETREGS, pid, 0, saved.as_mut_ptr() as u64)?;
        // SAFETY: zeroed bytes are valid for these plain numbers, and the call filled them in.
        let mut saved = unsafe { saved.assume_init() };
        if saved.cs != CODE_64 {
            return Err(AdoptError::Code32(pid, saved.cs));
        }
        if !is_syscall(pid, instruction) {
            return Err(AdoptError::NoVdso(pid)); // it has become another program since the instruction was found
        }
        rseq::abort(pid, &mut saved)?;
        let mut mask = 0u64;
        request(libc::PTRACE_GETSIGMASK, pid, SIGSET_LEN as u64, (&raw mut mask) as u64)?;
        // No handler of the program may run between our registers and its own. Signals that the kernel forces must stay
        // open: where they are blocked it resets the program's own disposition of them.
        set_mask(pid, FORCED.iter().fold(u64::MAX, |mask, signal| mask & !(1 << (signal - 1))))?;
        Ok(Self { pid, saved, mask, instruction, held: Cell::new(0), patience })
    }

    /// One system call.
    pub fn call(&self, number: libc::c_long, arguments: [u64; 6]) -> Result<u64, AdoptError> {
        let mut registers = self.saved;
        registers.rip = self.instruction;
        registers.rax = number.cast_unsigned();
        // Not inside a system call any more, or the kernel would restart the interrupted one over ours.
        registers.orig_rax = u64::MAX;
        [registers.rdi, registers.rsi, registers.rdx, registers.r10, registers.r8, registers.r9] = arguments;
        set_registers(self.pid, &registers)?;
        self.step()?;
        request(libc::PTRACE_GETREGS, self.pid, 0, (&raw mut registers) as u64)?;
        let result = registers.rax.cast_signed();
        match i32::try_from(-result) {
            Ok(errno @ 1..4096) => Err(AdoptError::Call(io::Error::from_raw_os_error(errno))),
            _ => Ok(registers.rax),
        }
    }

    /// Has the process create a userfaultfd by [`uapi::UFFD_DEVICE`], which it may open where its permissions allow.
    ///
    /// The path goes to a page that is mapped for it, so that no memory of the program is written to.
    pub fn userfault_of_device(&self, flags: u64) -> Result<u64, AdoptError> {
        let flags_of_map = u64::from((libc::MAP_PRIVATE | libc::MAP_ANONYMOUS).cast_unsigned());
        let protection = u64::from((libc::PROT_READ | libc::PROT_WRITE).cast_unsigned());
        let page = self.call(libc::SYS_mmap, [0, PAGE, protection, flags_of_map, u64::MAX, 0])?;
        let made = self.poke(page, uapi::UFFD_DEVICE.to_bytes_with_nul()).map_err(AdoptError::from).and_then(|()| {
            let mode = u64::from((libc::O_RDWR | libc::O_CLOEXEC).cast_unsigned());
            let device = self.call(libc::SYS_openat, [0, page, mode, 0, 0, 0])?;
            let made = self.call(libc::SYS_ioctl, [device, uapi::USERFAULTFD_IOC_NEW, flags, 0, 0, 0]);
            self.call(libc::SYS_close, [device, 0, 0, 0, 0, 0])?;
            made
        });
        self.call(libc::SYS_munmap, [page, PAGE, 0, 0, 0, 0])?;
        made
    }

    /// Writes bytes to memory of the process, a word at a time; zeros follow them in the last word.
    fn poke(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        for (at, word) in (address..).step_by(8).zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            request(libc::PTRACE_POKEDATA, self.pid, at, u64::from_le_bytes(padded))?;
        }
        Ok(())
    }

    /// Executes one instruction. A signal that comes first (SIGSTOP, or one that is open) is held back.
    fn step(&self) -> Result<(), AdoptError> {
        loop {
            request(libc::PTRACE_SINGLESTEP, self.pid, 0, 0)?;
            match self.hold_back(wait_stopped(self.pid, self.patience)?) {
                Some(libc::SIGTRAP) => return Ok(()),
                Some(_) => return Err(AdoptError::NoVdso(self.pid)),
                None => {}
            }
        }
    }

    /// The signal by which the kernel reports what the instruction did; any other is kept for later.
    fn hold_back(&self, stop: Stop) -> Option<libc::c_int> {
        match stop {
            Stop::Signal(signal) if FORCED.contains(&signal) && by_kernel(self.pid) => Some(signal),
            Stop::Signal(signal) => {
                self.held.set(self.held.get() | 1 << signal);
                None
            }
            Stop::Event => None,
        }
    }

    /// Ends a call that has not come back, as a signal would, or waits for it; false: the process is gone.
    fn interrupt_call(&self) -> bool {
        if request(libc::PTRACE_INTERRUPT, self.pid, 0, 0).is_err() {
            return false;
        }
        match wait_stopped(self.pid, PATIENCE) {
            Ok(stop) => {
                self.hold_back(stop);
                // The trap after that call may be still to come, and would end the program: it is taken by this one.
                let _ = self.call(libc::SYS_getpid, [0; 6]);
                true
            }
            Err(error) => matches!(error, AdoptError::Stuck(..)),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // Not stopped: it is in a call of ours. With our registers it must never run on, however long that takes.
        let running = |error: io::Error| error.raw_os_error() == Some(libc::ESRCH);
        while set_registers(self.pid, &self.saved).is_err_and(running) && self.interrupt_call() {}
        // Failures mean that the process is gone, and then there is nothing to put back.
        let _ = set_mask(self.pid, self.mask);
        detach(self.pid);
        for signal in (1..64).filter(|signal| self.held.get() >> signal & 1 == 1) {
            // SAFETY: takes no pointers.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, signal) };
        }
    }
}

/// What stopped a traced thread.
enum Stop {
    /// A signal that is about to be delivered.
    Signal(libc::c_int),
    /// Our own PTRACE_INTERRUPT, or a group stop.
    Event,
}

/// Stops a seized thread; signals that come first are delivered as they would have been.
fn interrupt(pid: libc::pid_t) -> Result<(), AdoptError> {
    loop {
        request(libc::PTRACE_INTERRUPT, pid, 0, 0).map_err(|_| AdoptError::Gone(pid))?;
        match wait_stopped(pid, PATIENCE)? {
            Stop::Event => return Ok(()),
            Stop::Signal(signal) => request(libc::PTRACE_CONT, pid, 0, u64::from(signal.unsigned_abs()))?,
        }
    }
}

fn detach(pid: libc::pid_t) {
    let _ = request(libc::PTRACE_DETACH, pid, 0, 0);
}

fn set_registers(pid: libc::pid_t, registers: &libc::user_regs_struct) -> io::Result<()> {
    request(libc::PTRACE_SETREGS, pid, 0, std::ptr::from_ref(registers) as u64)
}

fn set_mask(pid: libc::pid_t, mask: u64) -> io::Result<()> {
    request(libc::PTRACE_SETSIGMASK, pid, SIGSET_LEN as u64, (&raw const mask) as u64)
}

/// One `ptrace` call. `data` is a number, or the address of a structure of the request's type that outlives the call.
pub(super) fn request(request: libc::c_uint, pid: libc::pid_t, address: u64, data: u64) -> io::Result<()> {
    // SAFETY: the callers, all in this module and `rseq`, pass addresses of live structures of the types that ptrace(2) gives.
    let result = unsafe { libc::ptrace(request, pid, address, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Whether the signal that a thread has stopped for comes from the kernel, not from another process.
fn by_kernel(pid: libc::pid_t) -> bool {
    // SAFETY: all fields are numbers.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETSIGINFO, pid, 0, (&raw mut info) as u64).is_ok() && info.si_code > 0
}

/// Whether there is (still) a `syscall` instruction at an address of a stopped thread.
fn is_syscall(pid: libc::pid_t, address: u64) -> bool {
    peek(pid, address).is_ok_and(|word| word.to_le_bytes().starts_with(&SYSCALL))
}

/// The word at an address of a stopped thread.
pub(super) fn peek(pid: libc::pid_t, address: u64) -> io::Result<u64> {
    let mut word = 0u64;
    // The system call itself, not the C library's wrapper, which returns the word.
    // SAFETY: the kernel writes one word to the last argument.
    let result = unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKTEXT, pid, address, &raw mut word) };
    if result == 0 { Ok(word) } else { Err(io::Error::last_os_error()) }
}

/// Attaches to a thread. One that is traced may be so by another process of ours, which is done in a millisecond.
fn seize(pid: libc::pid_t, options: libc::c_int) -> Result<(), AdoptError> {
    let deadline = Instant::now() + OTHERS;
    let mut refused = false;
    loop {
        let Err(error) = request(libc::PTRACE_SEIZE, pid, 0, u64::from(options.unsigned_abs())) else { return Ok(()) };
        let why = match error.raw_os_error() {
            Some(libc::ESRCH) => AdoptError::Gone(pid),
            Some(libc::EPERM) => match status_field(pid, "TracerPid:") {
                Some(tracer) if tracer != "0" => AdoptError::Traced(pid, tracer),
                _ if options != 0 => AdoptError::Seccomp(pid),
                _ => AdoptError::NotPermitted(pid),
            },
            _ => error.into(),
        };
        match why {
            AdoptError::Traced(..) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            // Or it was, and is not any more.
            AdoptError::Seccomp(_) | AdoptError::NotPermitted(_) if !refused => refused = true,
            why => return Err(why),
        }
    }
}

/// Waits for the next stop of a traced thread.
fn wait_stopped(pid: libc::pid_t, patience: Duration) -> Result<Stop, AdoptError> {
    let deadline = Instant::now() + patience;
    loop {
        let mut status = 0;
        // SAFETY: `status` is valid for writing.
        let waited = unsafe { libc::waitpid(pid, &raw mut status, libc::__WALL | libc::WNOHANG) };
        if waited == pid {
            return match libc::WIFSTOPPED(status) {
                true if status >> 16 == libc::PTRACE_EVENT_STOP => Ok(Stop::Event),
                true => Ok(Stop::Signal(libc::WSTOPSIG(status))),
                false => Err(AdoptError::Gone(pid)),
            };
        }
        if waited < 0 {
            return Err(AdoptError::Gone(pid));
        }
        if Instant::now() > deadline {
            return Err(AdoptError::Stuck(pid, patience));
        }
        std::thread::sleep(Duration::from_micros(20));
    }
}

fn status_field(pid: libc::pid_t, field: &str) -> Option<String> {
    // Bytes: the name of the process, on the first line, need not be UTF-8.
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let value = status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(field.as_bytes()))?;
    Some(String::from_utf8_lossy(value).trim().to_owned())
}

fn has_seccomp(pid: libc::pid_t) -> bool {
    status_field(pid, "Seccomp:").is_some_and(|mode| mode != "0")
}

/// Address of a `syscall` instruction in the vdso of a process.
fn find_syscall(pid: libc::pid_t) -> Result<u64, AdoptError> {
    let maps = fs::read(format!("/proc/{pid}/maps")).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => AdoptError::Gone(pid),
        io::ErrorKind::PermissionDenied => AdoptError::NotPermitted(pid),
        _ => error.into(),
    })?;
    let (start, end) = vdso_range(&maps).ok_or(AdoptError::NoVdso(pid))?;
    let mut text = vec![0; usize::try_from(end - start).unwrap_or(0).min(1 << 16)];
    let memory = File::open(format!("/proc/{pid}/mem")).map_err(|error| match error.kind() {
        io::ErrorKind::PermissionDenied => AdoptError::NotPermitted(pid),
        _ => error.into(),
    })?;
    memory.read_exact_at(&mut text, start).map_err(|_| AdoptError::NoVdso(pid))?;
    let offset = text.windows(2).position(|bytes| bytes == SYSCALL).ok_or(AdoptError::NoVdso(pid))?;
    Ok(start + offset as u64)
}

/// Address range of the vdso in the contents of /proc/PID/maps. Paths of files hold any byte, and start with a slash.
fn vdso_range(maps: &[u8]) -> Option<(u64, u64)> {
    let fields = |line: &'_ [u8]| -> Option<(u64, u64)> {
        let (head, name) = line.split_at_checked(line.len().checked_sub(b" [vdso]".len())?)?;
        let mut fields = head.split(|&byte| byte == b' ').filter(|field| !field.is_empty());
        let range = std::str::from_utf8(fields.next()?).ok()?;
        // Range, permissions, offset, device, inode, and nothing but the name.
        if name != b" [vdso]" || fields.nth(3)? != b"0" || fields.next().is_some() {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    maps.split(|&byte| byte == b'\n').find_map(fields)
}

#[cfg(not(target_arch = "x86_64"))]
compile_error!("system calls are injected on x86-64 only so far");

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn vdso_range_ignores_files_of_that_name() {
        let maps = b"1000-2000 r-xp 00000000 00:01 7        /tmp/\xff [vdso]\n\
            3000-4000 r-xp 00000000 00:00 0          [vdso]\n";
        assert_eq!(vdso_range(maps), Some((0x3000, 0x4000)));
        assert_eq!(vdso_range(b"1000-2000 r-xp 00000000 00:01 7 /tmp/[vdso]\n"), None);
    }

    #[test]
    fn missing_userfaultfd_is_not_blamed_on_rights() {
        let message = |errno| AdoptError::NoFaults(1, io::Error::from_raw_os_error(errno)).to_string();
        assert!(message(libc::ENOSYS).ends_with("allows userfaultfd"));
        assert!(!message(libc::ENOSYS).contains("root"));
        assert!(message(libc::EPERM).contains("run it as root"));
    }

    #[test]
    fn a_process_survives_a_call_that_does_not_come_back() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell");
        let pid = libc::pid_t::try_from(child.id()).expect("a pid");
        std::thread::sleep(Duration::from_millis(50));
        let poll = |stopped: &Stopped| stopped.call(libc::SYS_poll, [0, 0, 600_000, 0, 0, 0]);
        let ended = on_stopped_within(Duration::from_millis(50), pid, poll);
        // It is back in its loop, with no trap of ours left to end it, and can be adopted again.
        let again = on_stopped(pid, |stopped| stopped.call(libc::SYS_getpid, [0; 6]));
        std::thread::sleep(Duration::from_millis(50));
        let exited = child.try_wait().expect("a child");
        child.kill().expect("a child");
        child.wait().expect("a child");
        if matches!(ended, Err(AdoptError::NotPermitted(_))) {
            return eprintln!("skipped: {ended:?}");
        }
        assert!(matches!(ended, Err(AdoptError::Stuck(..))), "{ended:?}");
        assert_eq!(again.ok(), u64::try_from(pid).ok());
        assert_eq!(exited, None);
    }
}
