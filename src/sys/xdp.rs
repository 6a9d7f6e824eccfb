//! `Xdp`: some queues of a network interface, through AF_XDP sockets.
//!
//! A program of ours sits at the interface and gives what queues `0..N` receive to sockets with
//! memory of our own; what the sockets send goes out of the same queues. The host's stack sees
//! neither. The program runs in the driver where that has a place for it, and the interface reads
//! and writes our memory itself where it can; else the kernel copies. Nothing outlives the daemon.
//! Linux: Documentation/networking/af_xdp.rst.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam::queue::ArrayQueue;

use super::ifreq::{InterfaceSocket, bad_name, check};
use super::systemd::ActivationError;

mod attached;
mod bpf;
mod busy;
mod locked;
mod metadata;
mod passed;
mod ring;
mod socket;

pub use bpf::Mode;
use bpf::{Link, Program, Unserved, XskMap};
pub use metadata::{TxCsum, Undone};
pub use passed::{PassedFd, PassedXdp, XdpPlace, hand_over};
use socket::{Binding, REGISTER};
pub use socket::{CHUNK, MEMORY_BYTES, PIECES_MAX, RX_CHUNK, SendCounters, Statistics, XdpSocket};

/// Queues at most: more than interfaces have.
pub const QUEUES_MAX: u16 = 1024;
/// How long an interface may stay busy after who had it has closed its descriptors.
const RELEASED_WITHIN: Duration = Duration::from_secs(2);
/// How long to wait before what is busy is tried again.
const RETRY_AFTER: Duration = Duration::from_millis(5);
/// Bytes of an Ethernet header with two VLAN tags.
const HEADER_BYTES: u32 = 22;

/// Why an interface can't be used. Each names it.
#[derive(Debug, thiserror::Error)]
pub enum XdpError {
    /// No interface can have this name.
    #[error("xdp `{name}`: not a name for an interface ({what})")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// There is none of this name.
    #[error("xdp `{name}`: there is no such interface")]
    Missing {
        /// The name.
        name: String,
    },
    /// No queue, or more than the interface has.
    #[error("xdp `{name}`: {queues} queues asked for, the interface has {there}")]
    Queues {
        /// The name.
        name: String,
        /// How many were asked for.
        queues: u16,
        /// How many there are.
        there: u32,
    },
    /// The guest would be told more than the interface takes.
    #[error("xdp `{name}`: mtu {mtu} asked for, the interface has {there}")]
    Mtu {
        /// The name.
        name: String,
        /// What was asked for.
        mtu: u16,
        /// What the interface has.
        there: u32,
    },
    /// Somebody else's program or socket is there.
    #[error("xdp `{name}`: can't {what}: another XDP program or AF_XDP socket has the interface")]
    Busy {
        /// The name.
        name: String,
        /// What was tried.
        what: String,
    },
    /// The kernel does not let us.
    #[error(
        "xdp `{name}`: no permission to {what} (CAP_NET_ADMIN, CAP_NET_RAW and CAP_BPF are needed)"
    )]
    Permission {
        /// The name.
        name: String,
        /// To do what.
        what: String,
    },
    /// A descriptor that was passed can't be used.
    #[error("xdp `{name}`: the file descriptor {fd} {reason}")]
    Passed {
        /// The name.
        name: String,
        /// The descriptor.
        fd: RawFd,
        /// What is wrong with it.
        reason: String,
    },
    /// The service manager has passed no descriptor of this name.
    #[error("xdp `{name}`: the file descriptor named `{fd}`")]
    Named {
        /// The name of the interface.
        name: String,
        /// That of the descriptor.
        fd: String,
        /// Why it is not known.
        source: ActivationError,
    },
    /// More memory than the process may lock.
    #[error(
        "xdp `{name}`: can't {REGISTER} (queue {queue}): all its queues lock {needed_kib} KiB, and \
         RLIMIT_MEMLOCK is {limit_kib} KiB for all processes of the user together: raise it \
         (LimitMEMLOCK=, ulimit -l) or give CAP_IPC_LOCK"
    )]
    Locked {
        /// The name.
        name: String,
        /// Whose memory it would be.
        queue: u16,
        /// KiB that the port's queues lock together.
        needed_kib: u64,
        /// KiB that may be locked.
        limit_kib: u64,
        /// What the system said.
        source: io::Error,
    },
    /// A system call failed.
    #[error("xdp `{name}`: can't {what}")]
    System {
        /// The name.
        name: String,
        /// What was tried.
        what: String,
        /// What the system said.
        source: io::Error,
    },
}

