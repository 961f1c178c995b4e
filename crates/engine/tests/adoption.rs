//! Tests of adoption: registers, signals, waits, seccomp filters and stops of the adopted process are restored
//! completely.
//!
//! The tests fork the processes that they adopt. These processes use only system calls, and atomics on shared memory.

use std::mem::zeroed;
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use pageferry_engine::space::{AdoptError, Space};
use pageferry_engine::uapi::{FEATURE_PAGEFAULT_FLAG_WP, FEATURE_WP_ASYNC, FEATURE_WP_HUGETLBFS_SHMEM};

const FEATURES: u64 = FEATURE_PAGEFAULT_FLAG_WP | FEATURE_WP_HUGETLBFS_SHMEM | FEATURE_WP_ASYNC;
const DEADLINE: Duration = Duration::from_secs(20);

/// Memory shared between the test and the child.
#[derive(Debug, Default)]
struct Board {
    /// Number of steps that the child has completed.
    steps: AtomicU64,
    /// Number of handled signals.
    signals: AtomicU64,
    /// Number of failed checks.
    wrong: AtomicU64,
    /// Result of the last timed call.
    result: AtomicI64,
    /// Duration of the last timed call in nanoseconds.
    time: AtomicU64,
    /// Number that the test or the child stores to signal the other process.
    go: AtomicU64,
}

struct Child {
    pid: libc::pid_t,
    board: &'static Board,
}

thread_local! {
    /// Board of the current test: tests run in separate threads, and a forked child has only the thread that forked it.
    static BOARD: std::cell::Cell<*const Board> = const { std::cell::Cell::new(null()) };
}

fn board() -> &'static Board {
    // SAFETY: the pointer is set before the fork, to a page that is never unmapped and only accessed with atomics. The
    // page is large enough for a board, and zeros are a valid board.
    unsafe { &*BOARD.with(std::cell::Cell::get) }
}

impl Child {
    /// Forks a process that repeats `work` until it is killed.
    fn new(work: fn()) -> Self {
        let (access, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED | libc::MAP_ANONYMOUS);
        // SAFETY: mmap creates a new mapping at an address chosen by the kernel.
        let memory = unsafe { libc::mmap(null_mut(), 4096, access, flags, -1, 0) };
        assert_ne!(memory, libc::MAP_FAILED);
        BOARD.with(|board| board.set(memory.cast()));
        // SAFETY: the child calls no function that allocates memory, takes a lock or requires another thread.
        let pid = unsafe { libc::fork() };
        assert!(pid >= 0);
        if pid == 0 {
            // SAFETY: prctl takes no pointers here; the child is killed when the thread of the test exits.
            unsafe { libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) };
            loop {
                work();
            }
        }
        Self { pid, board: board() }
    }

    fn space(&self) -> Space {
        Space::open(self.pid).expect("the child's address space")
    }

    fn adopt(&self) -> Result<(), AdoptError> {
        self.space().userfault(FEATURES).map(drop)
    }

    fn signal(&self, signal: libc::c_int) {
        // SAFETY: kill takes no pointers.
        assert_eq!(unsafe { libc::kill(self.pid, signal) }, 0);
    }

    /// Waits until the counter has reached `value`. Panics after `DEADLINE`.
    fn reaches(&self, counter: &AtomicU64, value: u64) {
        let begin = Instant::now();
        while counter.load(Ordering::SeqCst) < value {
            assert!(begin.elapsed() < DEADLINE, "{:?}", self.board);
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn state(&self) -> char {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.pid)).expect("a process");
        stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).expect("a state")
    }

    fn open_descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.pid)).expect("a process").count()
    }

    /// Checks that the child is running, makes progress and has not failed.
    fn check(&self) {
        let steps = self.board.steps.load(Ordering::SeqCst);
        self.reaches(&self.board.steps, steps + 2);
        assert_eq!(self.board.wrong.load(Ordering::SeqCst), 0);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // SAFETY: kill and waitpid are called for our own child, which has not been reaped.
        unsafe {
            libc::kill(self.pid, libc::SIGKILL);
            libc::waitpid(self.pid, null_mut(), 0);
        }
    }
}

