//! Injection of system calls into another process, through one of its threads, with ptrace(2).
//!
//! The tracer stops the thread (PTRACE_SEIZE and PTRACE_INTERRUPT), and saves its registers and signal mask. It then
//! single-steps the thread over a `syscall` instruction of the thread's vdso with our arguments, and restores the state
//! of the thread. Other threads keep running. The kernel restarts a system call that the stop interrupted, as after a
//! signal.
//!
//! Side effects that are avoided:
//!
//! - *32-bit code.* The injected system call numbers have another meaning in 32-bit code, which 32-bit processes and
//!   parts of Wine run. A thread that is stopped in such code is therefore rejected before anything is changed. An x32
//!   process is accepted, because it runs in 64-bit mode, where the number alone selects the call.
//! - *Restarts.* `orig_rax` is restored with the other registers, so the kernel restarts the interrupted call. The
//!   injected calls do not change the restart block.
//! - *Restartable sequences.* See [`super::rseq`].
//! - *Stacks.* Nothing is pushed, called or returned from, so red zones, signal frames and shadow stacks are preserved.
//!
//! Only the thread that attached may trace, and the kernel detaches the traced thread when the tracing thread exits. If
//! the tracing thread exits during an injection, the program continues with our registers, and crashes. Each injection
//! therefore runs in a separate process, which completes the injection even if this process is killed (see
//! [`super::apart`]). If the user is not permitted to trace from a separate process, the injection runs in a separate
//! thread. A thread that did not stop within the timeout is detached, so that it does not stop later.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use thiserror::Error;

use super::apart::{self, Failure, Life};
use super::rseq;
use crate::{SMALL_PAGE, uapi};

/// Timeout for a thread to stop. All threads stop immediately, except threads in uninterruptible sleep.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);
/// Timeout for an injected call, which must suffice for long calls, such as unmapping a terabyte.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Maximum time to wait for another tracer to detach.
const TRACER_TIMEOUT: Duration = Duration::from_secs(1);
/// Signals by which the kernel reports the result of an instruction.
const FORCED: [libc::c_int; 6] = [libc::SIGTRAP, libc::SIGSEGV, libc::SIGBUS, libc::SIGILL, libc::SIGFPE, libc::SIGSYS];
/// Maximum number of attempts to stop a thread. An attempt fails if the process executes another program, or if the
/// thread is in 32-bit code or in a restartable sequence that cannot be aborted.
const ATTEMPTS: usize = 20;
/// Segment selector of 64-bit user code. The 32-bit one is 0x23, and local descriptor tables have no 64-bit code.
const CODE_64: u64 = 0x33;
/// Opcode of the `syscall` instruction.
const SYSCALL: [u8; 2] = [0x0f, 0x05];
const SIGSET_LEN: usize = size_of::<u64>();
const PAGE: u64 = SMALL_PAGE as u64;

/// Reason why a process could not be adopted or a system call could not be injected.
#[derive(Debug, Error)]
pub enum AdoptError {
    /// Permission to trace the process is missing.
    #[error(
        "cannot trace process {0}: permission denied; run as root or with CAP_SYS_PTRACE, and check \
         kernel.yama.ptrace_scope"
    )]
    NotPermitted(libc::pid_t),
    /// Another process, such as a debugger, traces the process.
    #[error("cannot trace process {0}: it is being traced by process {1}; detach that tracer first")]
    Traced(libc::pid_t, String),
    /// The process has a seccomp filter that cannot be suspended.
    #[error(
        "cannot trace process {0}: its seccomp filter cannot be suspended by this user; run as root (CAP_SYS_ADMIN), \
         or start it without the filter"
    )]
    Seccomp(libc::pid_t),
    /// The thread did not stop within the timeout.
    #[error("cannot stop process {0} within {1:?}: it is blocked in the kernel (state D in ps)")]
    Stuck(libc::pid_t, Duration),
    /// The process exited.
    #[error("process {0} has exited")]
    Gone(libc::pid_t),
    /// No executable `syscall` instruction was found.
    #[error("cannot inject a system call into process {0}: it has no vdso, or keeps executing new programs")]
    NoVdso(libc::pid_t),
    /// The thread was stopped in 32-bit code, where system call numbers differ.
    #[error(
        "cannot inject a system call into process {0}: it runs 32-bit code (code selector {1:#x}); use a 64-bit \
         program"
    )]
    Code32(libc::pid_t, u64),
    /// The thread is in a restartable sequence that the kernel would not abort either.
    #[error(
        "cannot inject a system call into process {0}: it is in a restartable sequence (rseq) that cannot be \
         aborted: {1}"
    )]
    Sequence(libc::pid_t, &'static str),
    /// The memory is registered with another userfaultfd.
    #[error(
        "cannot register memory of process {0} at {1:#x}: the memory is registered with another userfaultfd (a trace \
         or a post-copy in progress): {2}; finish that operation first"
    )]
    Registered(libc::pid_t, u64, io::Error),
    /// A userfaultfd for the page faults of the process could not be created.
    #[error("cannot handle page faults of process {0}: userfaultfd: {1}; {remedy}", remedy = faults_remedy(.1))]
    NoFaults(libc::pid_t, io::Error),
    /// The process that injects the calls was killed.
    #[error(
        "the process pf-inject, which made process {0} execute system calls, was killed; process {0} may be damaged: \
         check that it runs"
    )]
    Killed(libc::pid_t),
    /// The injected call failed.
    #[error("injected system call failed: {0}")]
    Call(io::Error),
    /// Another system call failed.
    #[error(transparent)]
    Io(#[from] io::Error),
}

