//! Frames that the kernel drops because the queue of a tap is full: nobody has read them in time.
//!
//! Only the interface counts them, whose statistics rtnetlink(7) tells anybody in its namespace.

use std::io;

use crate::sys::ifreq::InterfaceSocket;
use crate::sys::netlink::{Netlink, attribute};

/// IFLA_STATS64: `rtnl_link_stats64`, of words.
const STATISTICS: u16 = 23;
const WORD: usize = 8;

/// In which of its statistics an interface has them: which word it is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Side {
    /// A tap sends to its reader: `tx_dropped`.
    Sent = 7,
    /// A macvtap receives for its reader: `rx_dropped`.
    Received = 6,
}

/// Counts them from when it was made.
#[derive(Debug)]
pub(super) struct Dropped {
    netlink: Netlink,
    index: u32,
    side: Side,
    before: u64,
}

impl Dropped {
    /// Of interface `name` in the namespace of this thread.
    pub(super) fn open(name: &str, side: Side) -> io::Result<Dropped> {
        let missing = || io::Error::from_raw_os_error(libc::ENODEV);
        let index = InterfaceSocket::new()?.index(name)?.ok_or_else(missing)?;
        let mut dropped = Dropped {
            netlink: Netlink::new(libc::NETLINK_ROUTE)?,
            index: index.cast_unsigned(),
            side,
            before: 0,
        };
        dropped.before = dropped.count()?;
        Ok(dropped)
    }

    /// How many there were since.
    pub(super) fn count(&self) -> io::Result<u64> {
        let attributes = self.netlink.interface(self.index)?;
        let at = self.side as usize * WORD;
        let word = attribute(&attributes, STATISTICS).and_then(|all| all.get(at..at + WORD));
        let word = word.and_then(|word| word.try_into().ok());
        let missing = || io::Error::other("an interface without statistics");
        let now = u64::from_ne_bytes(word.ok_or_else(missing)?);
        Ok(now.saturating_sub(self.before))
    }
}
