//! Restartable sequences (rseq(2)) of a thread that is stopped for calls of ours.
//!
//! A thread names a section of its code in `rseq_cs` of its rseq area. The promise of the kernel: a thread that was
//! preempted, or got a signal, inside the section goes on at the section's abort handler, never at the next
//! instruction. The kernel keeps it when it returns to user code: it looks whether the instruction pointer lies in the
//! section (`rseq_ip_fixup` in kernel/rseq.c); if not, the section is over, and it clears `rseq_cs`.
//!
//! A stop is a preemption. But the thread first returns to user code for our call, with the instruction pointer outside
//! of the section: the kernel clears `rseq_cs`, and once the thread has its own registers back nothing aborts the section
//! any more. Other threads of that CPU have run meanwhile, so the section would commit what it must not.
//!
//! So before our first call we do what the kernel would have done, with the same checks: the thread will go on at the
//! abort handler, and `rseq_cs` is cleared. That is always allowed, because a section may be preempted at any
//! instruction. What the kernel would end with SIGSEGV (another signature before the handler, an unknown version) is
//! refused before anything is changed, and left to the kernel.

use libc::user_regs_struct;

use super::inject::{AdoptError, peek, request};

const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// Of `rseq_cs` in the rseq area, and of a section's fields in its descriptor (include/uapi/linux/rseq.h).
const SECTION: u64 = 8;
const START: u64 = 8;
const LENGTH: u64 = 16;
const ABORT: u64 = 24;

/// `struct ptrace_rseq_configuration`.
#[repr(C)]
#[derive(Default)]
struct Configuration {
    area: u64,
    size: u32,
    signature: u32,
    flags: u32,
    pad: u32,
}

/// Has a stopped thread go on at the abort handler of the section that it is in, if it is in one.
///
/// # Errors
/// [`AdoptError::Sequence`] for a section that the kernel would not abort either; nothing has changed then.
pub fn abort(pid: libc::pid_t, registers: &mut user_regs_struct) -> Result<(), AdoptError> {
    let Some(found) = configuration(pid) else { return Ok(()) };
    let pointer = found.area + SECTION;
    // What cannot be read the kernel cannot read either, and ends the thread itself.
    let section = peek(pid, pointer)?;
    if section == 0 {
        return Ok(());
    }
    let (start, length) = (peek(pid, section + START)?, peek(pid, section + LENGTH)?);
    if registers.rip.wrapping_sub(start) >= length {
        return Ok(()); // it is over
    }
    let handler = peek(pid, section + ABORT)?;
    // Version and flags: flags are of kernels that made exceptions from the promise.
    if peek(pid, section)? != 0 {
        return Err(AdoptError::Sequence(pid, "it is of an unknown version, or has flags"));
    }
    if handler.wrapping_sub(start) < length {
        return Err(AdoptError::Sequence(pid, "its abort handler is a part of it"));
    }
    if peek(pid, handler.wrapping_sub(4))?.to_le_bytes()[..4] != found.signature.to_le_bytes() {
        return Err(AdoptError::Sequence(pid, "its abort handler lacks the signature"));
    }
    request(libc::PTRACE_POKEDATA, pid, pointer, 0)?;
    registers.rip = handler;
    // A section that made a system call, which it may not: the kernel restarts nothing at the handler.
    registers.orig_rax = u64::MAX;
    Ok(())
}

/// None: the thread has no rseq area, or the kernel has no restartable sequences.
fn configuration(pid: libc::pid_t) -> Option<Configuration> {
    let mut found = Configuration::default();
    let size = size_of::<Configuration>() as u64;
    request(PTRACE_GET_RSEQ_CONFIGURATION, pid, size, (&raw mut found) as u64).ok()?;
    (found.area != 0).then_some(found)
}
