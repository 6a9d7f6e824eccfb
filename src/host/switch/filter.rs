//! Who may send at a port: addresses that are its own, against spoofing.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

const TYPE_IPV4: [u8; 2] = [0x08, 0x00];
const TYPE_ARP: [u8; 2] = [0x08, 0x06];
const TYPE_IPV6: [u8; 2] = [0x86, 0xdd];

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

    #[cold]
    fn allows_ip(&self, from: [u8; 6], rest: &[u8]) -> bool {
        let Some((kind, packet)) = rest.split_first_chunk::<2>() else {
            return false;
        };
        match *kind {
            TYPE_IPV4 => v4(packet, 12).is_some_and(|ip| self.has_v4(ip)),
            // Sender's hardware and protocol address (RFC 826, Ethernet and IPv4).
            TYPE_ARP => {
                packet.get(8..14) == Some(&from) && v4(packet, 14).is_some_and(|ip| self.has_v4(ip))
            }
            TYPE_IPV6 => {
                let source = packet.get(8..24).and_then(|bytes| bytes.try_into().ok());
                source.is_some_and(|bytes: [u8; 16]| self.has_v6(Ipv6Addr::from(bytes)))
            }
            _ => false,
        }
    }

    /// A station that has no address yet may ask for one.
    fn has_v4(&self, ip: Ipv4Addr) -> bool {
        ip.is_unspecified() || self.ip.contains(&IpAddr::V4(ip))
    }

    fn has_v6(&self, ip: Ipv6Addr) -> bool {
        ip.is_unspecified() || self.ip.contains(&IpAddr::V6(ip))
    }
}

fn v4(packet: &[u8], at: usize) -> Option<Ipv4Addr> {
    let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
    Some(Ipv4Addr::from(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: [u8; 6] = [2, 0, 0, 0, 0, 1];

    fn packet(kind: [u8; 2], source_at: usize, source: &[u8]) -> Vec<u8> {
        let mut packet = vec![0; 60];
        packet[..2].copy_from_slice(&kind);
        packet[2 + source_at..2 + source_at + source.len()].copy_from_slice(source);
        packet
    }

    #[test]
    fn only_own_addresses_pass() {
        let v6: Ipv6Addr = "fd00::7".parse().unwrap();
        let filter = Filter {
            mac: vec![OWN],
            ip: vec!["10.0.0.7".parse().unwrap(), IpAddr::V6(v6)],
        };
        let ipv4 = |last| packet(TYPE_IPV4, 12, &[10, 0, 0, last]);
        assert!(filter.allows(OWN, &ipv4(7)));
        assert!(!filter.allows(OWN, &ipv4(8)));
        assert!(!filter.allows([2, 0, 0, 0, 0, 2], &ipv4(7)));
        assert!(filter.allows(OWN, &packet(TYPE_IPV4, 12, &[0; 4])), "DHCP");
        assert!(filter.allows(OWN, &packet(TYPE_IPV6, 8, &v6.octets())));
        assert!(!filter.allows(OWN, &packet(TYPE_IPV6, 8, &[1; 16])));
        assert!(!filter.allows(OWN, &[0x88, 0xcc, 0, 0]), "LLDP is not IP");
        assert!(!filter.allows(OWN, &ipv4(7)[..10]), "cut short");
        let mut arp = packet(TYPE_ARP, 14, &[10, 0, 0, 7]);
        assert!(!filter.allows(OWN, &arp), "another's hardware address");
        arp[10..16].copy_from_slice(&OWN);
        assert!(filter.allows(OWN, &arp));
        arp[19] = 8;
        assert!(!filter.allows(OWN, &arp));
    }

    #[test]
    fn without_lists_all_pass() {
        assert!(Filter::default().allows([9; 6], &[]));
    }
}
