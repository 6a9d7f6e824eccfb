//! A queue by script: chains as listed, and an eye on the order in which they come back.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::host::net::{Frame, FrameBurst, Verdict};
use crate::memory::{Access, GuestRam, Segment, Segments, copy};
use crate::ring::{Chain, ChainId, ChainQueue, Popped, RingFault, Single};

const RAM: u64 = 64 << 20;

/// One buffer: address, length, whether the device writes it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Buf {
    pub(super) gpa: u64,
    pub(super) len: u32,
    pub(super) write: bool,
}

/// What the device put in the used ring.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Used {
    pub(super) id: u16,
    pub(super) written: u32,
    /// Bytes of the writable segments that came with it.
    pub(super) writable: u32,
}

/// A queue and the memory of its guest. Chains must come back in the order in which they were
/// popped, as IN_ORDER asks.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) ram: Arc<GuestRam>,
    next_gpa: u64,
    size: u16,
    chains: Vec<Vec<Buf>>,
    /// Index of the next chain to pop.
    cursor: usize,
    in_flight: VecDeque<u16>,
    pub(super) used: Vec<Used>,
    /// The fault that stands behind the last chain.
    pub(super) fault: Option<RingFault>,
}

impl Script {
    pub(super) fn new(size: u16) -> Script {
        Script {
            ram: GuestRam::for_test(&[(0, RAM)]),
            next_gpa: 0,
            size,
            chains: Vec::new(),
            cursor: 0,
            in_flight: VecDeque::new(),
            used: Vec::new(),
            fault: None,
        }
    }

    /// Makes a chain available; returns its buffers.
    pub(super) fn offer(&mut self, lens: &[(u32, bool)]) -> Vec<Buf> {
        let chain: Vec<Buf> = lens
            .iter()
            .map(|&(len, write)| {
                let gpa = self.next_gpa;
                // A gap, so that writing past a buffer shows.
                self.next_gpa += u64::from(len) + 5;
                Buf { gpa, len, write }
            })
            .collect();
        assert!(self.next_gpa < RAM);
        self.chains.push(chain.clone());
        chain
    }

    /// A chain that the device writes.
    pub(super) fn offer_rx(&mut self, lens: &[u32]) -> Vec<Buf> {
        let lens: Vec<_> = lens.iter().map(|&len| (len, true)).collect();
        self.offer(&lens)
    }

    /// A chain with `bytes` cut at `cuts`, which may be in any order and repeat.
    pub(super) fn offer_tx(&mut self, bytes: &[u8], cuts: &[usize]) {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
        ends.push(bytes.len());
        ends.sort_unstable();
        let mut start = 0;
        let mut lens = Vec::new();
        for end in ends {
            lens.push((u32::try_from(end - start).unwrap(), false));
            start = end;
        }
        let chain = self.offer(&lens);
        assert_eq!(
            copy::write(self.segments(&chain).as_slice(), 0, bytes),
            bytes.len()
        );
    }

    pub(super) fn segments(&self, chain: &[Buf]) -> Segments {
        let mut segments = Segments::with_capacity(chain.len());
        for buf in chain {
            self.ram
                .translate(buf.gpa, buf.len, Access::Write, &mut segments)
                .unwrap();
        }
        segments
    }

    /// What chain `id` holds in its writable buffers.
    pub(super) fn written(&self, id: u16, bytes: usize) -> Vec<u8> {
        let chain = &self.chains[usize::from(id)];
        let writable: Vec<Buf> = chain.iter().copied().filter(|buf| buf.write).collect();
        let mut got = vec![0; bytes];
        assert_eq!(
            copy::read(self.segments(&writable).as_slice(), 0, &mut got),
            bytes
        );
        got
    }

    /// What the used chains from `first` on hold, up to the written lengths, put together.
    pub(super) fn received(&self, first: usize) -> Vec<u8> {
        let one = |used: &Used| self.written(used.id, used.written as usize);
        self.used[first..].iter().flat_map(one).collect()
    }

