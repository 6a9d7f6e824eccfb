//! TCP and UDP packets by description: what a driver with offloads sends, and what a receiver
//! without must see in its place. Written byte by byte, and slow.
#![allow(
    clippy::unwrap_used,
    reason = "a test stops where a number is too large"
)]

/// TCP flags.
pub const FIN: u8 = 0x01;
/// See [`FIN`].
pub const PSH: u8 = 0x08;
/// See [`FIN`].
pub const ACK: u8 = 0x10;
/// See [`FIN`].
pub const ECE: u8 = 0x40;
/// See [`FIN`].
pub const CWR: u8 = 0x80;

/// A packet in an Ethernet frame.
#[derive(Debug, Clone)]
pub struct Packet {
    /// IPv6, not IPv4.
    pub v6: bool,
    /// UDP, not TCP.
    pub udp: bool,
    /// VLAN tags.
    pub tags: Vec<u16>,
    /// Words of four bytes of IPv4 options; any at all: an extension header of IPv6.
    pub ip_options: u8,
    /// Words of four bytes of TCP options.
    pub tcp_options: u8,
    /// IPv4 identification.
    pub id: u16,
    /// TCP sequence number.
    pub seq: u32,
    /// TCP flags.
    pub flags: u8,
    /// What it carries.
    pub payload: Vec<u8>,
}

impl Packet {
    /// Without tags and options, with `bytes` bytes.
    pub fn new(v6: bool, udp: bool, bytes: usize) -> Packet {
        Packet {
            v6,
            udp,
            tags: Vec::new(),
            ip_options: 0,
            tcp_options: 0,
            id: 0xfffe,
            seq: 0xffff_fc00,
            flags: ACK,
            payload: (0..bytes)
                .map(|at| (at * 7 + at / 251).to_le_bytes()[0])
                .collect(),
        }
    }

    /// Where the IP header begins.
    pub fn l3(&self) -> usize {
        14 + 4 * self.tags.len()
    }

    /// Where the transport's header begins.
    pub fn l4(&self) -> usize {
        let ip = match (self.v6, self.ip_options) {
            (false, words) => 20 + 4 * usize::from(words),
            (true, 0) => 40,
            (true, _) => 48,
        };
        self.l3() + ip
    }

    /// Bytes of all headers.
    pub fn headers(&self) -> usize {
        let transport = if self.udp {
            8
        } else {
            20 + 4 * usize::from(self.tcp_options)
        };
        self.l4() + transport
    }

    /// Where the checksum is, from `l4` on.
    pub fn csum_offset(&self) -> usize {
        if self.udp { 6 } else { 16 }
    }

    /// The virtio-net header with which a driver asks for the checksum, and for segments of
    /// `gso_size` bytes (0: for none).
    pub fn vnet(&self, gso_size: u16, ecn: bool) -> [u8; 12] {
        let kind = match (gso_size, self.udp, self.v6) {
            (0, ..) => 0,
            (_, true, _) => 5,
            (_, _, false) => 1,
            (_, _, true) => 4,
        };
        let mut out = [0; 12];
        out[0] = 1;
        out[1] = kind | if ecn { 0x80 } else { 0 };
        if gso_size > 0 {
            out[2..4].copy_from_slice(&le(self.headers()));
        }
        out[4..6].copy_from_slice(&gso_size.to_le_bytes());
        out[6..8].copy_from_slice(&le(self.l4()));
        out[8..10].copy_from_slice(&le(self.csum_offset()));
        out
    }

