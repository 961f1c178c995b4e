//! A call in a separate process, which shares the memory and the descriptors of this process.
//!
//! A SIGKILL ends the threads of one process only, and the memory exists until its last process ends. While the call
//! must not be interrupted, the separate process therefore outlives this one ([`Life`]). At all other times, it ends
//! together with this process, because it may need a lock, such as that of the allocator, that a killed thread of this
//! process holds forever. Only SIGKILL ends the call, if it is sent to the separate process itself or to its whole
//! control group. The kernel also sends SIGKILL if memory is lacking.
//!
//! During the call, the kernel stops the calling thread (CLONE_VFORK), because this thread and the separate process use
//! the same thread-local storage.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use crate::uapi::check;

/// Size of the stack in bytes.
const STACK: usize = 256 << 10;
/// Size of the guard below the stack in bytes.
const GUARD: usize = 64 << 10;
/// Name of the separate processes.
pub(crate) const NAME: &std::ffi::CStr = c"pf-inject";

/// IDs of the separate processes of this process; 0 for an unused slot, -1 for a slot that is about to be used.
static PROCESSES: [AtomicI32; 256] = [const { AtomicI32::new(0) }; 256];
/// Whether a separate process has closed all descriptors, because its parent has ended.
static RELEASED: AtomicBool = AtomicBool::new(false);

/// Lifetime of a separate process.
#[derive(Debug, Clone, Copy)]
pub(super) struct Life {
    parent: libc::pid_t,
}

impl Life {
    /// Makes this process continue when its parent ends. Until `end_with_parent` is called, this process must not
    /// allocate memory or take a lock that threads of the parent take.
    pub(super) fn outlive_parent(self) {
        // SAFETY: the call takes integers.
        unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, 0) };
    }

    /// Makes the kernel end this process when its parent ends. Ends the process at once if the parent has already
    /// ended.
    pub(super) fn end_with_parent(self) {
        // SAFETY: the calls take integers.
        unsafe {
            libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
            if self.is_orphan() {
                libc::_exit(1);
            }
        }
    }

    /// Closes all descriptors if the parent has ended. Otherwise, the locks, sockets and userfaultfds of the parent
    /// would exist until this process ends, and the injected call may wait for one of these to be closed.
    pub(super) fn release_if_orphan(self) {
        if self.is_orphan() && !RELEASED.swap(true, Ordering::Relaxed) {
            // SAFETY: the calls take integers. The parent, which owned the descriptors, has ended. If this process uses
            // one of them later, the call fails with EBADF.
            unsafe {
                libc::unshare(libc::CLONE_FILES);
                libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0);
            }
        }
    }

    fn is_orphan(self) -> bool {
        // SAFETY: getppid has no arguments.
        unsafe { libc::getppid() != self.parent }
    }
}

/// Reason why there is no result.
#[derive(Debug)]
pub(super) enum Failure {
    /// The process could not be created, or cannot recognise the end of its parent. The call has not begun.
    NotBegun,
    /// The process was killed during the call.
    Killed,
}

/// Call that the other process makes.
struct Call<F, T> {
    parent: libc::pid_t,
    work: Option<F>,
    result: Option<std::thread::Result<T>>,
}

/// Returns whether `pid` is a separate process of this process.
pub(crate) fn is_own(pid: libc::pid_t) -> bool {
    PROCESSES.iter().any(|slot| slot.load(Ordering::Relaxed) == pid)
}

/// Runs `work` in another process, and returns its result after that process has ended.
///
/// # Errors
/// See [`Failure`].
///
/// # Panics
/// If `work` panics.
pub(super) fn run<F: FnOnce(Life) -> T + Send, T: Send>(work: F) -> Result<T, Failure> {
    let parent = std::process::id().cast_signed();
    let mut call = Call { parent, work: Some(work), result: None };
    let made = Stack::new().and_then(|stack| with_all_signals_blocked(|| make(&stack, &mut call)));
    match (made, call.result) {
        (_, Some(Ok(result))) => Ok(result),
        (_, Some(Err(panicked))) => resume_unwind(panicked),
        (_, None) if call.work.is_some() => Err(Failure::NotBegun),
        (_, None) => Err(Failure::Killed),
    }
}

/// Creates the process, and waits for its end.
fn make<F: FnOnce(Life) -> T, T>(stack: &Stack, call: &mut Call<F, T>) -> io::Result<()> {
    let unregistered = AtomicI32::new(0);
    let free = |slot: &&AtomicI32| slot.compare_exchange(0, -1, Ordering::Relaxed, Ordering::Relaxed).is_ok();
    let slot = PROCESSES.iter().find(free).unwrap_or(&unregistered);
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::CLONE_FILES | libc::CLONE_FS | libc::CLONE_PARENT_SETTID;
    // SAFETY: the new process accesses `call` and thread-local storage, which this thread does not access in the
    // meantime: CLONE_VFORK stops this thread until the process has ended. If this thread is killed, its memory remains
    // until the new process ends, and no other thread uses it. Only the new process uses `stack`. The kernel stores the
    // process ID in `slot`, which is valid for writing.
    let made = check(unsafe {
        libc::clone(start::<F, T>, stack.top(), flags, std::ptr::from_mut(call).cast(), slot.as_ptr())
    });
    if let Ok(pid) = made {
        // The exit signal is 0, so other waits of this process do not see this child.
        // SAFETY: no status is stored.
        while check(unsafe { libc::waitpid(pid, std::ptr::null_mut(), libc::__WALL) })
            .is_err_and(|error| error.kind() == io::ErrorKind::Interrupted)
        {}
    }
    slot.store(0, Ordering::Relaxed);
    made.map(drop)
}

