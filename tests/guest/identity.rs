//! `/init` of a guest that reports its identity on the serial line: its clocks, and random numbers.
//!
//! Each line contains a number, the time since boot in milliseconds, the system time and the time of the RTC in seconds
//! since 1970, and 16 bytes of /dev/urandom:
//!
//! ```text
//! FERRY identity 12 up=1490 wall=1700000000 rtc=1700000003 random=0123456789abcdef0123456789abcdef
//! ```
//!
//! `ferry.pause` on the kernel command line is the time between lines in milliseconds (100).

use std::ffi::{c_char, c_int, c_ulong, c_void};
use std::io::Read;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

unsafe extern "C" {
    fn mount(source: *const c_char, target: *const c_char, kind: *const c_char, flags: c_ulong, data: *const c_void) -> c_int;
}

fn main() {
    mount_on(c"/proc", c"proc");
    mount_on(c"/sys", c"sysfs");
    mount_on(c"/dev", c"devtmpfs");
    let line = std::fs::read_to_string("/proc/cmdline").expect("cannot read /proc/cmdline");
    let pause = line.split_whitespace().find_map(|word| word.strip_prefix("ferry.pause=")?.parse().ok()).unwrap_or(100);
    let mut random = std::fs::File::open("/dev/urandom").expect("cannot open /dev/urandom");
    let start = Instant::now();
    for number in 1u64.. {
        let mut bytes = [0; 16];
        random.read_exact(&mut bytes).expect("cannot read /dev/urandom");
        let up = start.elapsed().as_millis();
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let rtc = std::fs::read_to_string("/sys/class/rtc/rtc0/since_epoch").unwrap_or_default();
        let random = bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        println!("FERRY identity {number} up={up} wall={wall} rtc={} random={random}", rtc.trim());
        std::thread::sleep(Duration::from_millis(pause));
    }
}

fn mount_on(target: &std::ffi::CStr, kind: &std::ffi::CStr) {
    std::fs::create_dir_all(target.to_str().expect("the path is ASCII")).expect("cannot create a directory");
    // SAFETY: the arguments are C strings that live during the call; `data` may be null.
    let failed = unsafe { mount(kind.as_ptr(), target.as_ptr(), kind.as_ptr(), 0, std::ptr::null()) } != 0;
    assert!(!failed, "cannot mount {kind:?}: {}", std::io::Error::last_os_error());
}