/// Returns the remedy for a userfaultfd that could not be created. Without the system call, permissions do not help.
fn faults_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOSYS) => "use a kernel with CONFIG_USERFAULTFD, or a seccomp profile that allows userfaultfd",
        _ => "run it as root, set vm.unprivileged_userfaultfd=1, or give its user access to /dev/userfaultfd",
    }
}

/// Runs `work` while the main thread of a process is stopped.
pub(super) fn on_stopped<T: Send>(
    pid: libc::pid_t,
    work: impl FnOnce(&Stopped) -> Result<T, AdoptError> + Send,
) -> Result<T, AdoptError> {
    on_stopped_within(CALL_TIMEOUT, pid, work)
}

/// Like `on_stopped`, but with the given timeout for each injected call.
fn on_stopped_within<T: Send>(
    timeout: Duration,
    pid: libc::pid_t,
    work: impl FnOnce(&Stopped) -> Result<T, AdoptError> + Send,
) -> Result<T, AdoptError> {
    let mut work = Some(work);
    let mut inject = |life: Option<Life>| {
        let stopped = Stopped::attach(pid, timeout, life)?;
        work.take().map_or_else(|| Err(AdoptError::Io(io::Error::other("injected twice"))), |work| work(&stopped))
    };
    match apart::run(|life| inject(Some(life))) {
        // If kernel.yama.ptrace_scope restricts tracing, a process of an ordinary user may trace only its own
        // descendants. The descendants of this process are not descendants of the separate process.
        Ok(Err(AdoptError::NotPermitted(_))) | Err(Failure::NotBegun) => in_thread(|| inject(None)),
        Ok(result) => result,
        Err(Failure::Killed) => Err(AdoptError::Killed(pid)),
    }
}

/// Runs `inject` in a thread of this process.
fn in_thread<T: Send>(inject: impl FnOnce() -> Result<T, AdoptError> + Send) -> Result<T, AdoptError> {
    let panicked = |_| Err(AdoptError::Io(io::Error::other("internal error: the injecting thread panicked")));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("pf-inject".to_owned()).spawn_scoped(scope, inject)?;
        thread.join().unwrap_or_else(panicked)
    })
}

/// Stopped thread, whose state is restored on drop.
#[derive(Debug)]
pub struct Stopped {
    pid: libc::pid_t,
    saved: libc::user_regs_struct,
    mask: u64,
    instruction: u64,
    /// Signals received during the stop, as a bit set. They are sent again after the registers are restored.
    held: Cell<u64>,
    /// Timeout for each injected call.
    timeout: Duration,
    /// Lifetime of this process, if it is separate from the command.
    life: Option<Life>,
}

impl Stopped {
    fn attach(pid: libc::pid_t, timeout: Duration, life: Option<Life>) -> Result<Self, AdoptError> {
        let mut last = AdoptError::NoVdso(pid);
        for _ in 0..ATTEMPTS {
            match Self::attach_once(pid, timeout, life) {
                // Retry: a process that executes another program has no vdso for a moment, and a thread may soon leave
                // 32-bit code or a restartable sequence.
                Err(error @ (AdoptError::NoVdso(_) | AdoptError::Code32(..) | AdoptError::Sequence(..))) => {
                    last = error;
                    std::thread::sleep(Duration::from_millis(1));
                }
                ended => return ended,
            }
        }
        Err(last)
    }

