//! `XdpSocket`: one queue of an interface, with memory and rings of its own.
//!
//! Half of the frames are for receiving: each of them is in the fill ring, with the kernel, or in
//! the RX ring. The other half are for sending: free, in the TX ring, with the kernel, or in the
//! completion ring. Every ring has an entry for each frame that may be in it, so only the free
//! frames are ever short. Those for sending begin with room for metadata (`metadata.rs`) where
//! checksums may be left to the interface. Linux: Documentation/networking/af_xdp.rst.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use crate::memory::{Segment, copy};
use crate::sync::Counter;
use crate::sys::ifreq::check;

use super::metadata::{self, Undone};
use super::ring::{Consumer, Producer, Umem};
use super::{busy, when_free};

/// Bytes of a frame of the UMEM.
pub const CHUNK: u32 = 2048;
/// Bytes that the kernel keeps before what it receives (XDP_PACKET_HEADROOM).
const HEADROOM: u32 = 256;
/// Bytes of a received frame that one chunk takes.
pub const RX_CHUNK: u32 = CHUNK - HEADROOM;
/// Frames for each direction, and entries of the rings that the kernel fills; fewer where too
/// little memory may be locked.
pub(super) const ENTRIES_MAX: u32 = 2048;
/// The least: memory of one huge page, and two of the largest bursts.
pub(super) const ENTRIES_MIN: u32 = 512;
/// Bytes of the memory of a socket of full size, which the process must be allowed to lock.
pub const MEMORY_BYTES: u64 = memory_bytes(ENTRIES_MAX);
/// What is tried when memory is to be locked.
pub(super) const REGISTER: &str = "register memory for its frames";
/// Buffers of one frame at most: MAX_SKB_FRAGS of the kernel.
pub const PIECES_MAX: u32 = 17;

/// What the kernel counts about a socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Statistics {
    /// Received frames that were dropped, but not for want of room in the RX ring.
    pub rx_dropped: u64,
    /// Frames that found the RX ring full.
    pub rx_ring_full: u64,
    /// Times that no frame was in the fill ring.
    pub fill_ring_empty: u64,
    /// Descriptors to be sent that the kernel refused.
    pub tx_invalid: u64,
}

/// What is counted of frames that are sent: the work that guests leave undone in them, and losses.
/// The socket's worker is the only one who counts.
#[derive(Debug, Default)]
pub struct SendCounters {
    /// Frames whose checksum was left to the interface, segments among them.
    pub offloaded_csum: Counter,
    /// Whole frames whose checksum was made here.
    pub software_csum: Counter,
    /// Segments that were cut here.
    pub software_segments: Counter,
    /// Frames that the kernel took from the socket and dropped.
    pub kernel_dropped: Counter,
}

/// Bytes of the memory of a socket with `entries` frames for each direction.
pub(super) const fn memory_bytes(entries: u32) -> u64 {
    2 * entries as u64 * CHUNK as u64
}

/// How a socket is bound.
#[derive(Debug, Clone, Copy)]
pub(super) struct Binding {
    pub(super) interface: u32,
    pub(super) queue: u16,
    /// The interface works in our memory; otherwise the kernel copies.
    pub(super) zero_copy: bool,
    /// Frames may take several chunks.
    pub(super) frags: bool,
}

