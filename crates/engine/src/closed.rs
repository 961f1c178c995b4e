//! Memory that has been closed to writes because it runs elsewhere: a late write ends the program, with a message.
//!
//! A buffer that a program has exported cannot be revoked. A write through it would succeed and be lost; instead the page
//! is read-only, the write raises SIGSEGV, and the handler says why before the program ends as by any SIGSEGV.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

const LIMIT: usize = 64;
const MESSAGE: &[u8] =
    b"pageferry: a write to an arena that has moved to another process or host: it would be lost, and \
the program ends (SIGSEGV). Write only while on_pause does not hold, and not after on_moved\n";

/// Start and end of closed ranges; those beyond the limit end the program without the message.
static STARTS: [AtomicUsize; LIMIT] = [const { AtomicUsize::new(0) }; LIMIT];
static ENDS: [AtomicUsize; LIMIT] = [const { AtomicUsize::new(0) }; LIMIT];
static COUNT: AtomicUsize = AtomicUsize::new(0);
/// What SIGSEGV did before; None where the handler could not be installed.
static PREVIOUS: OnceLock<Option<libc::sigaction>> = OnceLock::new();

/// Explains a write to this range from now on.
pub fn watch(start: usize, len: usize) {
    let slot = COUNT.fetch_add(1, Ordering::AcqRel);
    if slot < LIMIT {
        ENDS[slot].store(start + len, Ordering::Release);
        STARTS[slot].store(start, Ordering::Release);
    }
    PREVIOUS.get_or_init(install);
}

/// The range that starts there is unmapped.
pub fn forget(start: usize) {
    for slot in &STARTS {
        // Nothing else changes a slot whose range exists.
        let _ = slot.compare_exchange(start, 0, Ordering::AcqRel, Ordering::Acquire);
    }
}

fn install() -> Option<libc::sigaction> {
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = explain;
    // SAFETY: sigaction is plain data, for which zeros are valid; the fields that count are set below.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let mut previous = MaybeUninit::zeroed();
    // SAFETY: both point to a sigaction; the handler is async-signal-safe.
    let result = unsafe { libc::sigaction(libc::SIGSEGV, &raw const action, previous.as_mut_ptr()) };
    // SAFETY: zeros are valid, and on success the kernel has filled it.
    (result == 0).then(|| unsafe { previous.assume_init() })
}

/// Says why, puts back what SIGSEGV did before and returns: the access faults again.
extern "C" fn explain(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel gives a valid siginfo to a handler with SA_SIGINFO, and SIGSEGV has an address in it.
    let address = unsafe { (*info).si_addr() } as usize;
    let within = |slot: usize| {
        let start = STARTS[slot].load(Ordering::Acquire);
        start != 0 && start <= address && address < ENDS[slot].load(Ordering::Acquire)
    };
    if (0..LIMIT).any(within) {
        // SAFETY: write is async-signal-safe and reads the message only.
        unsafe { libc::write(libc::STDERR_FILENO, MESSAGE.as_ptr().cast(), MESSAGE.len()) };
    }
    // SAFETY: sigaction is async-signal-safe; `get` does not block once the value is there, and the signal was installed
    // by who sets it. Without it the default action is restored.
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
