//! Requests about network interfaces by name: `struct ifreq` and the socket that takes them.
//!
//! Linux: netdevice(7), `linux/ethtool.h`. Only what links need: whether an interface is there,
//! which driver and how many queues it has, its MTU, and up.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// A request that names an interface. The name must be shorter than IFNAMSIZ.
pub(super) struct IfReq(libc::ifreq);

impl IfReq {
    pub(super) fn new(name: &str) -> IfReq {
        // SAFETY: an `ifreq` is plain bytes; all zero is a valid one.
        let mut request: libc::ifreq = unsafe { core::mem::zeroed() };
        let last = request.ifr_name.len() - 1;
        for (to, from) in request.ifr_name[..last].iter_mut().zip(name.bytes()) {
            *to = from.cast_signed();
        }
        IfReq(request)
    }

    /// Interface flags all fit 16 bits.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "flags of 16 bits, as the field has"
    )]
    pub(super) fn with_flags(name: &str, flags: libc::c_int) -> IfReq {
        let mut request = IfReq::new(name);
        request.0.ifr_ifru.ifru_flags = flags as libc::c_short;
        request
    }

    pub(super) fn as_ptr(&self) -> *const libc::ifreq {
        &raw const self.0
    }

    pub(super) fn as_mut_ptr(&mut self) -> *mut libc::ifreq {
        &raw mut self.0
    }

    pub(super) fn name(&self) -> String {
        let bytes: Vec<u8> = self.0.ifr_name.iter().map(|c| c.cast_unsigned()).collect();
        text(&bytes)
    }

    fn index(&self) -> libc::c_int {
        // SAFETY: as for `flags`.
        unsafe { self.0.ifr_ifru.ifru_ifindex }
    }

    pub(super) fn flags(&self) -> libc::c_int {
        // SAFETY: every byte of the union is initialised, and any value is a valid integer.
        libc::c_int::from(unsafe { self.0.ifr_ifru.ifru_flags })
    }

    fn mtu(&self) -> libc::c_int {
        // SAFETY: as for `flags`.
        unsafe { self.0.ifr_ifru.ifru_mtu }
    }
}

/// What the kernel says about the driver of an interface.
pub(super) struct Driver {
    pub(super) name: String,
    bus: String,
}

impl Driver {
    pub(super) fn is_tap(&self) -> bool {
        self.name == "tun" && self.bus == "tap"
    }
}

/// `struct ethtool_drvinfo` of the kernel.
#[repr(C)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    fw_version: [u8; 32],
    bus_info: [u8; 32],
    erom_version: [u8; 32],
    reserved2: [u8; 12],
    counts: [u32; 5],
}

/// ETHTOOL_GDRVINFO.
const GET_DRIVER_INFO: u32 = 3;

/// `struct ethtool_channels` of the kernel.
#[repr(C)]
#[derive(Default)]
struct Channels {
    cmd: u32,
    max_rx: u32,
    max_tx: u32,
    max_other: u32,
    max_combined: u32,
    rx: u32,
    tx: u32,
    other: u32,
    combined: u32,
}

/// ETHTOOL_GCHANNELS.
const GET_CHANNELS: u32 = 0x3c;

/// A socket that takes requests about interfaces.
pub(super) struct InterfaceSocket(OwnedFd);

impl InterfaceSocket {
    pub(super) fn new() -> io::Result<InterfaceSocket> {
        // SAFETY: no pointers.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        check(fd)?;
        // SAFETY: `fd` is open and nobody else has it.
        Ok(InterfaceSocket(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The driver of interface `name`; `None` when there is no such interface. An interface
    /// without a driver to ask gives an empty name.
    pub(super) fn driver(&self, name: &str) -> io::Result<Option<Driver>> {
        match self.call(libc::SIOCGIFFLAGS, &mut IfReq::new(name)) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            answer => answer?,
        }
        // SAFETY: plain bytes and integers; all zero is valid.
        let mut info: DriverInfo = unsafe { core::mem::zeroed() };
        info.cmd = GET_DRIVER_INFO;
        let mut request = IfReq::new(name);
        request.0.ifr_ifru.ifru_data = (&raw mut info).cast();
        match self.call(libc::SIOCETHTOOL, &mut request) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
            answer => answer?,
        }
        Ok(Some(Driver {
            name: text(&info.driver),
            bus: text(&info.bus_info),
        }))
    }

    /// The number of interface `name`; `None` when there is no such interface.
    pub(super) fn index(&self, name: &str) -> io::Result<Option<libc::c_int>> {
        let mut request = IfReq::new(name);
        match self.call(libc::SIOCGIFINDEX, &mut request) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            answer => answer.map(|()| Some(request.index())),
        }
    }

