//! The program that gives frames to sockets: its map, and the link that ties it to an interface.
//!
//! A few instructions, written out here, so that neither a compiler nor an object file is needed.
//! Everything is held by file descriptors and by nothing else: when the process ends, however it
//! does, the interface is as it was. Linux: bpf(2), Documentation/bpf/map_xskmap.rst.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::sys::ifreq::check;

// Commands of bpf(2).
const MAP_CREATE: libc::c_int = 0;
const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_UPDATE_ELEM: libc::c_int = 2;
const MAP_DELETE_ELEM: libc::c_int = 3;
const PROG_LOAD: libc::c_int = 5;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const LINK_CREATE: libc::c_int = 28;

/// BPF_MAP_TYPE_ARRAY.
const MAP_TYPE_ARRAY: u32 = 2;
/// BPF_MAP_TYPE_XSKMAP.
const MAP_TYPE_XSKMAP: u32 = 17;
/// BPF_PROG_TYPE_XDP.
const PROG_TYPE_XDP: u32 = 6;
/// BPF_XDP, the type of the link.
const ATTACH_XDP: u32 = 37;
/// BPF_F_XDP_HAS_FRAGS: the program takes frames of several buffers.
const PROG_HAS_FRAGS: u32 = 1 << 5;

/// Offset of `rx_queue_index` in `struct xdp_md`.
const MD_RX_QUEUE: i16 = 16;
/// The helper `bpf_redirect_map`.
const REDIRECT_MAP: i32 = 51;
/// Answers of an XDP program.
const XDP_DROP: i32 = 1;
const XDP_PASS: i32 = 2;
/// BPF_PSEUDO_MAP_FD, in the place of a source register: the immediate is a map's descriptor.
const MAP_FD: u8 = 1;
/// BPF_PSEUDO_MAP_VALUE: it is, and the address of the map's only value is meant.
const MAP_VALUE: u8 = 2;

/// Where in the interface the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// In its driver, before the kernel makes a packet of the frame.
    Native,
    /// In the network stack, for drivers that have no place for it.
    Generic,
}

impl Mode {
    /// XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE.
    fn flag(self) -> u32 {
        match self {
            Mode::Native => 1 << 2,
            Mode::Generic => 1 << 1,
        }
    }
}

/// What bpf(2) reads for MAP_CREATE.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    max_entries: u32,
    flags: u32,
    inner_map_fd: u32,
    numa_node: u32,
    name: [u8; 16],
}

/// For MAP_LOOKUP_ELEM, MAP_UPDATE_ELEM and MAP_DELETE_ELEM.
#[repr(C)]
struct MapElem {
    map_fd: u32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// For OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct GetInfo {
    fd: u32,
    bytes: u32,
    info: u64,
}

/// The start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    map_type: u32,
    id: u32,
    key_bytes: u32,
    value_bytes: u32,
    max_entries: u32,
}

/// For PROG_LOAD.
#[repr(C)]
struct ProgLoad {
    prog_type: u32,
    instructions: u32,
    code: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
}

/// For LINK_CREATE.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    interface: u32,
    attach_type: u32,
    flags: u32,
}

/// The sockets by the receive queue that they serve.
#[derive(Debug)]
pub(super) struct XskMap(OwnedFd);

impl XskMap {
    /// A map for queues `0..queues`, empty.
    pub(super) fn new(queues: u16) -> io::Result<XskMap> {
        create_map(MAP_TYPE_XSKMAP, 4, queues.into(), *b"vringd_sockets\0\0").map(XskMap)
    }