/// Entry point of the new process.
extern "C" fn start<F: FnOnce(Life) -> T, T>(call: *mut libc::c_void) -> libc::c_int {
    // SAFETY: `make` has passed a pointer to this type, and does not access the value before this process has ended.
    let call = unsafe { &mut *call.cast::<Call<F, T>>() };
    // SAFETY: the name is NUL-terminated, and the other calls take integers. A process in a separate session receives
    // no signals that are sent to the process group of the command. getppid returns 0 if the parent is not in the PID
    // namespace of this process.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, NAME.as_ptr());
        if libc::getppid() == 0 {
            return 0;
        }
    }
    let life = Life { parent: call.parent };
    life.end_with_parent();
    call.result = call.work.take().map(|work| catch_unwind(AssertUnwindSafe(|| work(life))));
    0
}

/// Runs `work` with all signals blocked in this thread, and thus in processes that it creates.
fn with_all_signals_blocked<T>(work: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // SAFETY: all bits of a signal set are valid, and the calls initialise both sets.
    unsafe {
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = (std::mem::zeroed(), std::mem::zeroed());
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        let result = work();
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        result
    }
}

/// Stack with a guard.
struct Stack(*mut libc::c_void);

impl Stack {
    fn new() -> io::Result<Self> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_STACK;
        // SAFETY: the kernel chooses an unused address.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), GUARD + STACK, libc::PROT_NONE, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let stack = Self(start);
        // SAFETY: the range is a part of the new mapping.
        check(unsafe { libc::mprotect(start.add(GUARD), STACK, libc::PROT_READ | libc::PROT_WRITE) })?;
        Ok(stack)
    }

    fn top(&self) -> *mut libc::c_void {
        // SAFETY: the pointer stays within the mapping, or just after its end.
        unsafe { self.0.add(GUARD + STACK) }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        // SAFETY: the mapping belongs to this value, and its process has ended.
        unsafe { libc::munmap(self.0, GUARD + STACK) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_comes_from_another_process() {
        // SAFETY: getpid has no arguments.
        let pid = run(|_| unsafe { libc::getpid() }).expect("a process");
        assert_ne!(u32::try_from(pid).expect("a pid"), std::process::id());
    }

    #[test]
    fn panic_of_the_call_is_a_panic_of_the_caller() {
        let panicked = catch_unwind(|| run(|_| panic!("expected")).is_ok());
        assert!(panicked.is_err());
    }

    #[test]
    fn many_threads_call_at_the_same_time() {
        let calls = |thread| (0..50).map(|turn| run(|_| vec![turn; thread].len()).expect("a process")).sum::<usize>();
        let sum: usize = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..8).map(|thread| scope.spawn(move || calls(thread))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).sum()
        });
        assert_eq!(sum, 50 * 28);
    }

    #[test]
    fn process_is_registered_while_it_exists() {
        // SAFETY: getpid has no arguments.
        let pid = || unsafe { libc::getpid() };
        let (number, registered) = run(|_| (pid(), is_own(pid()))).expect("a process");
        assert!(registered);
        assert!(!is_own(number));
    }

    #[test]
    fn process_ends_with_its_parent_unless_it_must_not() {
        for (outlives, expected) in [(false, 0), (true, 1)] {
            let mut ends = [0; 2];
            // SAFETY: the array has space for two descriptors.
            check(unsafe { libc::pipe(ends.as_mut_ptr()) }).expect("a pipe");
            // SAFETY: the child calls `run`, which makes system calls, allocates no memory and takes no lock. The test
            // kills the child after 100 ms, while `run` takes 200 ms.
            let parent = unsafe { libc::fork() };
            if parent == 0 {
                let _ = run(|life| {
                    if outlives {
                        life.outlive_parent();
                    }
                    // SAFETY: the descriptor is open, and the buffer has one byte.
                    unsafe {
                        libc::usleep(200_000);
                        libc::write(ends[1], b"x".as_ptr().cast(), 1);
                    }
                });
                // SAFETY: the call takes an integer. The child must not run the rest of the test.
                unsafe { libc::_exit(0) };
            }
            // SAFETY: the pid is that of our child; the descriptors are open; the buffer has space for one byte.
            let read = unsafe {
                libc::usleep(100_000);
                libc::kill(parent, libc::SIGKILL);
                libc::waitpid(parent, std::ptr::null_mut(), 0);
                libc::close(ends[1]);
                let read = libc::read(ends[0], (&raw mut ends).cast(), 1);
                libc::close(ends[0]);
                read
            };
            assert_eq!(read, expected, "{outlives}");
        }
    }
}
