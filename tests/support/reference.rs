//! A disk that does what VIRTIO 1.3 §5.2.6 says, in a page of code over memory: what ours is
//! compared with. Behind which queue it stands is for its users to say.

use std::ops::{Deref, Range};

use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemory};

pub use super::virtio_blk::{DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES};

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn word(bytes: &[u8], at: usize) -> u32 {
    let bytes = bytes[at..at + 4].try_into();
    u32::from_le_bytes(bytes.expect("four of them"))
}

fn word64(bytes: &[u8], at: usize) -> u64 {
    let bytes = bytes[at..at + 8].try_into();
    u64::from_le_bytes(bytes.expect("eight of them"))
}

/// The disk.
#[derive(Debug, Clone)]
pub struct ReferenceDisk {
    pub bytes: Vec<u8>,
    /// Bytes of a block.
    pub block: u64,
    pub read_only: bool,
    /// What is discarded reads as zeros; else a discard does nothing.
    pub discard_zeroes: bool,
    pub serial: [u8; 20],
    /// Ranges of a request at most.
    pub ranges_max: usize,
}

impl ReferenceDisk {
    /// The bytes of the disk that a request is about, if it has that many whole blocks there.
    fn range(&self, sector: u64, bytes: usize) -> Option<Range<usize>> {
        let (start, bytes) = (u128::from(sector) * 512, bytes as u128);
        let block = u128::from(self.block);
        let whole = start.is_multiple_of(block) && bytes.is_multiple_of(block);
        let end = usize::try_from(start + bytes).ok()?;
        (whole && end <= self.bytes.len()).then(|| end - bytes as usize..end)
    }

    /// Checks all ranges, then does what is to be done with them.
    fn ranges(&mut self, kind: u32, data: &[u8]) -> u8 {
        let whole = data.len().is_multiple_of(16) && !data.is_empty();
        if self.read_only || !whole || data.len() > self.ranges_max * 16 {
            return IOERR;
        }
        let flags = if kind == DISCARD { 0 } else { 1 };
        if data.chunks(16).any(|range| word(range, 12) & !flags != 0) {
            return UNSUPP;
        }
        let mut found = Vec::new();
        for range in data.chunks(16) {
            let sector = word64(range, 0);
            let bytes = word(range, 8) as usize * 512;
            match self.range(sector, bytes) {
                Some(range) => found.push(range),
                None => return IOERR,
            }
        }
        if kind == WRITE_ZEROES || self.discard_zeroes {
            found
                .into_iter()
                .for_each(|range| self.bytes[range].fill(0));
        }
        OK
    }

    /// Carries a request out on bytes that were read. What is to be written from the start of the
    /// writable bytes, if anything, and the status.
    fn serve(&mut self, readable: &[u8], room: usize) -> (Option<Vec<u8>>, u8) {
        let kind = word(readable, 0);
        let sector = word64(readable, 8);
        let data = &readable[16..];
        match kind {
            IN => match self.range(sector, room) {
                Some(range) => (Some(self.bytes[range].to_vec()), OK),
                None => (Some(vec![0; room]), IOERR),
            },
            OUT => match self.range(sector, data.len()) {
                Some(range) if !self.read_only => {
                    self.bytes[range].copy_from_slice(data);
                    (None, OK)
                }
                _ => (Some(vec![0; room]), IOERR),
            },
            DISCARD | WRITE_ZEROES => match self.ranges(kind, data) {
                OK => (None, OK),
                status => (Some(vec![0; room]), status),
            },
            FLUSH => (None, OK),
            GET_ID => (Some(self.serial[..room.min(20)].to_vec()), OK),
            _ => (Some(vec![0; room]), UNSUPP),
        }
    }

    /// The used length of a chain, after its bytes were written.
    pub fn answer<M>(&mut self, memory: &M::Target, chain: DescriptorChain<M>) -> u32
    where
        M: Deref,
        M::Target: GuestMemory,
    {
        let (mut readable, mut writable) = (Vec::new(), Vec::new());
        for desc in chain {
            let bytes = (0..u64::from(desc.len())).map(|at| desc.addr().0 + at);
            if desc.is_write_only() {
                writable.extend(bytes);
            } else {
                let mut data = vec![0; desc.len() as usize];
                let read = memory.read_slice(&mut data, desc.addr());
                read.expect("it is in memory");
                readable.extend(data);
            }
        }
        let Some((status_at, places)) = writable.split_last() else {
            return 0;
        };
        if readable.len() < 16 {
            return 0;
        }
        let (told, status) = self.serve(&readable, places.len());
        let told = told.unwrap_or_default();
        for (byte, place) in told.iter().zip(places) {
            let written = memory.write_obj(*byte, GuestAddress(*place));
            written.expect("it is in memory");
        }
        let written = memory.write_obj(status, GuestAddress(*status_at));
        written.expect("it is in memory");
        // `len` counts what was written without a gap (VIRTIO 1.3 §2.7.8.2): the status byte
        // belongs to it when there is none before it.
        let gapless = told.len() == places.len();
        u32::try_from(told.len()).expect("a short request") + u32::from(gapless)
    }
}