    /// The map that somebody else has made, and the number of queues that it has places for.
    /// `None` when `fd` is not such a map.
    pub(super) fn of(fd: OwnedFd) -> Option<(XskMap, u32)> {
        let mut info = MapInfo::default();
        let ask = GetInfo {
            fd: number(fd.as_raw_fd()),
            bytes: size_of::<MapInfo>().try_into().ok()?,
            info: (&raw mut info).expose_provenance() as u64,
        };
        // SAFETY: OBJ_GET_INFO_BY_FD writes as many bytes as it is told, of plain integers.
        check(unsafe { bpf(OBJ_GET_INFO_BY_FD, &ask) }).ok()?;
        // Objects of other kinds are described in other words.
        let is_map = info.map_type == MAP_TYPE_XSKMAP;
        let fits = (info.key_bytes, info.value_bytes) == (4, 4);
        (is_map && fits).then_some((XskMap(fd), info.max_entries))
    }

    /// To be given to another process.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.0
    }

    /// Frames of receive queue `queue` go to `socket` from now on.
    pub(super) fn insert(&self, queue: u16, socket: RawFd) -> io::Result<()> {
        let key = u32::from(queue);
        let elem = element(&self.0, &key, address(&socket));
        // SAFETY: MAP_UPDATE_ELEM reads a key and a value of 4 bytes each, as the map has them.
        check(unsafe { bpf(MAP_UPDATE_ELEM, &elem) })
    }

    /// Frames of receive queue `queue` are dropped from now on.
    pub(super) fn remove(&self, queue: u16) -> io::Result<()> {
        let key = u32::from(queue);
        let elem = element(&self.0, &key, 0);
        // SAFETY: MAP_DELETE_ELEM reads a key of 4 bytes, as the map has them.
        match check(unsafe { bpf(MAP_DELETE_ELEM, &elem) }) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL)) => {
                Ok(())
            }
            answer => answer,
        }
    }
}

/// Frames that the program has dropped: a map of one number.
#[derive(Debug)]
pub(super) struct Unserved(OwnedFd);

impl Unserved {
    pub(super) fn new() -> io::Result<Unserved> {
        create_map(MAP_TYPE_ARRAY, 8, 1, *b"vringd_unserved\0").map(Unserved)
    }

    /// How many so far.
    pub(super) fn get(&self) -> io::Result<u64> {
        let (key, mut count) = (0_u32, 0_u64);
        let elem = element(&self.0, &key, (&raw mut count).expose_provenance() as u64);
        // SAFETY: MAP_LOOKUP_ELEM reads a key of 4 bytes and writes a value of 8, as the map has
        // them.
        check(unsafe { bpf(MAP_LOOKUP_ELEM, &elem) })?;
        Ok(count)
    }
}

/// The loaded program.
#[derive(Debug)]
pub(super) struct Program(OwnedFd);

impl Program {
    /// The program that gives frames of queues `0..queues` to the sockets in `map`, or drops and
    /// counts them in `unserved`, and leaves all others to the kernel; with `frags` also frames of
    /// several buffers.
    pub(super) fn load(
        map: &XskMap,
        unserved: &Unserved,
        queues: u16,
        frags: bool,
    ) -> io::Result<Program> {
        let code = code(map.0.as_raw_fd(), unserved.0.as_raw_fd(), queues);
        let license = c"Apache-2.0";
        let load = ProgLoad {
            prog_type: PROG_TYPE_XDP,
            instructions: u32::try_from(code.len()).map_err(io::Error::other)?,
            code: address(&code),
            license: license.as_ptr().expose_provenance() as u64,
            log_level: 0,
            log_bytes: 0,
            log: 0,
            kernel_version: 0,
            flags: if frags { PROG_HAS_FRAGS } else { 0 },
            name: *b"vringd_port\0\0\0\0\0",
        };
        // SAFETY: PROG_LOAD reads as many instructions as there are and a string that ends with
        // NUL, and answers a new descriptor.
        unsafe { bpf_fd(PROG_LOAD, &load) }.map(Program)
    }

    /// Ties the program to interface number `interface`, until the answer is dropped.
    pub(super) fn attach(&self, interface: u32, mode: Mode) -> io::Result<Link> {
        let create = LinkCreate {
            prog_fd: number(self.0.as_raw_fd()),
            interface,
            attach_type: ATTACH_XDP,
            flags: mode.flag(),
        };
        // SAFETY: LINK_CREATE reads its attributes, and answers a new descriptor.
        unsafe { bpf_fd(LINK_CREATE, &create) }.map(Link)
    }
}

