//! Who may send at a port: addresses that are its own, against spoofing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];

/// Hardware and protocol type, and the lengths of their addresses.
const ARP_KINDS: [u8; 6] = [0, 1, 8, 0, 6, 4];
const ARP_REQUEST: [u8; 2] = [0, 1];
const UDP: u8 = 17;
/// From 68 to 67.
const DHCP_PORTS: [u8; 4] = [0, 68, 0, 67];

/// Headers of IPv6 that say what the next one is (RFC 8200).
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const AUTHENTICATION: u8 = 51;
const DESTINATION: u8 = 60;
const ICMPV6: u8 = 58;
/// Neighbour discovery (RFC 4861): messages, and options.
const ROUTER_SOLICITATION: u8 = 133;
const ROUTER_ADVERTISEMENT: u8 = 134;
const SOLICITATION: u8 = 135;
const ADVERTISEMENT: u8 = 136;
const REDIRECT: u8 = 137;
const SOURCE_LINK: u8 = 1;
const TARGET_LINK: u8 = 2;
/// Who listens to which groups (RFC 2710 and 3810): reports, and the end of it.
const MLD_REPORTS: [u8; 3] = [131, 132, 143];

/// The addresses that frames may claim to come from; empty lists allow all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// Ethernet addresses.
    pub mac: Vec<[u8; 6]>,
    /// IP addresses. Nothing but IP and ARP passes where there are any.
    pub ip: Vec<IpAddr>,
}

impl Filter {
    /// Whether all may pass.
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.mac.is_empty() && self.ip.is_empty()
    }

    /// Whether a frame from `from` may pass; `rest` is what follows the addresses and the tag, from
    /// the type on.
    #[inline]
    pub(super) fn allows(&self, from: [u8; 6], rest: &[u8]) -> bool {
        (self.mac.is_empty() || self.mac.contains(&from))
            && (self.ip.is_empty() || self.allows_ip(from, rest))
    }

    /// Whether the two bytes before `end`, counted as those of `rest`, are none that `allows` went
    /// by: a checksum may then be written there, whatever comes of it.
    pub(super) fn lets_be_written(&self, rest: &[u8], end: usize) -> bool {
        self.ip.is_empty() || lets_be_written(rest, end) == Some(true)
    }

    #[cold]
    fn allows_ip(&self, from: [u8; 6], rest: &[u8]) -> bool {
        let Some((kind, packet)) = rest.split_first_chunk::<2>() else {
            return false;
        };
        let allows = match *kind {
            TYPE_IPV4 => self.allows_v4(packet),
            TYPE_ARP => self.allows_arp(from, packet),
            TYPE_IPV6 => self.allows_v6(from, packet),
            _ => None,
        };
        allows == Some(true)
    }

    /// `None` here and below: what would have to be looked at is not there.
    fn allows_v4(&self, packet: &[u8]) -> Option<bool> {
        let source = v4(packet, 12)?;
        if !source.is_unspecified() {
            return Some(self.has(source));
        }
        // A station that has no address yet may ask for one (RFC 2131), in a whole datagram.
        let whole = u16::from_be_bytes(array(packet, 6)?) & 0x3fff == 0;
        let ports: [u8; 4] = array(packet, usize::from(packet[0] & 0xf) * 4)?;
        Some(whole && packet[9] == UDP && ports == DHCP_PORTS)
    }

    /// RFC 826 for Ethernet and IPv4: the sender's addresses are its own, or it asks whether one
    /// that may be its own is free (RFC 5227).
    fn allows_arp(&self, from: [u8; 6], packet: &[u8]) -> Option<bool> {
        if array(packet, 0)? != ARP_KINDS || array(packet, 8)? != from {
            return Some(false);
        }
        let (sender, target) = (v4(packet, 14)?, v4(packet, 24)?);
        let probes = array(packet, 6)? == ARP_REQUEST && self.has(target);
        Some(self.has(sender) || (sender.is_unspecified() && probes))
    }

    fn allows_v6(&self, from: [u8; 6], packet: &[u8]) -> Option<bool> {
        let source = Ipv6Addr::from(array::<16>(packet, 8)?);
        if !source.is_unspecified() && !self.has(source) {
            return Some(false);
        }
        let upper = Upper::find(packet)?;
        let kind = match upper.is_icmpv6 {
            true => Some(*packet.get(upper.at)?),
            false => None,
        };
        match kind {
            Some(ROUTER_ADVERTISEMENT | REDIRECT) => Some(false),
            // Behind another header nobody needs them, and few who guard a network find them.
            Some(ROUTER_SOLICITATION | SOLICITATION | ADVERTISEMENT) if upper.is_behind() => {
                Some(false)
            }
            Some(ROUTER_SOLICITATION) => own_link_options(from, packet, 48),
            Some(ADVERTISEMENT) if source.is_unspecified() => Some(false),
            Some(kind @ (SOLICITATION | ADVERTISEMENT)) => {
                let target = Ipv6Addr::from(array::<16>(packet, 48)?);
                // The question whether an address is free comes from none (RFC 4862).
                let is_own = kind == ADVERTISEMENT || source.is_unspecified();
                if is_own && !self.has(target) {
                    return Some(false);
                }
                own_link_options(from, packet, 64)
            }
            _ if !source.is_unspecified() => Some(true),
            // To be heard by groups, an address is not needed (RFC 3810).
            Some(kind) => Some(MLD_REPORTS.contains(&kind)),
            None => Some(false),
        }
    }

    fn has(&self, ip: impl Into<IpAddr>) -> bool {
        self.ip.contains(&ip.into())
    }
}