    pub(super) fn used_ids(&self) -> Vec<u16> {
        self.used.iter().map(|used| used.id).collect()
    }
}

impl ChainQueue for Script {
    fn pop_singles(&mut self, writable: bool, out: &mut [Single]) -> usize {
        let mut taken = 0;
        for place in out {
            match self.chains.get(self.cursor).map(Vec::as_slice) {
                Some([buf]) if buf.len > 0 && buf.write == writable => {}
                _ => break,
            }
            let mut segments = Segments::with_capacity(1);
            match self.pop(&mut segments) {
                Ok(Popped::Chain(chain)) => *place = Single::new(chain.id, segments.as_slice()[0]),
                other => panic!("a chain was there: {other:?}"),
            }
            taken += 1;
        }
        taken
    }

    fn put_used_singles(&mut self, singles: &[Single], written: impl Iterator<Item = u32>) {
        for (single, written) in singles.iter().zip(written) {
            let segments = [single.segment];
            let writable = if written > 0 { &segments[..] } else { &[] };
            self.put_used(ChainId::new(single.id().id(), 1), written, writable);
        }
    }

    fn pop(&mut self, segments: &mut Segments) -> Result<Popped, RingFault> {
        let Some(chain) = self.chains.get(self.cursor) else {
            return match self.fault {
                Some(fault) => Err(fault),
                None => Ok(Popped::Empty),
            };
        };
        assert!(
            self.in_flight.len() < usize::from(self.size),
            "more in flight than the ring has"
        );
        let first = segments.len();
        let (mut readable, mut bytes) = (first, [0, 0]);
        for buf in chain {
            self.ram
                .translate(buf.gpa, buf.len, Access::Write, segments)
                .unwrap();
            bytes[usize::from(buf.write)] += buf.len;
            if !buf.write {
                readable = segments.len();
            }
        }
        let id = u16::try_from(self.cursor).unwrap();
        self.in_flight.push_back(id);
        self.cursor += 1;
        let count = |from: usize, to: usize| u32::try_from(to - from).unwrap();
        Ok(Popped::Chain(Chain {
            id: ChainId::new(id, 1),
            first: u32::try_from(first).unwrap(),
            readable: count(first, readable),
            writable: count(readable, segments.len()),
            readable_bytes: bytes[0],
            writable_bytes: bytes[1],
        }))
    }

    fn unpop(&mut self, chain: ChainId) {
        assert_eq!(
            self.in_flight.pop_back(),
            Some(chain.id()),
            "not the last chain popped"
        );
        self.cursor -= 1;
    }

    fn put_used(&mut self, chain: ChainId, written: u32, writable: &[Segment]) {
        assert_eq!(self.in_flight.pop_front(), Some(chain.id()), "out of order");
        let bytes: usize = writable.iter().map(Segment::len).sum();
        let writable = u32::try_from(bytes).unwrap();
        self.used.push(Used {
            id: chain.id(),
            written,
            writable,
        });
    }

    fn size(&self) -> u16 {
        self.size
    }

    fn in_flight(&self) -> u32 {
        u32::try_from(self.in_flight.len()).unwrap()
    }
}

/// The verdicts of a burst.
pub(super) fn verdicts(burst: &FrameBurst) -> Vec<Verdict> {
    burst.frames.iter().map(|frame| frame.verdict).collect()
}

/// The payload of `frame`.
pub(super) fn payload(burst: &FrameBurst, frame: &Frame) -> Vec<u8> {
    let mut bytes = vec![0; frame.bytes as usize];
    assert_eq!(copy::read(burst.payload(frame), 0, &mut bytes), bytes.len());
    bytes
}

/// `len` bytes that differ from place to place and by `seed`.
pub(super) fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len)
        .map(|i| (i * 7 + i / 251).to_le_bytes()[0] ^ seed)
        .collect()
}
