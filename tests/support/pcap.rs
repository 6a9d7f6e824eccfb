//! Capture files, and frames to be in them.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use pcap_file::pcap::{PcapPacket, PcapReader, PcapWriter};

/// Numbers that look random and are the same in every run (xorshift64).
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A frame with Ethernet addresses and type, so that every tool can show it.
    pub fn frame(&mut self, shortest: u64, longest: u64) -> Vec<u8> {
        let length = shortest + self.next() % (longest - shortest + 1);
        let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 0x88, 0xb5];
        frame.resize_with(usize::try_from(length).expect("64 bits"), || {
            self.next().to_le_bytes()[0]
        });
        frame
    }
}

/// Writes a capture file.
pub fn write_pcap(file: &Path, frames: &[Vec<u8>]) {
    let mut writer = PcapWriter::new(File::create(file).expect("a new file")).expect("a head");
    for frame in frames {
        let length = u32::try_from(frame.len()).expect("a frame's length");
        let packet = PcapPacket::new(Duration::ZERO, length, frame);
        writer.write_packet(&packet).expect("room on disk");
    }
}

/// The frames of a capture file.
pub fn read_pcap(file: &Path) -> Vec<Vec<u8>> {
    let mut reader = PcapReader::new(File::open(file).expect("a capture file")).expect("a head");
    let mut frames = Vec::new();
    while let Some(packet) = reader.next_packet() {
        frames.push(packet.expect("a whole frame").data.into_owned());
    }
    frames
}