    fn attach_once(pid: libc::pid_t, timeout: Duration, life: Option<Life>) -> Result<Self, AdoptError> {
        let instruction = find_syscall(pid)?;
        let options = if has_seccomp(pid) { libc::PTRACE_O_SUSPEND_SECCOMP } else { 0 };
        seize(pid, options, life)?;
        // From here on, every error must detach the thread, and no memory may be allocated: see `Life`.
        Self::stop(pid, instruction, timeout, life).inspect_err(|_| {
            detach(pid);
            life.inspect(|life| life.end_with_parent());
        })
    }

    /// Stops a seized thread. Does not change the thread before all checks have passed.
    fn stop(pid: libc::pid_t, instruction: u64, timeout: Duration, life: Option<Life>) -> Result<Self, AdoptError> {
        interrupt(pid, life)?;
        let mut saved = std::mem::MaybeUninit::<libc::user_regs_struct>::zeroed();
        request(libc::PTRACE_GETREGS, pid, 0, saved.as_mut_ptr() as u64)?;
        // SAFETY: all registers are integers, for which zeroed bytes are valid, and the call has filled them.
        let mut saved = unsafe { saved.assume_init() };
        if saved.cs != CODE_64 {
            return Err(AdoptError::Code32(pid, saved.cs));
        }
        if !is_syscall(pid, instruction) {
            return Err(AdoptError::NoVdso(pid)); // executed another program since `find_syscall`
        }
        rseq::abort(pid, &mut saved)?;
        let mut mask = 0u64;
        request(libc::PTRACE_GETSIGMASK, pid, SIGSET_LEN as u64, (&raw mut mask) as u64)?;
        // No signal handler of the program may run with our registers. Signals that the kernel forces must stay
        // unblocked: otherwise the kernel would reset their disposition.
        set_mask(pid, FORCED.iter().fold(u64::MAX, |mask, signal| mask & !(1 << (signal - 1))))?;
        Ok(Self { pid, saved, mask, instruction, held: Cell::new(0), timeout, life })
    }