/// A socket without memory, which takes CAP_NET_RAW; all that follows does not.
pub(super) fn create() -> io::Result<OwnedFd> {
    let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC;
    // SAFETY: no pointers.
    let fd = unsafe { libc::socket(libc::AF_XDP, kind, 0) };
    check(fd)?;
    // SAFETY: `fd` is open and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Why a socket can't be had.
#[derive(Debug)]
pub(super) struct Refusal {
    pub(super) what: &'static str,
    pub(super) source: io::Error,
}

fn refused(what: &'static str) -> impl FnOnce(io::Error) -> Refusal {
    move |source| Refusal { what, source }
}

/// One queue of an interface. Hot: belongs to one worker.
#[derive(Debug)]
pub struct XdpSocket {
    fd: Arc<OwnedFd>,
    counters: Arc<SendCounters>,
    zero_copy: bool,
    /// Bytes before each frame that is sent: room for metadata, if that may be told.
    headroom: u32,
    /// Checksums may be left to the interface.
    leaves_csum: bool,
    /// The kernel looks for frames when it is asked.
    busy_poll: bool,
    fill: Producer<u64>,
    rx: Consumer<libc::xdp_desc>,
    tx: Producer<libc::xdp_desc>,
    completion: Consumer<u64>,
    /// Addresses of frames to send in.
    free: Vec<u64>,
    /// How many there are when none is on its way.
    chunks: usize,
    /// After the rings and the socket: the kernel may write there.
    umem: Umem,
}

impl XdpSocket {
    /// Gives the new socket `fd` memory and rings for `entries` frames in each direction, and fills
    /// its fill ring. `patient`: others may give memory back that they have locked. `headroom`:
    /// bytes for metadata before what is sent, if the kernel knows it.
    pub(super) fn new(
        fd: OwnedFd,
        entries: u32,
        patient: bool,
        mut headroom: u32,
    ) -> Result<XdpSocket, Refusal> {
        let bytes = usize::try_from(memory_bytes(entries)).unwrap_or(usize::MAX);
        let umem = Umem::new(bytes).map_err(refused("get memory for its frames"))?;
        // What a process before this one had locked is free some time after its end.
        let is_short = |error: &io::Error| patient && error.raw_os_error() == Some(libc::ENOBUFS);
        let register = |headroom| when_free(|| register(&fd, &umem, headroom), is_short);
        let mut answer = register(headroom);
        // Before Linux 6.11 the flag is one that nobody knows.
        if headroom > 0 && answer.as_ref().is_err_and(is_unknown) {
            headroom = 0;
            answer = register(headroom);
        }
        answer.map_err(refused(REGISTER))?;
        let socket = XdpSocket::with_rings(fd, umem, entries, headroom);
        let mut socket = socket.map_err(refused("make its rings"))?;
        for frame in 0..entries {
            socket.fill.push(u64::from(frame * CHUNK));
        }
        socket.fill.publish();
        Ok(socket)
    }

    /// Binds it to a queue of an interface. After an error it can be tried again.
    pub(super) fn bind(&mut self, binding: Binding) -> Result<(), Refusal> {
        bind(&self.fd, binding).map_err(refused("bind to a queue"))?;
        self.zero_copy = binding.zero_copy;
        Ok(())
    }

    /// Has it polled for so many microseconds; not with 0.
    pub(super) fn poll_busily(&mut self, micros: u32) -> Result<(), Refusal> {
        busy::poll(&self.fd, micros).map_err(refused(busy::WHAT))?;
        self.busy_poll = micros > 0;
        Ok(())
    }

    fn with_rings(fd: OwnedFd, umem: Umem, entries: u32, headroom: u32) -> io::Result<XdpSocket> {
        // Those that we fill: the kernel may hand a frame over before it says that it took it from
        // there, so that it seems to be in both.
        let filled = 2 * entries;
        set(&fd, libc::XDP_UMEM_FILL_RING, &filled)?;
        set(&fd, libc::XDP_UMEM_COMPLETION_RING, &entries)?;
        set(&fd, libc::XDP_RX_RING, &entries)?;
        set(&fd, libc::XDP_TX_RING, &filled)?;
        let at = offsets(&fd)?;
        let page =
            |offset: libc::c_ulonglong| libc::off_t::try_from(offset).map_err(io::Error::other);
        let fill = page(libc::XDP_UMEM_PGOFF_FILL_RING)?;
        let completion = page(libc::XDP_UMEM_PGOFF_COMPLETION_RING)?;
        let of = fd.as_fd();
        Ok(XdpSocket {
            fill: Producer::map(of, fill, at.fr, filled)?,
            rx: Consumer::map(of, libc::XDP_PGOFF_RX_RING, at.rx, entries)?,
            tx: Producer::map(of, libc::XDP_PGOFF_TX_RING, at.tx, filled)?,
            completion: Consumer::map(of, completion, at.cr, entries)?,
            free: (entries..2 * entries)
                .map(|frame| u64::from(frame * CHUNK + headroom))
                .collect(),
            chunks: entries as usize,
            fd: Arc::new(fd),
            counters: Arc::default(),
            zero_copy: false,
            headroom,
            leaves_csum: false,
            busy_poll: false,
            umem,
        })
    }

    /// The socket itself, to be asked for its statistics and to be put in a map.
    pub(super) fn fd(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.fd)
    }

    /// What is counted of frames that are sent.
    pub fn counters(&self) -> &Arc<SendCounters> {
        &self.counters
    }

    /// Whether there is room for metadata.
    pub(super) fn has_metadata(&self) -> bool {
        self.headroom > 0
    }

    /// Has checksums left to the interface, which makes them; there must be room for metadata.
    pub(super) fn leave_csum(&mut self) {
        self.leaves_csum = self.has_metadata();
    }

    /// Whether checksums may be left to the interface.
    #[inline]
    pub fn leaves_csum(&self) -> bool {
        self.leaves_csum
    }

    /// Bytes of a frame that one chunk takes when it is sent.
    #[inline]
    pub fn chunk_bytes(&self) -> u32 {
        CHUNK - self.headroom
    }

    /// Whether its memory is in huge pages.
    pub fn is_huge(&self) -> bool {
        self.umem.is_huge()
    }

    /// Buffers that were received and not given back, at least `want` if there are so many.
    #[inline]
    pub fn received(&mut self, want: u32) -> u32 {
        self.rx.available(want)
    }

    /// Buffer `index` of those received; whether the frame goes on in the next one.
    #[inline]
    pub fn buffer(&self, index: u32) -> (Segment, bool) {
        let desc = self.rx.peek(index);
        let more = desc.options & libc::XDP_PKT_CONTD != 0;
        (self.umem.segment(desc.addr, desc.len), more)
    }

    /// Gives the first `count` received buffers back to be received in again.
    #[inline]
    pub fn give_back(&mut self, count: u32) {
        // The fill ring has room for all of them: it is twice as long.
        for index in 0..count {
            let desc = self.rx.peek(index);
            self.fill.push(desc.addr & !u64::from(CHUNK - 1));
        }
        self.rx.release(count);
        self.fill.publish();
    }

    /// Wakes the kernel if it waits for buffers to receive in, or to be polled.
    #[inline]
    pub fn wake_receiver(&self) {
        if self.busy_poll || self.fill.wants_wakeup() {
            self.wake_receiver_now();
        }
    }

    #[cold]
    fn wake_receiver_now(&self) {
        let (fd, nothing) = (self.fd.as_raw_fd(), core::ptr::null_mut());
        // SAFETY: no bytes are asked for. What it answers tells nothing that polling does not.
        unsafe { libc::recv(fd, nothing, 0, libc::MSG_DONTWAIT) };
    }

    /// Takes back the chunks that were sent.
    #[inline]
    pub fn reap(&mut self) {
        let count = self.completion.available(1);
        if count == 0 {
            return;
        }
        for index in 0..count {
            let address = self.completion.peek(index);
            self.free.push(address);
        }
        self.completion.release(count);
    }

    /// Chunks to send in, on their way or not.
    pub fn chunks(&self) -> usize {
        self.chunks
    }

    /// Chunks that can be sent in now.
    #[inline]
    pub fn free_chunks(&self) -> usize {
        self.free.len()
    }

    /// The next chunk to be sent in, to be written before [`XdpSocket::send`] sends it.
    #[inline]
    pub fn next_chunk(&self) -> Option<Segment> {
        let address = self.free.last()?;
        Some(self.umem.segment(*address, self.chunk_bytes()))
    }

    /// Puts the next chunk, of which `len` bytes are written, in the TX ring; with `more`, the
    /// frame goes on in the one after it. Seen by the kernel after [`XdpSocket::publish`].
    #[inline]
    pub fn send(&mut self, len: u32, more: bool) {
        self.push(len, if more { libc::XDP_PKT_CONTD } else { 0 });
    }

    /// The same with the first chunk of a frame whose checksum is left to the interface. That
    /// stands in this chunk, and checksums may be left.
    #[inline]
    pub fn send_undone(&mut self, len: u32, more: bool, undone: Undone) {
        debug_assert!(self.leaves_csum && undone.is_within(len));
        if let Some(address) = self.free.last() {
            let before = address - u64::from(self.headroom);
            let place = self.umem.segment(before, metadata::BYTES);
            copy::write(&[place], 0, &undone.request());
        }
        let more = if more { libc::XDP_PKT_CONTD } else { 0 };
        self.push(len, libc::XDP_TX_METADATA | more);
    }

    #[inline]
    fn push(&mut self, len: u32, options: u32) {
        if let Some(addr) = self.free.pop() {
            self.tx.push(libc::xdp_desc { addr, len, options });
        }
    }

    /// Lets the kernel see what is in the TX ring.
    #[inline]
    pub fn publish(&mut self) {
        self.tx.publish();
    }

    /// Whether the kernel has not taken all that was sent.
    #[inline]
    pub fn is_sending(&self) -> bool {
        self.tx.waiting() > 0
    }

    /// Has the kernel take what is in the TX ring, as far as it can now.
    ///
    /// # Errors
    /// ENETDOWN when the interface is down, ENXIO when it is gone.
    #[inline]
    pub fn wake_sender(&mut self) -> io::Result<()> {
        if self.zero_copy && !self.busy_poll && !self.tx.wants_wakeup() {
            return Ok(());
        }
        loop {
            let waiting = self.tx.waiting();
            if waiting == 0 {
                return Ok(());
            }
            // SAFETY: no bytes are sent by this call; those of the ring lie in registered memory.
            let answer = unsafe {
                libc::sendto(
                    self.fd.as_raw_fd(),
                    core::ptr::null(),
                    0,
                    libc::MSG_DONTWAIT,
                    core::ptr::null(),
                    0,
                )
            };
            if answer < 0 {
                match io::Error::last_os_error() {
                    // In copy mode: what is behind the interface, if only its carrier, refused the
                    // frame, which is gone, and the call ended there.
                    error if error.raw_os_error() == Some(libc::EBUSY) && !self.zero_copy => {
                        self.counters.kernel_dropped.add(1);
                    }
                    // A call takes only so many frames, or the interface had no room for the last.
                    error if is_passing(&error) => {}
                    error => return Err(error),
                }
            }
            if self.zero_copy || self.tx.waiting() == waiting {
                return Ok(());
            }
        }
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EAGAIN | libc::EBUSY | libc::ENOBUFS | libc::EINTR)
    )
}