/// As [`Filter::lets_be_written`], of what a filter with IP addresses has allowed.
fn lets_be_written(rest: &[u8], end: usize) -> Option<bool> {
    let (kind, packet) = rest.split_first_chunk::<2>()?;
    let end = end.checked_sub(kind.len())?;
    match *kind {
        TYPE_IPV4 => {
            // They tell a question for an address.
            let ports = if v4(packet, 12)?.is_unspecified() {
                DHCP_PORTS.len()
            } else {
                0
            };
            // With the source, whatever the header says of its length.
            let header = (usize::from(packet[0] & 0xf) * 4).max(20);
            Some(end >= header + ports + 2)
        }
        TYPE_IPV6 => {
            let upper = Upper::find(packet)?;
            Some(match upper.is_icmpv6 {
                true => end == upper.at + 4,
                false => end >= upper.at + 2,
            })
        }
        _ => Some(false),
    }
}

/// What an IPv6 packet carries behind the headers that say how it goes.
struct Upper {
    /// Where the headers end.
    at: usize,
    /// Whether an ICMPv6 message begins there.
    is_icmpv6: bool,
}

impl Upper {
    /// Whether there are headers before it.
    fn is_behind(&self) -> bool {
        self.at > 40
    }

    /// `None` when the headers go on behind what there is.
    fn find(packet: &[u8]) -> Option<Upper> {
        let (mut next, mut at) = (*packet.get(6)?, 40);
        loop {
            let [following, length, high, low]: [u8; 4] = match next {
                HOP_BY_HOP | ROUTING | FRAGMENT | AUTHENTICATION | DESTINATION => {
                    array(packet, at)?
                }
                _ => {
                    return Some(Upper {
                        at,
                        is_icmpv6: next == ICMPV6,
                    });
                }
            };
            at += match next {
                // Not the first one: what it goes on with began in another.
                FRAGMENT if u16::from_be_bytes([high, low]) >> 3 > 0 => {
                    return Some(Upper {
                        at: at + 8,
                        is_icmpv6: false,
                    });
                }
                FRAGMENT => 8,
                AUTHENTICATION => (usize::from(length) + 2) * 4,
                _ => (usize::from(length) + 1) * 8,
            };
            next = following;
        }
    }
}

/// Whether the options from `at` on of a neighbour discovery message (RFC 4861, section 4.6) tell
/// no link-layer address but `from`.
fn own_link_options(from: [u8; 6], packet: &[u8], mut at: usize) -> Option<bool> {
    let end = 40 + usize::from(u16::from_be_bytes(array(packet, 4)?));
    while at < end {
        let [kind, units]: [u8; 2] = array(packet, at)?;
        if units == 0 {
            return Some(false);
        }
        if matches!(kind, SOURCE_LINK | TARGET_LINK)
            && (units != 1 || array(packet, at + 2)? != from)
        {
            return Some(false);
        }
        at += usize::from(units) * 8;
    }
    // An option that ends behind the packet, or behind what is looked at, is none.
    Some(at == end && packet.len() >= end)
}

/// The bytes of `packet` from `at` on.
fn array<const N: usize>(packet: &[u8], at: usize) -> Option<[u8; N]> {
    packet.get(at..at + N)?.try_into().ok()
}

fn v4(packet: &[u8], at: usize) -> Option<Ipv4Addr> {
    array::<4>(packet, at).map(Ipv4Addr::from)
}

#[cfg(test)]
mod tests;