    /// As it stands on the cable.
    pub fn whole(&self) -> Vec<u8> {
        let (mut bytes, pseudo) = self.without_checksum();
        let sum = !add(pseudo, &bytes[self.l4()..]);
        let sum = if sum == 0 && self.udp { 0xffff } else { sum };
        let at = self.l4() + self.csum_offset();
        bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// As a driver writes it that leaves the checksum to the device: the sum of the pseudo-header
    /// in its place.
    pub fn unfinished(&self) -> Vec<u8> {
        let (mut bytes, pseudo) = self.without_checksum();
        let at = self.l4() + self.csum_offset();
        bytes[at..at + 2].copy_from_slice(&pseudo.to_be_bytes());
        bytes
    }

    /// What becomes of it when it is cut after every `size` bytes.
    pub fn cut(&self, size: usize) -> Vec<Vec<u8>> {
        let chunks: Vec<&[u8]> = match self.payload.len() {
            0 => vec![&[]],
            _ => self.payload.chunks(size).collect(),
        };
        let mut out = Vec::new();
        for (index, chunk) in chunks.iter().enumerate() {
            let mut one = self.clone();
            one.payload = chunk.to_vec();
            for _ in 0..index {
                one.id = one.id.wrapping_add(1);
                one.seq = one.seq.wrapping_add(u32::try_from(size).unwrap());
            }
            if index > 0 {
                one.flags &= !CWR;
            }
            if index + 1 < chunks.len() {
                one.flags &= !(FIN | PSH);
            }
            out.push(one.whole());
        }
        out
    }

    /// All bytes, and the sum of the pseudo-header.
    fn without_checksum(&self) -> (Vec<u8>, u16) {
        let mut out = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1];
        for tag in &self.tags {
            out.extend([0x81, 0]);
            out.extend(tag.to_be_bytes());
        }
        let protocol = if self.udp { 17 } else { 6 };
        let carried = be(self.headers() - self.l4() + self.payload.len());
        let mut pseudo = 0;
        if self.v6 {
            out.extend([0x86, 0xdd, 0x60, 1, 2, 3]);
            out.extend(be(self.headers() - self.l3() - 40 + self.payload.len()));
            out.extend([if self.ip_options > 0 { 0 } else { protocol }, 64]);
            let addresses: Vec<u8> = (0..32u8).map(|at| 0xfd ^ at.wrapping_mul(37)).collect();
            pseudo = add(pseudo, &addresses);
            out.extend(addresses);
            if self.ip_options > 0 {
                // Hop by hop: a router alert would stand here; padding.
                out.extend([protocol, 0, 1, 4, 0, 0, 0, 0]);
            }
        } else {
            out.extend([8, 0, 0x45 + self.ip_options, 2]);
            out.extend(be(self.headers() - self.l3() + self.payload.len()));
            out.extend(self.id.to_be_bytes());
            out.extend([0x40, 0, 64, protocol, 0, 0, 10, 1, 2, 3, 10, 4, 250, 255]);
            // No operation, again and again.
            out.extend((0..4 * self.ip_options).map(|_| 1));
            pseudo = add(pseudo, &out[self.l3() + 12..self.l3() + 20]);
            let sum = !add(0, &out[self.l3()..]);
            let at = self.l3() + 10;
            out[at..at + 2].copy_from_slice(&sum.to_be_bytes());
        }
        pseudo = add(pseudo, &[0, protocol]);
        pseudo = add(pseudo, &carried);
        out.extend([0x30, 0x39, 0x14, 0x51]);
        if self.udp {
            out.extend(carried);
            out.extend([0, 0]);
        } else {
            out.extend(self.seq.to_be_bytes());
            out.extend([1, 2, 3, 4, (5 + self.tcp_options) << 4, self.flags]);
            out.extend([0x20, 0, 0, 0, 0, 0]);
            out.extend((0..4 * self.tcp_options).map(|_| 1));
        }
        out.extend(&self.payload);
        (out, pseudo)
    }
}

/// What a receiver makes of `frame`, which must be whole: its payload, lengths and checksums
/// checked as a receiver does.
///
/// # Panics
/// When anything is wrong.
pub fn receive(frame: &[u8]) -> Vec<u8> {
    let word = |at: usize| usize::from(frame[at]) * 256 + usize::from(frame[at + 1]);
    let mut l3 = 14;
    while word(l3 - 2) == 0x8100 {
        l3 += 4;
    }
    let (protocol, l4, addresses) = match word(l3 - 2) {
        0x0800 => {
            let l4 = l3 + usize::from(frame[l3] & 15) * 4;
            assert_eq!(word(l3 + 2), frame.len() - l3, "IPv4 length");
            assert_eq!(rest(&[&frame[l3..l4]]), 0, "IPv4 checksum");
            (frame[l3 + 9], l4, &frame[l3 + 12..l3 + 20])
        }
        0x86dd => {
            assert_eq!(word(l3 + 4), frame.len() - l3 - 40, "IPv6 length");
            let (protocol, l4) = match frame[l3 + 6] {
                0 => (frame[l3 + 40], l3 + 48),
                protocol => (protocol, l3 + 40),
            };
            (protocol, l4, &frame[l3 + 8..l3 + 40])
        }
        other => panic!("type {other:#x}"),
    };
    let length = be(frame.len() - l4);
    let sum = rest(&[addresses, &[0, protocol], &length, &frame[l4..]]);
    assert_eq!(sum, 0, "checksum of protocol {protocol}");
    let payload = match protocol {
        6 => l4 + usize::from(frame[l4 + 12] >> 4) * 4,
        17 => {
            assert_eq!(word(l4 + 4), frame.len() - l4, "UDP length");
            assert_ne!(word(l4 + 6), 0, "UDP has a checksum");
            l4 + 8
        }
        other => panic!("protocol {other}"),
    };
    frame[payload..].to_vec()
}

/// Ones' complement sum, a byte at a time.
fn add(start: u16, bytes: &[u8]) -> u16 {
    let mut sum = u32::from(start);
    for (at, &byte) in bytes.iter().enumerate() {
        sum += u32::from(byte) << if at % 2 == 0 { 8 } else { 0 };
        if sum > 0xffff {
            sum -= 0xffff;
        }
    }
    u16::try_from(sum).unwrap()
}

/// Another way to the same: the bytes as one large number, modulo 65,535.
fn rest(parts: &[&[u8]]) -> u64 {
    let mut number = 0;
    for part in parts {
        for byte in *part {
            number = (number * 256 + u64::from(*byte)) % 65535;
        }
        if part.len() % 2 == 1 {
            number = number * 256 % 65535;
        }
    }
    number
}

fn be(value: usize) -> [u8; 2] {
    u16::try_from(value).unwrap().to_be_bytes()
}

fn le(value: usize) -> [u8; 2] {
    u16::try_from(value).unwrap().to_le_bytes()
}