/// To wait for frames with.
impl AsRawFd for XdpSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

/// What the kernel has counted about `socket`.
pub(super) fn statistics(socket: &OwnedFd) -> io::Result<Statistics> {
    // SAFETY: plain integers; all zero is valid.
    let mut all: libc::xdp_statistics = unsafe { core::mem::zeroed() };
    get(socket, libc::XDP_STATISTICS, &mut all)?;
    Ok(Statistics {
        rx_dropped: all.rx_dropped + all.rx_invalid_descs,
        rx_ring_full: all.rx_ring_full,
        fill_ring_empty: all.rx_fill_ring_empty_descs,
        tx_invalid: all.tx_invalid_descs,
    })
}

fn is_unknown(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EINVAL)
}

fn register(fd: &OwnedFd, umem: &Umem, headroom: u32) -> io::Result<()> {
    // SAFETY: plain integers; all zero is valid.
    let mut memory: libc::xdp_umem_reg = unsafe { core::mem::zeroed() };
    memory.addr = umem.address();
    memory.len = u64::try_from(umem.bytes()).map_err(io::Error::other)?;
    memory.chunk_size = CHUNK;
    if headroom > 0 {
        memory.flags = libc::XDP_UMEM_TX_METADATA_LEN;
        memory.tx_metadata_len = headroom;
    }
    set(fd, libc::XDP_UMEM_REG, &memory)
}

