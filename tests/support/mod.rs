//! What the integration tests share: the daemon under test, front-ends that drive it, and the
//! places they run in.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod cases;
pub mod daemon;
pub mod deadline;
pub mod guest;
pub mod initrd;
pub mod loop_device;
pub mod netns;
pub mod open_files;
pub mod ovs;
pub mod pcap;
pub mod program;
pub mod reference;
#[path = "testpmd.rs"]
pub mod testpmd;
pub mod tmp;
pub mod tun;
pub mod virtio_blk;
pub mod xts;

/// This machine lacks something, so that a test finds nothing to try: scripts/test says so at its
/// end.
pub fn missing<T>(what: &str) -> Option<T> {
    use std::io::Write as _;
    let test = std::thread::current().name().unwrap_or("a test").to_owned();
    eprintln!("{what}: nothing was tested");
    if let Some(list) = std::env::var_os("VRINGD_MISSING") {
        let list = std::fs::File::options()
            .create(true)
            .append(true)
            .open(list);
        let said = list.and_then(|mut list| writeln!(list, "{test}: {what}"));
        said.expect("a list that can be written to");
    }
    None
}

/// The kernel, as major and minor number: for what can't be asked for, and came with one of them.
pub fn linux() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").expect("a release");
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    next().zip(next()).expect("two numbers")
}