/// What keeps a program at an interface.
#[derive(Debug)]
pub(super) struct Link(OwnedFd);

impl Link {
    /// To be given to another process.
    pub(super) fn into_fd(self) -> OwnedFd {
        self.0
    }
}

/// One instruction: operation, registers, offset, immediate.
#[expect(
    clippy::cast_sign_loss,
    reason = "bit patterns of the instruction's fields"
)]
fn instruction(op: u8, to: u8, from: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(op)
        | u64::from(from << 4 | to) << 8
        | u64::from(offset as u16) << 16
        | u64::from(immediate as u32) << 32
}

/// Frames of a queue below `queues` are redirected through the map `sockets`, or dropped and
/// counted in the map `unserved` where that has no socket; the others pass.
fn code(sockets: RawFd, unserved: RawFd, queues: u16) -> [u64; 14] {
    const LOAD_U32: u8 = 0x61;
    const LOAD_WIDE: u8 = 0x18;
    const MOVE: u8 = 0xb7;
    const JUMP_IF_GE: u8 = 0x35;
    const JUMP_UNLESS: u8 = 0x55;
    const ATOMIC_ADD: u8 = 0xdb;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    [
        instruction(LOAD_U32, 2, 1, MD_RX_QUEUE, 0),
        instruction(JUMP_IF_GE, 2, 0, 10, queues.into()),
        instruction(LOAD_WIDE, 1, MAP_FD, 0, sockets),
        0,
        instruction(MOVE, 3, 0, 0, XDP_DROP),
        instruction(CALL, 0, 0, 0, REDIRECT_MAP),
        instruction(JUMP_UNLESS, 0, 0, 4, XDP_DROP),
        instruction(LOAD_WIDE, 1, MAP_VALUE, 0, unserved),
        0,
        instruction(MOVE, 2, 0, 0, 1),
        instruction(ATOMIC_ADD, 1, 2, 0, 0),
        instruction(EXIT, 0, 0, 0, 0),
        instruction(MOVE, 0, 0, 0, XDP_PASS),
        instruction(EXIT, 0, 0, 0, 0),
    ]
}

/// A map with keys of 4 bytes.
fn create_map(
    map_type: u32,
    value_bytes: u32,
    max_entries: u32,
    name: [u8; 16],
) -> io::Result<OwnedFd> {
    let create = MapCreate {
        map_type,
        key_bytes: 4,
        value_bytes,
        max_entries,
        flags: 0,
        inner_map_fd: 0,
        numa_node: 0,
        name,
    };
    // SAFETY: MAP_CREATE reads its attributes, and answers a new descriptor.
    unsafe { bpf_fd(MAP_CREATE, &create) }
}

/// What stands at `key` in a map, and the address of what it is or will be.
fn element(map: &OwnedFd, key: &u32, value: u64) -> MapElem {
    MapElem {
        map_fd: number(map.as_raw_fd()),
        padding: 0,
        key: address(key),
        value,
        flags: 0,
    }
}

/// The address of what bpf(2) will read.
fn address<T>(of: &T) -> u64 {
    (&raw const *of).expose_provenance() as u64
}

/// A descriptor as bpf(2) wants it.
fn number(fd: RawFd) -> u32 {
    fd.cast_unsigned()
}

/// # Safety
/// `attributes` is what `command` reads, and the addresses in it are those of what it reads there.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> libc::c_int {
    // SAFETY: bpf(2) reads as many bytes as it is told; more than it knows must be zero.
    let answer = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            &raw const *attributes,
            size_of::<T>(),
        )
    };
    libc::c_int::try_from(answer).unwrap_or(-1)
}

/// # Safety
/// As for [`bpf`]; and `command` answers a descriptor.
unsafe fn bpf_fd<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says.
    let fd = unsafe { bpf(command, attributes) };
    check(fd)?;
    // SAFETY: `fd` is open and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