/// An interface with a socket for each of its first queues. Cold: what control does to it as a
/// whole. Frames go through the [`XdpSocket`]s.
#[derive(Debug)]
pub struct Xdp {
    name: String,
    mode: Mode,
    zero_copy: bool,
    frame_max: u32,
    /// The sockets, until their workers take them.
    sockets: ArrayQueue<XdpSocket>,
    fds: Vec<Arc<OwnedFd>>,
    counters: Vec<Arc<SendCounters>>,
    /// Without one, the sockets are where they belong already, and stay there.
    map: Option<XskMap>,
    /// Without it, whoever passed the sockets sees to the program.
    held: Option<Held>,
}

/// What a port needs that not everybody may make.
struct Means {
    map: Option<XskMap>,
    held: Option<Held>,
    /// Where the program runs.
    mode: Mode,
}

/// What is at the interface for as long as this is there.
#[derive(Debug)]
struct Held {
    link: Link,
    /// Keeps the interface promiscuous.
    promiscuous: OwnedFd,
    /// What the program drops.
    unserved: Unserved,
}

impl Xdp {
    /// Takes queues `0..queues` of interface `name` over. An `mtu` is what the guest will be told.
    ///
    /// # Errors
    /// [`XdpError`]; the interface is as before then.
    pub fn open(name: &str, queues: u16, mtu: Option<u16>) -> Result<Xdp, XdpError> {
        let interface = name.to_owned();
        let place = XdpPlace {
            interface,
            ..XdpPlace::default()
        };
        Xdp::open_at(&place, queues, mtu)
    }

    /// With sockets of its own.
    fn with_own(found: &Found, busy_poll: u32) -> Result<Xdp, XdpError> {
        let (fds, means) = means(found)?;
        let sockets = locked::with_memory(found, fds).map_err(|(_, error)| error)?;
        Xdp::bound(found, means, sockets, busy_poll)
    }

    /// Binds the sockets. This takes no capability.
    fn bound(
        found: &Found,
        means: Means,
        unbound: Vec<XdpSocket>,
        busy_poll: u32,
    ) -> Result<Xdp, XdpError> {
        let (name, frags) = (&found.name, found.frags());
        let sockets = ArrayQueue::new(unbound.len().max(1));
        let (mut fds, mut counters) = (Vec::new(), Vec::new());
        let mut zero_copy = means.mode == Mode::Native;
        let (mut huge, mut leaves, mut chunk) = (true, true, CHUNK);
        for (queue, mut socket) in (0..).zip(unbound) {
            let binding = Binding {
                interface: found.index,
                queue,
                zero_copy,
                frags,
            };
            zero_copy = bind(name, &mut socket, binding)?;
            socket
                .poll_busily(busy_poll)
                .map_err(|refusal| of_queue(name, queue, refusal))?;
            if found.leaves_csum(zero_copy) {
                socket.leave_csum();
            }
            huge &= socket.is_huge();
            leaves &= socket.leaves_csum();
            chunk = chunk.min(socket.chunk_bytes());
            fds.push(socket.fd());
            counters.push(Arc::clone(socket.counters()));
            // It has a place for each.
            let _ = sockets.push(socket);
        }
        if found.tx_csum == TxCsum::Offload && !leaves {
            let why = if chunk == CHUNK {
                "the kernel takes no TX metadata (before Linux 6.11)"
            } else {
                "the driver does not announce tx-checksum"
            };
            tracing::warn!("xdp {name}: checksums are made in software: {why}");
        }
        let how = if zero_copy { "zero-copy" } else { "copy mode" };
        let at = match means.mode {
            Mode::Native => "native",
            Mode::Generic => "generic",
        };
        let pages = if huge { "2 MiB" } else { "small" };
        let csum = if leaves { "offload" } else { "software" };
        let (longest, queues) = (found.longest, fds.len());
        tracing::info!(
            "xdp {name}: {at} XDP, {how}, {pages} pages, queues={queues} frame_max={longest} \
             tx_csum={csum}"
        );
        Ok(Xdp {
            name: name.clone(),
            mode: means.mode,
            zero_copy,
            frame_max: longest.min(if frags { PIECES_MAX * chunk } else { chunk }),
            sockets,
            fds,
            counters,
            map: means.map,
            held: means.held,
        })
    }

    /// The name of the interface.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the program runs.
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// Whether the interface reads and writes our memory itself.
    pub fn is_zero_copy(&self) -> bool {
        self.zero_copy
    }

    /// Bytes of the longest frame that is sent.
    pub fn frame_max(&self) -> u32 {
        self.frame_max
    }

    /// The socket of the next queue, from 0 on; `None` when all are taken.
    pub fn take_socket(&self) -> Option<XdpSocket> {
        self.sockets.pop()
    }