    /// Executes one system call.
    ///
    /// # Errors
    /// [`AdoptError::Call`] with the errno of the call; other errors if the call could not be executed.
    pub fn call(&self, number: libc::c_long, arguments: [u64; 6]) -> Result<u64, AdoptError> {
        let mut registers = self.saved;
        registers.rip = self.instruction;
        registers.rax = number.cast_unsigned();
        // The thread is no longer in a system call: the kernel must not restart the interrupted call instead of the
        // injected one.
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

    /// Makes the process create a userfaultfd through [`uapi::UFFD_DEVICE`]. The process may have permission to open
    /// the device even if it may not call userfaultfd(2).
    ///
    /// The path is stored in a page that is mapped for this purpose, so that no memory of the program is overwritten.
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

    /// Writes bytes to memory of the process, word by word; the last word is padded with zeros.
    fn poke(&self, address: u64, bytes: &[u8]) -> io::Result<()> {
        for (at, word) in (address..).step_by(8).zip(bytes.chunks(8)) {
            let mut padded = [0; 8];
            padded[..word.len()].copy_from_slice(word);
            request(libc::PTRACE_POKEDATA, self.pid, at, u64::from_le_bytes(padded))?;
        }
        Ok(())
    }

    /// Executes one instruction. Holds back signals that are received before the instruction has been executed.
    fn step(&self) -> Result<(), AdoptError> {
        loop {
            request(libc::PTRACE_SINGLESTEP, self.pid, 0, 0)?;
            match self.hold_back(wait_stopped(self.pid, self.timeout, self.life)?) {
                Some(libc::SIGTRAP) => return Ok(()),
                Some(_) => return Err(AdoptError::NoVdso(self.pid)),
                None => {}
            }
        }
    }

    /// Returns the signal by which the kernel reports the result of the instruction. Holds back any other signal.
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

    /// Interrupts an injected call that has not returned, as a signal would. Returns false if the process has exited.
    fn interrupt_call(&self) -> bool {
        if request(libc::PTRACE_INTERRUPT, self.pid, 0, 0).is_err() {
            return false;
        }
        match wait_stopped(self.pid, STOP_TIMEOUT, self.life) {
            Ok(stop) => {
                self.hold_back(stop);
                // The trap after the interrupted call may still be pending, and would kill the program. Another call
                // consumes the trap.
                let _ = self.call(libc::SYS_getpid, [0; 6]);
                true
            }
            Err(error) => matches!(error, AdoptError::Stuck(..)),
        }
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        // ESRCH: the thread is not stopped, because it is in an injected call. Retry without a limit: the thread must
        // never continue with our registers.
        let running = |error: io::Error| error.raw_os_error() == Some(libc::ESRCH);
        while set_registers(self.pid, &self.saved).is_err_and(running) && self.interrupt_call() {}
        // Failures mean that the process has exited, so nothing needs to be restored.
        let _ = set_mask(self.pid, self.mask);
        detach(self.pid);
        for signal in (1..64).filter(|signal| self.held.get() >> signal & 1 == 1) {
            // SAFETY: tgkill takes no pointers.
            unsafe { libc::syscall(libc::SYS_tgkill, self.pid, self.pid, signal) };
        }
        self.life.inspect(|life| life.end_with_parent());
    }
}

/// Reason why a traced thread has stopped.
enum Stop {
    /// Pending signal.
    Signal(libc::c_int),
    /// PTRACE_INTERRUPT, or a group stop.
    Event,
}

/// Stops a seized thread. Signals that are received before the stop are delivered.
fn interrupt(pid: libc::pid_t, life: Option<Life>) -> Result<(), AdoptError> {
    loop {
        request(libc::PTRACE_INTERRUPT, pid, 0, 0).map_err(|_| AdoptError::Gone(pid))?;
        match wait_stopped(pid, STOP_TIMEOUT, life)? {
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

/// Makes a ptrace call. `data` is a number, or the address of a structure of the type that the request expects.
pub(super) fn request(request: libc::c_uint, pid: libc::pid_t, address: u64, data: u64) -> io::Result<()> {
    // SAFETY: all callers are in this module and `rseq`. As `data`, they pass a number or the address of a live
    // structure of the type that ptrace(2) requires; all other addresses are in the traced process.
    let result = unsafe { libc::ptrace(request, pid, address, data) };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Returns whether the kernel, not another process, has sent the signal that stopped a thread.
fn by_kernel(pid: libc::pid_t) -> bool {
    // SAFETY: all fields of siginfo are integers, for which zero is valid.
    let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETSIGINFO, pid, 0, (&raw mut info) as u64).is_ok() && info.si_code > 0
}

/// Returns whether there is a `syscall` instruction at an address of a stopped thread.
fn is_syscall(pid: libc::pid_t, address: u64) -> bool {
    peek(pid, address).is_ok_and(|word| word.to_le_bytes().starts_with(&SYSCALL))
}

/// Returns the word at an address of a stopped thread.
pub(super) fn peek(pid: libc::pid_t, address: u64) -> io::Result<u64> {
    let mut word = 0u64;
    // Use the system call: the wrapper of the C library returns the word in place of the status.
    // SAFETY: the kernel writes one word to the last argument.
    let result = unsafe { libc::syscall(libc::SYS_ptrace, libc::PTRACE_PEEKTEXT, pid, address, &raw mut word) };
    if result == 0 { Ok(word) } else { Err(io::Error::last_os_error()) }
}

/// Attaches to a thread. If the thread is already traced, waits up to `TRACER_TIMEOUT` for the tracer to detach,
/// because it may be another pageferry process.
///
/// After a successful call, a separate process outlives its parent.
fn seize(pid: libc::pid_t, options: libc::c_int, life: Option<Life>) -> Result<(), AdoptError> {
    let deadline = Instant::now() + TRACER_TIMEOUT;
    let mut refused = false;
    loop {
        life.inspect(|life| life.outlive_parent());
        let Err(error) = request(libc::PTRACE_SEIZE, pid, 0, u64::from(options.unsigned_abs())) else { return Ok(()) };
        life.inspect(|life| life.end_with_parent());
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
            // The tracer may have detached in the meantime: try once more.
            AdoptError::Seccomp(_) | AdoptError::NotPermitted(_) if !refused => refused = true,
            why => return Err(why),
        }
    }
}

/// Waits for the next stop of a traced thread.
fn wait_stopped(pid: libc::pid_t, timeout: Duration, life: Option<Life>) -> Result<Stop, AdoptError> {
    let deadline = Instant::now() + timeout;
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
            return Err(AdoptError::Stuck(pid, timeout));
        }
        life.inspect(|life| life.release_if_orphan());
        std::thread::sleep(Duration::from_micros(20));
    }
}

fn status_field(pid: libc::pid_t, field: &str) -> Option<String> {
    // Read bytes: the name of the process, on the first line, may not be UTF-8.
    let status = fs::read(format!("/proc/{pid}/status")).ok()?;
    let value = status.split(|&byte| byte == b'\n').find_map(|line| line.strip_prefix(field.as_bytes()))?;
    Some(String::from_utf8_lossy(value).trim().to_owned())
}

fn has_seccomp(pid: libc::pid_t) -> bool {
    status_field(pid, "Seccomp:").is_some_and(|mode| mode != "0")
}

/// Returns the address of a `syscall` instruction in the vdso of a process.
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

/// Finds the address range of the vdso in the contents of /proc/PID/maps. File paths may contain any byte, but start
/// with a slash.
fn vdso_range(maps: &[u8]) -> Option<(u64, u64)> {
    let fields = |line: &'_ [u8]| -> Option<(u64, u64)> {
        let (head, name) = line.split_at_checked(line.len().checked_sub(b" [vdso]".len())?)?;
        let mut fields = head.split(|&byte| byte == b' ').filter(|field| !field.is_empty());
        let range = std::str::from_utf8(fields.next()?).ok()?;
        // The fields are range, permissions, offset, device and inode, followed only by the name.
        if name != b" [vdso]" || fields.nth(3)? != b"0" || fields.next().is_some() {
            return None;
        }
        let (start, end) = range.split_once('-')?;
        Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
    };
    maps.split(|&byte| byte == b'\n').find_map(fields)
}