fn offsets(fd: &OwnedFd) -> io::Result<libc::xdp_mmap_offsets> {
    // SAFETY: plain integers; all zero is valid.
    let mut offsets: libc::xdp_mmap_offsets = unsafe { core::mem::zeroed() };
    get(fd, libc::XDP_MMAP_OFFSETS, &mut offsets)?;
    Ok(offsets)
}

fn bind(fd: &OwnedFd, binding: Binding) -> io::Result<()> {
    let copy = if binding.zero_copy {
        libc::XDP_ZEROCOPY
    } else {
        libc::XDP_COPY
    };
    let frags = if binding.frags { libc::XDP_USE_SG } else { 0 };
    // SAFETY: plain integers; all zero is valid.
    let mut address: libc::sockaddr_xdp = unsafe { core::mem::zeroed() };
    #[expect(clippy::cast_possible_truncation, reason = "the number of a family")]
    let family = libc::AF_XDP as u16;
    address.sxdp_family = family;
    address.sxdp_flags = libc::XDP_USE_NEED_WAKEUP | copy | frags;
    address.sxdp_ifindex = binding.interface;
    address.sxdp_queue_id = binding.queue.into();
    // SAFETY: the address has as many bytes as are told.
    let answer = unsafe {
        libc::bind(
            fd.as_raw_fd(),
            (&raw const address).cast(),
            bytes_of(&address),
        )
    };
    check(answer)
}

#[expect(clippy::cast_possible_truncation, reason = "a small structure")]
fn bytes_of<T>(_: &T) -> libc::socklen_t {
    size_of::<T>() as libc::socklen_t
}

fn set<T: Copy>(fd: &OwnedFd, option: libc::c_int, value: &T) -> io::Result<()> {
    let (at, bytes) = ((&raw const *value).cast(), bytes_of(value));
    // SAFETY: `value` has as many bytes as are told.
    check(unsafe { libc::setsockopt(fd.as_raw_fd(), libc::SOL_XDP, option, at, bytes) })
}

fn get<T: Copy>(fd: &OwnedFd, option: libc::c_int, value: &mut T) -> io::Result<()> {
    let mut bytes = bytes_of(value);
    let (at, len) = ((&raw mut *value).cast(), &raw mut bytes);
    // SAFETY: `value` has as many bytes as are told; those passed here are made of integers.
    check(unsafe { libc::getsockopt(fd.as_raw_fd(), libc::SOL_XDP, option, at, len) })
}
