//! Network for tests: a namespace of the thread's own, and raw packets on its interfaces.
//!
//! A test thread that entered its namespace sees no interface but `lo` and what it makes itself;
//! all of it is gone when the thread and its fds are. Needs CAP_SYS_ADMIN.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

/// Bytes of the header before each packet (PACKET_VNET_HDR).
pub const VNET_HEADER: usize = 10;
/// An EtherType for local experiments (IEEE 802): what else is on the wire is not ours.
pub const ETHERTYPE: [u8; 2] = [0x88, 0xb5];
/// How long a packet may take.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// Runs `test` in a thread with a network namespace of its own.
///
/// # Panics
/// When the namespace can't be made, or with the panic of `test`.
pub fn in_private_netns(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(move || {
        // SAFETY: no pointers; the new namespace is this thread's alone.
        let answer = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(
            answer,
            0,
            "unshare(CLONE_NEWNET): {}",
            io::Error::last_os_error()
        );
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with `arguments`.
///
/// # Panics
/// When it fails.
pub fn ip(arguments: &str) {
    let mut command = std::process::Command::new("ip");
    let status = command
        .args(arguments.split(' '))
        .status()
        .expect("ip (package iproute2) runs");
    assert!(status.success(), "ip {arguments}: {status}");
}

/// A packet socket on one interface: sees what the interface sends and receives.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// A socket bound to interface `name`, in promiscuous use, each packet with a header of
    /// [`VNET_HEADER`] bytes.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn bind(name: &str) -> PacketSocket {
        let protocol = (libc::ETH_P_ALL as u16).to_be();
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, libc::c_int::from(protocol)) };
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: `fd` is open and nobody else has it.
        let socket = PacketSocket(unsafe { OwnedFd::from_raw_fd(fd) });
        let name = std::ffi::CString::new(name).expect("a name without NUL");
        // SAFETY: a string that ends with NUL.
        let index = unsafe { libc::if_nametoindex(name.as_ptr()) };
        assert_ne!(index, 0, "no interface {name:?}");
        // SAFETY: plain integers; all zero is valid.
        let mut address: libc::sockaddr_ll = unsafe { core::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = protocol;
        address.sll_ifindex = index.cast_signed();
        let bytes = size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` has `bytes` bytes.
        let answer = unsafe { libc::bind(fd, (&raw const address).cast(), bytes) };
        assert_eq!(answer, 0, "bind: {}", io::Error::last_os_error());
        socket.set(libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1i32);
        socket.set(libc::SOL_PACKET, libc::PACKET_AUXDATA, &1i32);
        let wait = libc::timeval {
            tv_sec: 1,
            tv_usec: 0,
        };
        socket.set(libc::SOL_SOCKET, libc::SO_RCVTIMEO, &wait);
        socket
    }

    fn set<T: Copy>(&self, level: libc::c_int, name: libc::c_int, value: &T) {
        let bytes = size_of::<T>() as libc::socklen_t;
        // SAFETY: `value` has `bytes` bytes.
        let answer = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                name,
                (&raw const *value).cast(),
                bytes,
            )
        };
        assert_eq!(answer, 0, "setsockopt: {}", io::Error::last_os_error());
    }

    /// Sends a packet out of the interface: header, then frame.
    ///
    /// # Panics
    /// When the system refuses.
    pub fn send(&self, header: &[u8; VNET_HEADER], frame: &[u8]) {
        let packet = [header.as_slice(), frame].concat();
        // SAFETY: `packet` has that many bytes.
        let sent =
            unsafe { libc::send(self.0.as_raw_fd(), packet.as_ptr().cast(), packet.len(), 0) };
        assert_eq!(
            sent,
            packet.len() as isize,
            "send: {}",
            io::Error::last_os_error()
        );
    }

    /// The next packet with [`ETHERTYPE`]: header and frame.
    ///
    /// # Panics
    /// When none comes before the deadline.
    pub fn receive(&self) -> (Vec<u8>, Vec<u8>) {
        self.receive_if(|frame| frame.get(12..14) == Some(&ETHERTYPE))
    }

    /// The next packet whose frame `wanted` says yes to: header and frame, with its VLAN tag if it
    /// had one.
    ///
    /// # Panics
    /// When none comes before the deadline.
    pub fn receive_if(&self, wanted: impl Fn(&[u8]) -> bool) -> (Vec<u8>, Vec<u8>) {
        let start = Instant::now();
        let mut packet = vec![0u8; 1 << 17];
        while start.elapsed() < DEADLINE {
            let Some((got, tag)) = self.receive_into(&mut packet) else {
                continue;
            };
            let mut frame = packet[VNET_HEADER..got].to_vec();
            if let Some(tag) = tag {
                frame.splice(12..12, tag);
            }
            if wanted(&frame) {
                return (packet[..VNET_HEADER].to_vec(), frame);
            }
        }
        panic!("no packet within {DEADLINE:?}");
    }

    /// The next packet: how many bytes it has, and the VLAN tag that the kernel took out of it.
    /// `None` when there is none for a while.
    fn receive_into(&self, packet: &mut [u8]) -> Option<(usize, Option<[u8; 4]>)> {
        let mut aux = [0u64; 8];
        let mut iov = libc::iovec {
            iov_base: packet.as_mut_ptr().cast(),
            iov_len: packet.len(),
        };
        // SAFETY: pointers and integers; all zero is valid.
        let mut message: libc::msghdr = unsafe { core::mem::zeroed() };
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = aux.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&aux);
        // SAFETY: `message` points to `packet` and `aux`, which have those lengths.
        let got = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, 0) };
        let got = usize::try_from(got).ok().filter(|&got| got > VNET_HEADER)?;
        let mut tag = None;
        // SAFETY: `message` is as the kernel left it.
        let mut part = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: a header within `aux`, or null.
        while let Some(header) = unsafe { part.as_ref() } {
            if (header.cmsg_level, header.cmsg_type) == (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
                // SAFETY: what the kernel puts there is of this type, wherever it begins.
                let aux: libc::tpacket_auxdata = unsafe {
                    libc::CMSG_DATA(part)
                        .cast::<libc::tpacket_auxdata>()
                        .read_unaligned()
                };
                tag = tag_of(&aux);
            }
            // SAFETY: `part` is a header of `message`.
            part = unsafe { libc::CMSG_NXTHDR(&raw const message, part) };
        }
        Some((got, tag))
    }
}

/// The VLAN tag that the kernel tells of, in its bytes.
fn tag_of(aux: &libc::tpacket_auxdata) -> Option<[u8; 4]> {
    let both = libc::TP_STATUS_VLAN_VALID | libc::TP_STATUS_VLAN_TPID_VALID;
    let [kind, of_tag] = aux.tp_vlan_tpid.to_be_bytes();
    let [high, low] = aux.tp_vlan_tci.to_be_bytes();
    (aux.tp_status & both == both).then_some([kind, of_tag, high, low])
}

/// Takes all capabilities from the calling thread, for good.
///
/// # Panics
/// When the system refuses.
pub fn drop_capabilities() {
    super::privileges::drop_capabilities().expect("capset");
}

/// Makes the calling thread, and no other, that of a user of its own without capabilities: what it
/// locks of memory counts with nobody else's.
///
/// # Panics
/// When the system refuses.
#[cfg(test)]
pub fn become_nobody_else() {
    let id = 1_000_000_000 + std::process::id();
    // SAFETY: no pointers. Without libc, which would do it to all threads.
    let answer = unsafe { libc::syscall(libc::SYS_setresuid, id, id, id) };
    assert_eq!(answer, 0, "setresuid: {}", io::Error::last_os_error());
    drop_capabilities();
}