#[cfg(not(target_arch = "x86_64"))]
compile_error!("injection of system calls is implemented for x86-64 only");

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

    /// Returns the pid of a process that injects a call of 300 ms into process `target`, and is killed during the call.
    fn killed_during_a_call(target: libc::pid_t) -> libc::pid_t {
        // SAFETY: the child calls `on_stopped` and `_exit`. `on_stopped` allocates memory, and starts a thread if
        // tracing from a separate process is not permitted. glibc supports both in the child of a process with threads.
        let injecting = unsafe { libc::fork() };
        if injecting == 0 {
            let poll = |stopped: &Stopped| stopped.call(libc::SYS_poll, [0, 0, 300, 0, 0, 0]);
            let _ = on_stopped(target, poll);
            // SAFETY: `_exit` takes an integer, and ends the child at once.
            unsafe { libc::_exit(0) };
        }
        std::thread::sleep(Duration::from_millis(100));
        // SAFETY: the pid is that of our child, which has not been waited for. No status is stored.
        unsafe {
            libc::kill(injecting, libc::SIGKILL);
            libc::waitpid(injecting, std::ptr::null_mut(), 0);
        }
        injecting
    }

    #[test]
    fn process_survives_the_death_of_the_injecting_process() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell");
        let pid = libc::pid_t::try_from(child.id()).expect("a pid");
        std::thread::sleep(Duration::from_millis(50));
        let permitted = on_stopped(pid, |stopped| stopped.call(libc::SYS_getpid, [0; 6]));
        killed_during_a_call(pid);
        std::thread::sleep(Duration::from_millis(600));
        let exited = child.try_wait().expect("a child");
        let again = on_stopped(pid, |stopped| stopped.call(libc::SYS_getpid, [0; 6]));
        child.kill().expect("a child");
        child.wait().expect("a child");
        if matches!(permitted, Err(AdoptError::NotPermitted(_))) {
            return eprintln!("skipped: {permitted:?}");
        }
        assert_eq!(exited, None);
        assert_eq!(again.ok(), u64::try_from(pid).ok());
    }

    #[test]
    fn process_survives_a_call_that_does_not_return() {
        let mut child = Command::new("sh").args(["-c", "while :; do :; done"]).spawn().expect("a shell");
        let pid = libc::pid_t::try_from(child.id()).expect("a pid");
        std::thread::sleep(Duration::from_millis(50));
        let poll = |stopped: &Stopped| stopped.call(libc::SYS_poll, [0, 0, 600_000, 0, 0, 0]);
        let ended = on_stopped_within(Duration::from_millis(50), pid, poll);
        // The process has returned to its loop, has no pending trap, and can be adopted again.
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
