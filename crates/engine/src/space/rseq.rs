//! Restartable sequences (rseq(2)) of a thread that is stopped to inject system calls.
//!
//! A thread announces a critical section in the `rseq_cs` field of its rseq area. The kernel guarantees that a thread
//! that was preempted or received a signal inside the section continues at the abort handler of the section. On the
//! return to user mode, the kernel redirects the instruction pointer to the handler if the pointer is inside the
//! section (`rseq_ip_fixup` in kernel/rseq.c). Otherwise the section is over, and the kernel clears `rseq_cs`.
//!
//! A ptrace stop is a preemption. However, the thread first returns to user mode for the injected call, with its
//! instruction pointer outside the section. The kernel then clears `rseq_cs`, and the section is not aborted when the
//! registers of the thread are restored. Other threads may have run on that CPU in the meantime, so the section could
//! commit invalid data.
//!
//! Before the first call, this module therefore does what the kernel would have done, with the same checks: it
//! redirects the thread to the abort handler and clears `rseq_cs`. This is always allowed, because a section may be
//! preempted at any instruction. For an invalid signature before the handler or an unknown version, the kernel would
//! kill the thread with SIGSEGV. In this case, the operation fails before anything is changed.

use libc::user_regs_struct;

use super::inject::{AdoptError, peek, request};

const PTRACE_GET_RSEQ_CONFIGURATION: libc::c_uint = 0x420f;
/// Offsets of `rseq_cs` in the rseq area, and of the fields of a section descriptor (include/uapi/linux/rseq.h).
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

/// Redirects a stopped thread to the abort handler if the thread is inside a critical section.
///
/// # Errors
/// [`AdoptError::Sequence`] if the kernel would not abort the section either. In this case, nothing has been changed.
pub fn abort(pid: libc::pid_t, registers: &mut user_regs_struct) -> Result<(), AdoptError> {
    let Some(found) = configuration(pid) else { return Ok(()) };
    let pointer = found.area + SECTION;
    // Memory that we cannot read is unreadable for the kernel as well, which then kills the thread.
    let section = peek(pid, pointer)?;
    if section == 0 {
        return Ok(());
    }
    let (start, length) = (peek(pid, section + START)?, peek(pid, section + LENGTH)?);
    if registers.rip.wrapping_sub(start) >= length {
        return Ok(()); // the section is over
    }
    let handler = peek(pid, section + ABORT)?;
    // This word contains version and flags. Only older kernels support flags, which restrict the abort.
    if peek(pid, section)? != 0 {
        return Err(AdoptError::Sequence(pid, "unknown version or flags of the section"));
    }
    if handler.wrapping_sub(start) < length {
        return Err(AdoptError::Sequence(pid, "the abort handler is inside the section"));
    }
    if peek(pid, handler.wrapping_sub(4))?.to_le_bytes()[..4] != found.signature.to_le_bytes() {
        return Err(AdoptError::Sequence(pid, "the abort handler lacks its signature"));
    }
    request(libc::PTRACE_POKEDATA, pid, pointer, 0)?;
    registers.rip = handler;
    // Sections must not make system calls. If this section made one, the kernel must not restart the call at the
    // handler.
    registers.orig_rax = u64::MAX;
    Ok(())
}

/// Returns the rseq configuration of a thread; `None` if the thread has none, or if the kernel cannot report it.
fn configuration(pid: libc::pid_t) -> Option<Configuration> {
    let mut found = Configuration::default();
    let size = size_of::<Configuration>() as u64;
    request(PTRACE_GET_RSEQ_CONFIGURATION, pid, size, (&raw mut found) as u64).ok()?;
    (found.area != 0).then_some(found)
}