fn step() {
    board().steps.fetch_add(1, Ordering::SeqCst);
}

fn went_wrong(wrong: bool) {
    board().wrong.fetch_add(u64::from(wrong), Ordering::SeqCst);
}

extern "C" fn count_signal(_: libc::c_int) {
    board().signals.fetch_add(1, Ordering::SeqCst);
}

fn handle(signal: libc::c_int) {
    let handler: extern "C" fn(libc::c_int) = count_signal;
    // SAFETY: an all-zero sigaction is valid, and lives through the call. The handler is async-signal-safe.
    unsafe {
        let mut action: libc::sigaction = zeroed();
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(signal, &raw const action, null_mut());
    }
}

/// Computes a value that a corrupted register would change.
fn compute() {
    let run = |mut word: u64| {
        for _ in 0..2000 {
            word = word.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f).rotate_left(7);
        }
        word
    };
    let seed = std::hint::black_box(board().steps.load(Ordering::SeqCst));
    went_wrong(run(seed) != run(std::hint::black_box(seed)));
    step();
}

fn milliseconds(count: i64) -> libc::timespec {
    libc::timespec { tv_sec: 0, tv_nsec: count * 1_000_000 }
}

#[test]
fn computation_continues_unchanged() {
    let child = Child::new(compute);
    child.reaches(&child.board.steps, 1);
    let (descriptors, begin) = (child.open_descriptors(), Instant::now());
    for _ in 0..100 {
        child.adopt().expect("adoption");
    }
    eprintln!("{:?} per adoption", begin.elapsed() / 100);
    child.check();
    assert_eq!(child.open_descriptors(), descriptors);
}

#[test]
fn injected_calls_return_their_results() {
    let child = Child::new(compute);
    let space = child.space();
    assert_eq!(space.getppid().expect("a call"), u64::from(std::process::id()));
    let failed = space.close_fd(9999);
    assert!(matches!(&failed, Err(AdoptError::Call(error)) if error.raw_os_error() == Some(libc::EBADF)), "{failed:?}");
    child.check();
}

/// Each blocking system call returns normally, and not before its timeout.
#[test]
#[expect(clippy::too_many_lines, reason = "one function per kind of wait, used here only")]
fn waits_last_for_their_full_time() {
    fn timed(call: impl Fn() -> i64) {
        let begin = Instant::now();
        let result = call();
        board().time.store(u64::try_from(begin.elapsed().as_nanos()).unwrap(), Ordering::SeqCst);
        board().result.store(result, Ordering::SeqCst);
        step();
        while board().go.load(Ordering::SeqCst) < board().steps.load(Ordering::SeqCst) {
            std::hint::spin_loop();
        }
    }
    fn sleeping() {
        let time = milliseconds(150);
        // SAFETY: the timespec lives through the call.
        timed(|| i64::from(unsafe { libc::nanosleep(&raw const time, null_mut()) }));
    }
    fn polling() {
        // SAFETY: no descriptors are passed.
        timed(|| i64::from(unsafe { libc::poll(null_mut(), 0, 150) }));
    }
    fn selecting() {
        let time = milliseconds(150);
        // SAFETY: the timespec lives through the call.
        timed(|| i64::from(unsafe { libc::ppoll(null_mut(), 0, &raw const time, null()) }));
    }
    fn locking() {
        let (word, time) = (0u32, milliseconds(150));
        let (word, time) = (&raw const word, &raw const time);
        timed(|| {
            // SAFETY: word and timespec live through the call.
            let result = unsafe { libc::syscall(libc::SYS_futex, word, libc::FUTEX_WAIT, 0, time) };
            let error = std::io::Error::last_os_error().raw_os_error();
            if result == -1 && error == Some(libc::ETIMEDOUT) { 0 } else { 1 }
        });
    }
    for work in [sleeping as fn(), polling, selecting, locking] {
        let child = Child::new(work);
        for round in 1..4 {
            thread::sleep(Duration::from_millis(20));
            for _ in 0..10 {
                child.adopt().expect("adoption");
            }
            child.reaches(&child.board.steps, round);
            assert_eq!(child.board.result.load(Ordering::SeqCst), 0, "interrupted");
            let time = Duration::from_nanos(child.board.time.load(Ordering::SeqCst));
            assert!(time >= Duration::from_millis(150), "returned after {time:?}");
            child.board.go.store(round, Ordering::SeqCst);
        }
    }
}

