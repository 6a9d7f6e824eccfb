//! System calls behind safe types.
//!
//! One of the two places with unsafe code (the other is `memory`), and the only other one that
//! names `libc`. It knows nothing of virtio; each module wraps one facility of the kernel.

#[expect(unsafe_code, reason = "the time-stamp counter")]
pub mod clock;
pub mod connect;
#[expect(unsafe_code, reason = "thread affinity takes a pointer")]
pub mod cpu;
#[expect(unsafe_code, reason = "statx, ioctl")]
pub mod disk;
#[expect(unsafe_code, reason = "fcntl, write, ownership of a descriptor")]
pub mod eventfd;
#[expect(unsafe_code, reason = "ioctls that take pointers")]
mod ifreq;
#[expect(unsafe_code, reason = "sigaction, pthread_sigmask, tgkill")]
pub mod interrupt;
pub mod key;
#[expect(unsafe_code, reason = "a netlink socket")]
pub mod link;
pub mod listen;
#[expect(unsafe_code, reason = "fcntl with a lock")]
pub mod lock;
#[expect(unsafe_code, reason = "socket calls")]
mod netlink;
#[expect(unsafe_code, reason = "setns")]
pub mod netns;
pub mod panics;
pub mod patience;
#[expect(unsafe_code, reason = "poll, MSG_PEEK, dup3")]
pub mod peer;
#[expect(unsafe_code, reason = "setresuid, capset, prctl")]
pub mod privileges;
pub mod qcow2;
#[expect(unsafe_code, reason = "preadv and pwritev take pointers")]
pub mod rw;
#[expect(unsafe_code, reason = "memfd_create, fallocate")]
pub mod share;
#[expect(unsafe_code, reason = "pthread_sigmask, signalfd")]
pub mod signals;
#[expect(unsafe_code, reason = "socket calls that std has no counterpart for")]
mod socket;
#[expect(unsafe_code, reason = "places that two threads take turns at")]
pub mod spsc;
pub mod systemd;
#[expect(
    unsafe_code,
    reason = "tap devices are made by ioctls that take pointers"
)]
pub mod tap;
#[cfg(any(test, feature = "testing"))]
#[expect(
    clippy::cast_possible_truncation,
    reason = "constants and sizes of the socket interface"
)]
#[expect(
    unsafe_code,
    reason = "network namespaces and packet sockets for tests"
)]
pub mod testnet;
#[expect(unsafe_code, reason = "entries of an io_uring point at memory")]
pub mod uring;
#[expect(unsafe_code, reason = "getpwnam_r, getgrnam_r")]
pub mod users;
#[expect(unsafe_code, reason = "inotify")]
pub mod watch;
#[expect(unsafe_code, reason = "sync_file_range(2)")]
pub mod witness;
#[expect(
    unsafe_code,
    reason = "bpf(2), rings that are shared with the kernel, socket options"
)]
pub mod xdp;
#[expect(unsafe_code, reason = "a cipher that works on addresses")]
pub mod xts;
