//! Memory that is read-only because its workload has been handed over. A write to this memory terminates the program
//! with a message.
//!
//! A buffer that a program has exported cannot be revoked, and a write through the buffer would be lost. The memory is
//! therefore made read-only, so that a write raises SIGSEGV. The signal handler prints the reason and restores the
//! previous action of the signal, which by default terminates the program.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Maximum number of closed ranges for which the handler prints the message.
const LIMIT: usize = 64;
const MESSAGE: &[u8] =
    b"pageferry: write to an arena that has moved to another process or host: the write would be lost; terminating \
(SIGSEGV). Do not write between on_pause and on_resume, or after on_moved\n";

/// Start addresses of closed ranges; 0 for an unused slot. A write to a range beyond the limit terminates the program
/// without the message.
static STARTS: [AtomicUsize; LIMIT] = [const { AtomicUsize::new(0) }; LIMIT];
/// End addresses of the ranges in `STARTS`.
static ENDS: [AtomicUsize; LIMIT] = [const { AtomicUsize::new(0) }; LIMIT];
/// Number of ranges registered so far. Slots are not reused.
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// Previous action of SIGSEGV; `None` if the handler could not be installed.
static PREVIOUS: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// Registers a range, so that the handler explains writes to the range. The first call installs the handler.
pub fn watch(start: usize, len: usize) {
    let slot = COUNT.fetch_add(1, Ordering::AcqRel);
    if slot < LIMIT {
        ENDS[slot].store(start + len, Ordering::Release);
        STARTS[slot].store(start, Ordering::Release);
    }
    PREVIOUS.get_or_init(install);
}

/// Unregisters the range that starts at `start`, before it is unmapped.
pub fn forget(start: usize) {
    for slot in &STARTS {
        // No other thread changes the slot of an existing range.
        let _ = slot.compare_exchange(start, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}

fn install() -> Option<libc::sigaction> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = explain;
    // SAFETY: sigaction is plain data, for which zeros are valid; the required fields are set below.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let mut previous = MaybeUninit::zeroed();
    // SAFETY: both pointers refer to a sigaction; the handler is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, previous.as_mut_ptr()) };
    // SAFETY: zeros are valid, and on success the kernel has filled the structure.
    (result == 0).then(|| unsafe { previous.assume_init() })
}

/// Signal handler: prints the reason if the faulting address is in a closed range. Restores the previous action of
/// SIGSEGV and returns, so that the access faults again.
extern "C" fn explain(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo to an SA_SIGINFO handler. If another process has sent the signal, the
    // value is not an address, but the handler only compares it.
    let address = unsafe { (*info).si_addr() } as usize;
    let within = |slot: usize| {
        let start = STARTS[slot].load(Ordering::Acquire);
        start != 0 && start <= address && address < ENDS[slot].load(Ordering::Acquire)
    };
    if (0..LIMIT).any(within) {
        // SAFETY: write is async-signal-safe and only reads the message.
        unsafe { libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len()) };
    }
    // SAFETY: sigaction and signal are async-signal-safe, and `get` never blocks. If the signal arrives after the
    // installation of the handler and before `PREVIOUS` is set, the default action is restored.
    unsafe {
        match PREVIOUS.get() {
            Some(Some(previous)) => libc::sigaction(libc::SIGSEGV, ptr::from_ref(previous), ptr::null_mut()),
            _ => {
                libc::signal(libc::SIGSEGV, libc::SIG_DFL);
                0
            }
        };
    }
}