/// Each of 3000 signals queued during repeated adoption is delivered exactly once.
#[test]
fn signals_are_delivered_exactly_once() {
    const SIGNALS: u64 = 3000;
    fn work() {
        handle(libc::SIGRTMIN() + 3);
        handle(libc::SIGUSR1);
        board().go.store(1, Ordering::SeqCst);
        loop {
            compute();
            let time = milliseconds(1);
            // SAFETY: the timespec lives through the call.
            unsafe { libc::nanosleep(&raw const time, null_mut()) };
        }
    }
    let child = Child::new(work);
    child.reaches(&child.board.go, 1);
    let pid = child.pid;
    let storm = thread::spawn(move || {
        for _ in 0..SIGNALS {
            // Retry while the signal queue of the child is full.
            // SAFETY: sigqueue takes no pointers, and an all-zero sigval is valid.
            while unsafe { libc::sigqueue(pid, libc::SIGRTMIN() + 3, zeroed()) } != 0 {
                thread::yield_now();
            }
        }
    });
    let mut adoptions = 0;
    while !storm.is_finished() || adoptions < 20 {
        child.adopt().expect("adoption");
        adoptions += 1;
    }
    storm.join().expect("the thread panicked");
    child.reaches(&child.board.signals, SIGNALS);
    child.check();
    assert_eq!(child.board.signals.load(Ordering::SeqCst), SIGNALS, "after {adoptions} adoptions");
    child.signal(libc::SIGUSR1);
    child.reaches(&child.board.signals, SIGNALS + 1);
}

/// After adoption during ppoll(2), its temporary signal mask is in effect again; after the wait, the original mask is.
#[test]
fn temporary_signal_masks_are_restored() {
    fn work() {
        handle(libc::SIGUSR1);
        // SAFETY: the sets live through the calls.
        unsafe {
            let (mut blocked, mut now): (libc::sigset_t, libc::sigset_t) = (zeroed(), zeroed());
            libc::sigaddset(&raw mut blocked, libc::SIGUSR1);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const blocked, null_mut());
            let open: libc::sigset_t = zeroed();
            step();
            went_wrong(libc::ppoll(null_mut(), 0, null(), &raw const open) != -1);
            libc::sigprocmask(libc::SIG_BLOCK, null(), &raw mut now);
            went_wrong(libc::sigismember(&raw const now, libc::SIGUSR1) != 1);
        }
        step();
    }
    let child = Child::new(work);
    for round in 1..6 {
        child.reaches(&child.board.steps, 2 * round - 1);
        while child.state() != 'S' {
            thread::sleep(Duration::from_millis(1));
        }
        child.adopt().expect("adoption");
        assert_eq!(child.board.steps.load(Ordering::SeqCst), 2 * round - 1, "the wait ended early");
        child.signal(libc::SIGUSR1);
        child.reaches(&child.board.steps, 2 * round);
        assert_eq!(child.board.signals.load(Ordering::SeqCst), round);
    }
    assert_eq!(child.board.wrong.load(Ordering::SeqCst), 0);
}

#[test]
fn stopped_process_stays_stopped() {
    let child = Child::new(compute);
    child.reaches(&child.board.steps, 1);
    child.signal(libc::SIGSTOP);
    while child.state() != 'T' {
        thread::sleep(Duration::from_millis(1));
    }
    let steps = child.board.steps.load(Ordering::SeqCst);
    for _ in 0..20 {
        child.adopt().expect("adoption");
    }
    thread::sleep(Duration::from_millis(20));
    assert_eq!((child.state(), child.board.steps.load(Ordering::SeqCst)), ('T', steps));
    child.signal(libc::SIGCONT);
    child.check();
}

