//! Guest without an operating system, for KVM hosts on which Linux does not boot: rewrites and verifies self-describing
//! pages.
//!
//! QEMU loads the program with `-kernel` and enters it in 32-bit protected mode (PVH). The program enables long mode
//! with its own page tables. On KVM it leaves ring 0 permanently: a KVM without hardware virtualisation emulates ring 0
//! and runs ring 3 natively. A TSS with an I/O bitmap gives ring 3 access to the serial port. Ring 3 runs with
//! interrupts disabled. On TCG the program stays in ring 0, and sleeps after each sweep until the next timer interrupt,
//! so that the guest does not use a whole core of the test machine.
//!
//! Each page holds its number and version at both ends and in the middle. A table elsewhere holds the current version
//! of each page, and a separate counter holds the sum of all versions. The output has the format of `checker.rs`, with
//! a tick every eight sweeps.
//!
//! Command line: `ferry.mib` (memory, MiB, 32), `ferry.writes` (pages rewritten per sweep, 4).

#![no_std]
#![no_main]

use core::arch::{asm, global_asm};
use core::ptr::{read_volatile, write_volatile};

const PAGE: usize = 4096;
const FIRST: usize = 16 << 20;
/// Maximum number of pages, 992 MiB: the mapped 1 GiB without the first and last 16 MiB.
const MAX_PAGES: usize = 992 << 8;
const SWEEPS_PER_TICK: u64 = 8;
const REPORTED: u64 = 8;
const WORDS: [usize; 3] = [0, 256, 511];
const COMMAND_LINE: u64 = 24;

static mut VERSIONS: [u32; MAX_PAGES] = [0; MAX_PAGES];
static mut TOTAL: u64 = 0;

global_asm!(
    r#"
    .section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                      # lengths of name and value, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long start

    .section .data
    .balign 4096
tables: .quad pointers + 0x27
    .fill 511, 8, 0
pointers: .quad directory + 0x27
    .fill 511, 8, 0
directory:                              # 1 GiB in huge pages: present, writable, user, accessed, dirty
    .set address, 0
    .rept 512
    .quad address + 0xe7
    .set address, address + 0x200000
    .endr
descriptors:                            # all with the accessed bit; SYSEXIT requires this order from 0x18 on
    .quad 0
    .quad 0x00cf9b000000ffff            # 0x08 code, 32 bits
    .quad 0x00cf93000000ffff            # 0x10 data
    .quad 0x00af9b000000ffff            # 0x18 code, 64 bits
    .quad 0x00cf93000000ffff            # 0x20 data
    .quad 0x00cffb000000ffff            # 0x28 ring 3: code, 32 bits
    .quad 0x00cff3000000ffff            # 0x30 data
    .quad 0x00affb000000ffff            # 0x38 code, 64 bits
    .quad 0x00cff3000000ffff            # 0x40 data
task: .quad 0, 0                        # 0x48 TSS, filled in below
pointer: .word . - descriptors - 1
    .quad descriptors
gates: .word 0x20f
    .quad interrupts
    .balign 16
state: .fill 102, 1, 0
    .word 104                           # offset of the I/O bitmap
    .fill 127, 1, 0xff
    .byte 0xfe                          # allows port 0x3f8
    .byte 0xff

    .section .bss
    .balign 16
    .skip 65536
stack:
interrupts: .skip 0x210                 # gates up to vector 0x20, the timer

    .section .text
    .code32
    .globl start
start:
    cli
    cld
    mov ebp, ebx
    mov eax, offset state
    mov edx, eax
    shl edx, 16
    or edx, 232                         # limit of the TSS
    mov dword ptr [task], edx
    mov edx, eax
    shr edx, 16
    and edx, 0xff
    and eax, 0xff000000
    or eax, edx
    or eax, 0x8900
    mov dword ptr [task + 4], eax
    lgdt [pointer]
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset tables
    mov cr3, eax
    mov ecx, 0xc0000080                 # EFER.LME
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    and eax, 0x9ffffffb                 # clears CD, NW and EM
    or eax, 0x80000022                  # PG, NE, MP
    mov cr0, eax
    .byte 0xea                          # jmp 0x18:long
    .long long
    .word 0x18
    .code64
long:
    mov eax, 0x20
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov eax, 0x48
    ltr ax
    mov ecx, 0x174                      # SYSENTER_CS
    mov eax, 0x18
    xor edx, edx
    wrmsr
    mov eax, 0x40000000                 # signature of the hypervisor
    cpuid
    mov edi, ebp
    xor esi, esi
    cmp ebx, 0x4b4d564b                 # "KVMK": KVM emulates SYSEXIT, but not IRET
    jne 1f
    mov rdx, offset run
    mov rcx, offset stack - 8
    sysexitq
1:  mov eax, offset timer
    mov word ptr [interrupts + 0x200], ax
    mov word ptr [interrupts + 0x202], 0x18
    mov word ptr [interrupts + 0x204], 0x8e00
    shr eax, 16
    mov word ptr [interrupts + 0x206], ax
    lidt [gates]
    mov al, 0x11                        # interrupt controllers: vectors from 0x20 and 0x28, only the timer enabled
    out 0x20, al
    out 0xa0, al
    mov al, 0x20
    out 0x21, al
    mov al, 0x28
    out 0xa1, al
    mov al, 4
    out 0x21, al
    mov al, 2
    out 0xa1, al
    mov al, 1
    out 0x21, al
    out 0xa1, al
    mov al, 0xfe
    out 0x21, al
    mov al, 0xff
    out 0xa1, al
    mov al, 0x34                        # timer: 100 Hz
    out 0x43, al
    mov al, 0x9c
    out 0x40, al
    mov al, 0x2e
    out 0x40, al
    inc esi
    mov rsp, offset stack - 8
    jmp run
timer:
    push rax
    mov al, 0x20
    out 0x20, al
    pop rax
    iretq
"#
);

