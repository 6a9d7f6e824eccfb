//! What a test does to taps and sockets itself, beside the daemon.
#![expect(
    unsafe_code,
    reason = "ioctl and setsockopt are system calls without a safe wrapper here"
)]

use std::fs::File;
use std::net::UdpSocket;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::process::Command;

use super::netns::Netns;

/// Queues of the new tap `name` in a namespace, as many as asked for.
pub fn tap_queues(netns: &Netns, name: &'static str, queues: usize) -> Vec<File> {
    let open = move || {
        let file = File::options().read(true).write(true).open("/dev/net/tun");
        let file = file.expect("/dev/net/tun");
        // SAFETY: an `ifreq` is plain bytes; all zero is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        let several = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | several;
        request.ifr_ifru.ifru_flags = flags.try_into().expect("flags of 16 bits");
        // SAFETY: TUNSETIFF reads and writes an `ifreq`.
        let made = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
        assert_eq!(made, 0, "{name}: {}", std::io::Error::last_os_error());
        file
    };
    let all = netns.spawn(move || (0..queues).map(|_| open()).collect());
    all.join().expect("the tap is made")
}

/// A command whose process has these files, each under its number here, and no other of ours.
pub fn with_files(program: &str, files: &[File]) -> Command {
    let mut command = Command::new(program);
    let fds: Vec<RawFd> = files.iter().map(AsRawFd::as_raw_fd).collect();
    let keep = move || {
        for &fd in &fds {
            // SAFETY: no pointers; the descriptor is the child's own.
            if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } != 0 {
                return Err(std::io::Error::last_os_error());
            }
        }
        Ok(())
    };
    // SAFETY: between fork and exec it only makes system calls.
    unsafe { command.pre_exec(keep) };
    command
}

/// What is sent at once from now on becomes datagrams of so many bytes (UDP_SEGMENT).
pub fn segment(socket: &UdpSocket, bytes: u16) {
    let bytes = libc::c_int::from(bytes);
    let length = u32::try_from(size_of_val(&bytes)).expect("four bytes");
    let value = (&raw const bytes).cast();
    // SAFETY: `value` has `length` bytes.
    let set = unsafe {
        let fd = socket.as_raw_fd();
        libc::setsockopt(fd, libc::SOL_UDP, libc::UDP_SEGMENT, value, length)
    };
    assert_eq!(set, 0, "UDP_SEGMENT: {}", std::io::Error::last_os_error());
}