/// The test sends SIGSTOP and SIGCONT repeatedly during adoption: the last signal determines the state of the child.
#[test]
fn stops_during_adoption_are_preserved() {
    let child = Child::new(compute);
    let pid = child.pid;
    let signals = thread::spawn(move || {
        for number in 0..400 {
            let signal = if number % 2 == 0 { libc::SIGSTOP } else { libc::SIGCONT };
            // SAFETY: kill takes no pointers.
            unsafe { libc::kill(pid, signal) };
            thread::sleep(Duration::from_micros(300));
        }
    });
    while !signals.is_finished() {
        child.adopt().expect("adoption");
    }
    signals.join().expect("the thread panicked");
    child.signal(libc::SIGCONT);
    child.check();
    child.signal(libc::SIGSTOP);
    child.adopt().expect("adoption");
    let begin = Instant::now();
    while child.state() != 'T' {
        assert!(begin.elapsed() < DEADLINE, "the child did not stop");
        thread::sleep(Duration::from_millis(1));
    }
}

/// The child's seccomp filter kills it at userfaultfd(2), the system call that adoption injects.
#[test]
fn seccomp_filter_is_suspended_and_restored() {
    fn work() {
        if board().steps.load(Ordering::SeqCst) == 0 {
            went_wrong(!forbid_userfaultfd());
        }
        if board().go.load(Ordering::SeqCst) == 1 {
            // SAFETY: userfaultfd takes no pointers. The filter must kill the process at this call.
            unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
        }
        step();
    }
    let child = Child::new(work);
    child.reaches(&child.board.steps, 1);
    match child.adopt() {
        Err(AdoptError::Seccomp(_)) => return eprintln!("skipped: suspending a seccomp filter requires CAP_SYS_ADMIN"),
        adopted => adopted.expect("adoption"),
    }
    child.check();
    child.board.go.store(1, Ordering::SeqCst);
    let begin = Instant::now();
    while child.state() != 'Z' {
        assert!(begin.elapsed() < DEADLINE, "the filter is not active");
        thread::sleep(Duration::from_millis(1));
    }
}

fn forbid_userfaultfd() -> bool {
    let op = |code: u32, jump: u8, value: u32| libc::sock_filter {
        code: u16::try_from(code).unwrap_or(0),
        jt: 0,
        jf: jump,
        k: value,
    };
    let call = u32::try_from(libc::SYS_userfaultfd).unwrap_or(0);
    let mut program = [
        op(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        op(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, call),
        op(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_KILL_PROCESS),
        op(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
    // SAFETY: the filter lives through the calls.
    unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
            && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const filter) == 0
    }
}

#[test]
fn traced_process_is_rejected_with_its_tracer() {
    let child = Child::new(compute);
    // SAFETY: PTRACE_SEIZE of our own child takes no pointers.
    assert_eq!(unsafe { libc::ptrace(libc::PTRACE_SEIZE, child.pid, 0, 0) }, 0);
    let ended = child.adopt();
    let ours = std::process::id().to_string();
    // The tracer is one of our threads.
    let named = |tracer: &str| tracer == ours || std::path::Path::new(&format!("/proc/self/task/{tracer}")).exists();
    assert!(matches!(&ended, Err(AdoptError::Traced(pid, tracer)) if *pid == child.pid && named(tracer)), "{ended:?}");
    child.check();
}

#[test]
fn adoption_waits_for_a_tracer_to_detach() {
    let child = Child::new(compute);
    let pid = child.pid;
    let (attached, ready) = std::sync::mpsc::channel();
    let other = thread::spawn(move || {
        // SAFETY: PTRACE_SEIZE of our own child takes no pointers.
        attached.send(unsafe { libc::ptrace(libc::PTRACE_SEIZE, pid, 0, 0) }).unwrap();
        // The kernel detaches the child when this thread exits.
        thread::sleep(Duration::from_millis(100));
    });
    assert_eq!(ready.recv(), Ok(0));
    let ended = child.adopt();
    assert!(ended.is_ok(), "{ended:?}");
    other.join().unwrap();
    child.check();
}

#[test]
fn exited_process_is_rejected() {
    let child = Child::new(compute);
    let space = child.space();
    child.signal(libc::SIGKILL);
    while child.state() != 'Z' {
        thread::sleep(Duration::from_millis(1));
    }
    assert!(space.userfault(FEATURES).is_err());
    drop(child);
    assert!(matches!(space.userfault(FEATURES), Err(AdoptError::Gone(_))));
}