    /// Whether the interface is up.
    pub(super) fn is_up(&self, name: &str) -> io::Result<bool> {
        let mut request = IfReq::new(name);
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        Ok(request.flags() & libc::IFF_UP != 0)
    }

    /// Whether the interface is up and has a carrier.
    pub(super) fn has_link(&self, name: &str) -> io::Result<bool> {
        const LINK: libc::c_int = libc::IFF_UP | libc::IFF_RUNNING;
        let mut request = IfReq::new(name);
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        Ok(request.flags() & LINK == LINK)
    }

    /// The queues that both receive and transmit; `None` when the driver can't be asked.
    pub(super) fn queues(&self, name: &str) -> Option<u32> {
        let mut channels = Channels {
            cmd: GET_CHANNELS,
            ..Channels::default()
        };
        let mut request = IfReq::new(name);
        request.0.ifr_ifru.ifru_data = (&raw mut channels).cast();
        self.call(libc::SIOCETHTOOL, &mut request).ok()?;
        Some(channels.combined + channels.rx.min(channels.tx))
    }

    /// The MTU of the interface.
    pub(super) fn mtu(&self, name: &str) -> io::Result<libc::c_int> {
        let mut request = IfReq::new(name);
        self.call(libc::SIOCGIFMTU, &mut request)?;
        Ok(request.mtu())
    }

    /// Sets the MTU unless it is `mtu` already: that takes no privilege.
    pub(super) fn set_mtu(&self, name: &str, mtu: u16) -> io::Result<()> {
        if self.mtu(name)? == libc::c_int::from(mtu) {
            return Ok(());
        }
        let mut request = IfReq::new(name);
        request.0.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
        self.call(libc::SIOCSIFMTU, &mut request)
    }

    /// Sets the interface up.
    pub(super) fn set_up(&self, name: &str) -> io::Result<()> {
        let mut request = IfReq::new(name);
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        let mut request = IfReq::with_flags(name, request.flags() | libc::IFF_UP);
        self.call(libc::SIOCSIFFLAGS, &mut request)
    }

    fn call(&self, what: libc::Ioctl, request: &mut IfReq) -> io::Result<()> {
        // SAFETY: all requests above read and write an `ifreq`; that of SIOCETHTOOL points to a
        // `DriverInfo` or `Channels`, as long as its command asks for.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what, request.as_mut_ptr()) })
    }
}

impl AsRawFd for InterfaceSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// The answer of a system call that is negative when it failed.
pub(super) fn check(answer: libc::c_int) -> io::Result<()> {
    if answer < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// What is wrong with `name` as that of an interface, if anything: the kernel takes `%` for a
/// pattern and cuts what is too long.
pub(super) fn bad_name(name: &str) -> Option<&'static str> {
    if name.is_empty() {
        Some("it is empty")
    } else if name.len() >= libc::IFNAMSIZ {
        Some("it has more than 15 bytes")
    } else if name == "." || name == ".." {
        Some("it is a directory")
    } else if name
        .bytes()
        .any(|b| matches!(b, b'/' | b':' | b'%' | 0) || b.is_ascii_whitespace())
    {
        Some("it has a slash, a colon, a percent sign or white space in it")
    } else {
        None
    }
}

fn text(bytes: &[u8]) -> String {
    let end = bytes
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}
