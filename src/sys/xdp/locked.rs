//! How much memory the sockets of a port get, and what is said when they can't have it.
//!
//! The kernel counts it as locked memory, of all processes of the user together, and holds that
//! against RLIMIT_MEMLOCK of the process that registers it; not where that has CAP_IPC_LOCK.

use std::os::fd::OwnedFd;

use crate::sys::privileges;

use super::socket::{ENTRIES_MAX, ENTRIES_MIN, REGISTER, Refusal, XdpSocket, memory_bytes};
use super::{Found, XdpError, of_queue};

/// Gives the new sockets of queues 0, 1, … memory and rings: of full size, or of what the limit
/// lets each of them have. With an error comes the queue's number.
pub(super) fn with_memory(
    found: &Found,
    fds: Vec<OwnedFd>,
) -> Result<Vec<XdpSocket>, (u16, XdpError)> {
    let name = &found.name;
    let limit = privileges::lock_limit().unwrap_or(u64::MAX);
    let entries = if privileges::may_lock_all() {
        ENTRIES_MAX
    } else {
        entries(found.queues, limit)
    };
    let each = memory_bytes(entries);
    let all = each.saturating_mul(found.queues.into());
    if entries < ENTRIES_MAX && all <= limit {
        let (kib, full, limit) = (each >> 10, memory_bytes(ENTRIES_MAX) >> 10, limit >> 10);
        tracing::warn!(
            "xdp {name}: {kib} KiB of memory for each queue, not {full}: {limit} KiB may be locked \
             (RLIMIT_MEMLOCK)"
        );
    }
    let refused = |queue: u16, refusal: Refusal| match refusal.source.raw_os_error() {
        Some(libc::ENOBUFS | libc::ENOMEM | libc::EPERM) if refusal.what == REGISTER => {
            XdpError::Locked {
                name: name.clone(),
                queue,
                needed_kib: all >> 10,
                limit_kib: limit >> 10,
                source: refusal.source,
            }
        }
        _ => of_queue(name, queue, refusal),
    };
    let sockets = (0..).zip(fds).map(|(queue, fd)| {
        // What is more than the limit is not waited for.
        let socket = XdpSocket::new(fd, entries, all <= limit, found.headroom());
        socket.map_err(|refusal| (queue, refused(queue, refusal)))
    });
    sockets.collect()
}

/// Entries for each direction, a power of two, of each of `queues` sockets that may lock `limit`
/// bytes together. They may be more than that with the least that there can be.
fn entries(queues: u16, limit: u64) -> u32 {
    let mut entries = ENTRIES_MAX;
    while entries > ENTRIES_MIN && memory_bytes(entries) * u64::from(queues) > limit {
        entries /= 2;
    }
    entries
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queues_share_what_may_be_locked() {
        const MIB: u64 = 1 << 20;
        for (queues, limit, each) in [
            (1, u64::MAX, 8),
            (1024, u64::MAX, 8),
            (1, 8 * MIB, 8),
            (1, 8 * MIB - 1, 4),
            (2, 16 * MIB, 8),
            (2, 8 * MIB, 4),
            (3, 8 * MIB, 2),
            (4, 8 * MIB, 2),
            (5, 8 * MIB, 2),
            (1, 0, 2),
        ] {
            let bytes = memory_bytes(entries(queues, limit));
            assert_eq!(bytes, each * MIB, "{queues} queues of {limit} bytes");
        }
    }
}