    /// Whether what queue `index` receives goes to its socket; otherwise it is dropped. Without a
    /// map it always goes there.
    ///
    /// # Errors
    /// The system's refusal.
    pub fn set_receiving(&self, index: u16, receiving: bool) -> io::Result<()> {
        let (Some(fd), Some(map)) = (self.fds.get(usize::from(index)), &self.map) else {
            return Ok(());
        };
        if receiving {
            map.insert(index, fd.as_raw_fd())
        } else {
            map.remove(index)
        }
    }

    /// What was counted of frames that are sent, for each queue.
    pub fn counters(&self) -> &[Arc<SendCounters>] {
        &self.counters
    }

    /// Frames that the program has dropped because no guest served their queue; `None` where the
    /// program is somebody else's.
    pub fn unserved(&self) -> Option<u64> {
        self.held.as_ref()?.unserved.get().ok()
    }

    /// What the kernel has counted about all its sockets.
    pub fn statistics(&self) -> Statistics {
        let mut sum = Statistics::default();
        for one in self.fds.iter().filter_map(|fd| socket::statistics(fd).ok()) {
            sum.rx_dropped += one.rx_dropped;
            sum.rx_ring_full += one.rx_ring_full;
            sum.fill_ring_empty += one.fill_ring_empty;
            sum.tx_invalid += one.tx_invalid;
        }
        sum
    }
}

/// What is known about an interface.
struct Found {
    name: String,
    index: u32,
    /// Queues that are asked for.
    queues: u16,
    /// Bytes of its longest frame.
    longest: u32,
    /// Who makes checksums.
    tx_csum: TxCsum,
    /// Its driver says that it makes them.
    announced: bool,
}

impl Found {
    /// Whether frames may take several chunks.
    fn frags(&self) -> bool {
        self.longest > RX_CHUNK
    }

    /// The same, with a choice of who makes checksums.
    fn with_csum(self, tx_csum: TxCsum) -> Found {
        // Without an answer the driver announces nothing.
        let announced =
            tx_csum != TxCsum::Software && metadata::is_announced(self.index).unwrap_or(false);
        Found {
            tx_csum,
            announced,
            ..self
        }
    }

    /// Bytes for metadata before frames that are sent.
    fn headroom(&self) -> u32 {
        if self.leaves_csum(false) || self.leaves_csum(true) {
            metadata::HEADROOM
        } else {
            0
        }
    }

    /// Whether checksums are left to the interface: a driver that works in our memory sends the
    /// frame as it is if it does not know what is told.
    fn leaves_csum(&self, zero_copy: bool) -> bool {
        match self.tx_csum {
            TxCsum::Auto => zero_copy && self.announced,
            TxCsum::Offload => !zero_copy || self.announced,
            TxCsum::Software => false,
        }
    }
}

fn find(name: &str, queues: u16, mtu: Option<u16>) -> Result<Found, XdpError> {
    if let Some(what) = bad_name(name) {
        let name = name.into();
        return Err(XdpError::Name { name, what });
    }
    let look = |error| failed(name, "look at it", error);
    let socket = InterfaceSocket::new().map_err(look)?;
    let Some(index) = socket.index(name).map_err(look)? else {
        return Err(XdpError::Missing { name: name.into() });
    };
    // A driver that can't be asked refuses what it has not when a socket is bound.
    let there = socket.queues(name).unwrap_or(QUEUES_MAX.into());
    if queues == 0 || u32::from(queues) > there {
        let name = name.into();
        return Err(XdpError::Queues {
            name,
            queues,
            there,
        });
    }
    if there > u32::from(queues) && there != u32::from(QUEUES_MAX) {
        tracing::info!(
            "xdp {name}: the port has {queues} of {there} queues: what the others receive goes to \
             the host"
        );
    }
    let has = u32::try_from(socket.mtu(name).map_err(look)?).unwrap_or(0);
    if let Some(mtu) = mtu.filter(|mtu| u32::from(*mtu) > has) {
        return Err(XdpError::Mtu {
            name: name.into(),
            mtu,
            there: has,
        });
    }
    if !socket.is_up(name).map_err(look)? {
        tracing::warn!("xdp {name}: the interface is down: no frame goes through until it is up");
    }
    Ok(Found {
        name: name.into(),
        index: index.cast_unsigned(),
        queues,
        longest: has.saturating_add(HEADER_BYTES),
        tx_csum: TxCsum::Software,
        announced: false,
    })
}