#[unsafe(no_mangle)]
extern "C" fn run(start_info: u64, sleeps: u64) -> ! {
    let line = unsafe { *((start_info + COMMAND_LINE) as *const u64) as *const u8 };
    let pages = (option(line, b"ferry.mib=", 32) as usize * 256).min(MAX_PAGES);
    let writes = option(line, b"ferry.writes=", 4);
    for number in 0..pages {
        fill(number, 0);
    }
    print(b"FERRY ready pages=", pages as u64);
    print(b" threads=", 1);
    text(b"\n");
    let (mut random, mut errors, mut sweeps) = (1u64, 0, 0u64);
    loop {
        for _ in 0..writes {
            random = random.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            rewrite((random >> 33) as usize % pages, &mut errors);
        }
        verify_all(pages, &mut errors);
        sweeps += 1;
        if sleeps != 0 {
            // Interrupts are enabled only during this sleep. The interrupt handler uses the current stack.
            unsafe { asm!("sti", "hlt", "cli") };
        }
        if sweeps % SWEEPS_PER_TICK == 0 {
            print(b"FERRY tick ", sweeps / SWEEPS_PER_TICK);
            print(b" writes=", sweeps * writes);
            print(b" verified=", sweeps * pages as u64);
            print(b" passes=", sweeps);
            print(b" errors=", errors);
            text(b"\n");
        }
    }
}

fn version(number: usize) -> *mut u32 {
    unsafe { (&raw mut VERSIONS).cast::<u32>().add(number) }
}

fn word(number: usize, index: usize) -> *mut u64 {
    (FIRST + number * PAGE + index * 8) as *mut u64
}

fn content(number: usize, version: u32, index: usize) -> u64 {
    ((number as u64) << 32 | u64::from(version)).wrapping_mul(2 * index as u64 + 1)
}

fn fill(number: usize, version: u32) {
    for index in WORDS {
        unsafe { write_volatile(word(number, index), content(number, version, index)) };
    }
}

fn rewrite(number: usize, errors: &mut u64) {
    verify(number, errors);
    unsafe {
        let next = read_volatile(version(number)) + 1;
        fill(number, next);
        write_volatile(version(number), next);
        write_volatile(&raw mut TOTAL, read_volatile(&raw const TOTAL) + 1);
    }
}

fn verify(number: usize, errors: &mut u64) -> u64 {
    let expected = unsafe { read_volatile(version(number)) };
    for index in WORDS {
        let found = unsafe { read_volatile(word(number, index)) };
        if found != content(number, expected, index) {
            report(errors, number as u64, index as u64, content(number, expected, index), found);
        }
    }
    u64::from(expected)
}

fn verify_all(pages: usize, errors: &mut u64) {
    let mut sum = 0;
    for number in 0..pages {
        sum += verify(number, errors);
    }
    let total = unsafe { read_volatile(&raw const TOTAL) };
    if sum != total {
        report(errors, u64::MAX, 0, total, sum);
        unsafe { write_volatile(&raw mut TOTAL, sum) };
    }
}

fn report(errors: &mut u64, page: u64, word: u64, expected: u64, found: u64) {
    *errors += 1;
    if *errors > REPORTED {
        return;
    }
    if page == u64::MAX { text(b"FERRY BAD total") } else { print(b"FERRY BAD page=", page) }
    print(b" word=", word);
    print(b" expected=", expected);
    print(b" found=", found);
    text(b"\n");
}

/// Returns the value of the option `name` (which includes `=`) on the command line, or `default` without the option.
fn option(line: *const u8, name: &[u8], default: u64) -> u64 {
    if line.is_null() {
        return default;
    }
    let at = |index: usize| unsafe { read_volatile(line.add(index)) };
    let mut start = 0;
    while at(start) != 0 {
        if (0..name.len()).all(|index| at(start + index) == name[index]) {
            let (mut value, mut index) = (0, start + name.len());
            while at(index).is_ascii_digit() {
                value = value * 10 + u64::from(at(index) - b'0');
                index += 1;
            }
            return value;
        }
        start += 1;
    }
    default
}

fn print(name: &[u8], value: u64) {
    text(name);
    let mut divisor = 1;
    while value / divisor >= 10 {
        divisor *= 10;
    }
    while divisor > 0 {
        text(&[b'0' + (value / divisor % 10) as u8]);
        divisor /= 10;
    }
}

fn text(bytes: &[u8]) {
    for &byte in bytes {
        unsafe { asm!("out dx, al", in("dx") 0x3f8u16, in("al") byte, options(nomem, nostack)) };
    }
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    text(b"FERRY BAD panic\n");
    loop {}
}