/// Makes what takes capabilities, and the sockets, which have no memory yet.
fn means(found: &Found) -> Result<(Vec<OwnedFd>, Means), XdpError> {
    let (name, queues) = (found.name.as_str(), found.queues);
    let map = XskMap::new(queues).map_err(|error| failed(name, "make a map", error))?;
    let unserved = Unserved::new().map_err(|error| failed(name, "make a map", error))?;
    let program = Program::load(&map, &unserved, queues, found.frags())
        .map_err(|error| failed(name, "load a program", error))?;
    let (link, mode) = attach(name, found.index, &program)?;
    let sockets: io::Result<_> = (0..queues).map(|_| socket::create()).collect();
    let sockets = sockets.map_err(|error| failed(name, "open an AF_XDP socket", error))?;
    let means = Means {
        map: Some(map),
        held: Some(Held {
            link,
            promiscuous: promiscuous(found.index)
                .map_err(|error| failed(name, "make it promiscuous", error))?,
            unserved,
        }),
        mode,
    };
    Ok((sockets, means))
}

/// Ties the program to the driver, or else to the network stack.
fn attach(name: &str, index: u32, program: &Program) -> Result<(Link, Mode), XdpError> {
    let native = when_free(|| program.attach(index, Mode::Native), is_busy);
    let refused = match native {
        Ok(link) => return Ok((link, Mode::Native)),
        Err(error) => error,
    };
    let what = "attach a program";
    if is_final(&refused) {
        return Err(failed(name, what, refused));
    }
    match program.attach(index, Mode::Generic) {
        Ok(link) => {
            tracing::info!("xdp {name}: generic XDP, as the driver refuses native ({refused})");
            Ok((link, Mode::Generic))
        }
        Err(error) => Err(failed(name, what, error)),
    }
}

/// Nothing else will do either.
fn is_final(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EBUSY | libc::EEXIST | libc::EPERM | libc::EACCES | libc::ENODEV)
    )
}

fn is_busy(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EEXIST))
}

/// Tries `make` again for a while when it fails as `busy`: the kernel gives programs and queues
/// free some time after their last descriptor was closed.
fn when_free<T, E>(
    mut make: impl FnMut() -> Result<T, E>,
    busy: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let start = Instant::now();
    loop {
        match make() {
            Err(error) if busy(&error) && start.elapsed() < RELEASED_WITHIN => {
                std::thread::sleep(RETRY_AFTER);
            }
            answer => return answer,
        }
    }
}

/// Without copies, if that was tried and is possible, or else with; and which it was.
fn bind(name: &str, socket: &mut XdpSocket, binding: Binding) -> Result<bool, XdpError> {
    let queue = binding.queue;
    let mut bind = |binding| {
        when_free(
            || socket.bind(binding),
            |refusal: &socket::Refusal| is_busy(&refusal.source),
        )
    };
    if binding.zero_copy {
        let refused = match bind(binding) {
            Ok(()) => return Ok(true),
            Err(refusal) => refusal,
        };
        if is_final(&refused.source) {
            return Err(of_queue(name, queue, refused));
        }
        // Where one queue works without copies and the next does not, this is said once more.
        tracing::info!(
            "xdp {name}: queue {queue}: copy mode, as zero-copy is refused ({})",
            refused.source
        );
    }
    let copying = Binding {
        zero_copy: false,
        ..binding
    };
    bind(copying).map_err(|refusal| of_queue(name, queue, refusal))?;
    Ok(false)
}

fn of_queue(name: &str, queue: u16, refusal: socket::Refusal) -> XdpError {
    let what = format!("{} (queue {queue})", refusal.what);
    failed(name, &what, refusal.source)
}

/// Has the interface take frames for all stations, not only for its own: the guest has an address
/// of its own. Lasts as long as the answer.
fn promiscuous(index: u32) -> io::Result<OwnedFd> {
    // Protocol 0: the socket itself receives nothing.
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: `fd` is open and nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(fd) };
    // SAFETY: plain integers; all zero is valid.
    let mut request: libc::packet_mreq = unsafe { core::mem::zeroed() };
    request.mr_ifindex = index.cast_signed();
    #[expect(clippy::cast_possible_truncation, reason = "a small constant")]
    let kind = libc::PACKET_MR_PROMISC as libc::c_ushort;
    request.mr_type = kind;
    #[expect(clippy::cast_possible_truncation, reason = "a small structure")]
    let bytes = size_of::<libc::packet_mreq>() as libc::socklen_t;
    // SAFETY: `request` has as many bytes as are told.
    check(unsafe {
        libc::setsockopt(
            fd.as_raw_fd(),
            libc::SOL_PACKET,
            libc::PACKET_ADD_MEMBERSHIP,
            (&raw const request).cast(),
            bytes,
        )
    })?;
    Ok(fd)
}

fn failed(name: &str, what: &str, source: io::Error) -> XdpError {
    let (name, what) = (name.into(), what.into());
    match source.raw_os_error() {
        Some(libc::EBUSY | libc::EEXIST) => XdpError::Busy { name, what },
        Some(libc::EPERM | libc::EACCES) => XdpError::Permission { name, what },
        _ => XdpError::System { name, what, source },
    }
}

#[cfg(test)]
mod tests;
