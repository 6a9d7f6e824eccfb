//! A virtqueue whose driver writes what it likes, when it likes: also between two of our reads; or
//! one that is honest, and both sides do what the model says.

use std::cell::Cell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::sync::Arc;

use crate::memory::{GuestRam, Segment, Segments};
use crate::ring::{
    Areas, Chain, ChainId, ChainQueue, Popped, RingConfig, RingFault, RingFormat, Single,
    Virtqueue, VringBase,
};

use super::super::driver::{
    Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
};
use super::super::session::{self, Script, Session};
use super::Bytes;

/// What no driver of this ring may reach; the ring; indirect tables; buffers over the seam of two
/// regions.
pub(super) const RING: u64 = 0x1_0000;
pub(super) const SEAM: u64 = 0x3_0000;
const RAM: u64 = 0x4_0000;
/// More than a chain may hold, for lengths that add up to too much. Nobody writes there.
pub(super) const VAST: u64 = 1 << 40;
pub(super) const VAST_BYTES: u64 = 3 << 30;
/// What one pop may read: the longest chain in the ring, and the longest table behind it.
const SEGMENTS_OF_A_CHAIN: usize = 2 * (32768 + 1024);
/// Rings larger than this are built but not played with: a lap must fit an input.
const PLAYED_SIZE_MAX: u16 = 64;

/// How the ring is set up: the first bytes of an input.
#[derive(Debug, Clone, Copy, Default)]
pub struct RingInput {
    /// Number of descriptors.
    pub size: u16,
    /// The 32-bit value of SET_VRING_BASE.
    pub base: u32,
    /// Bit 0: EVENT_IDX, 1: INDIRECT_DESC, 2: IN_ORDER, 3: a queue with readable buffers only, 4:
    /// areas that are too small, 5: room for three segments only, 6: what follows is a session of
    /// an honest driver.
    pub flags: u8,
}

impl RingInput {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = self.size.to_le_bytes().to_vec();
        bytes.extend(self.base.to_le_bytes());
        bytes.push(self.flags);
        bytes
    }

    fn decode(bytes: &mut Bytes<'_>) -> RingInput {
        RingInput {
            size: bytes.u16(),
            base: bytes.u32(),
            flags: bytes.u8(),
        }
    }

    fn has(&self, bit: u8) -> bool {
        self.flags & (1 << bit) != 0
    }
}

/// What happens next.
#[derive(Debug, Clone, Copy)]
pub enum Op {
    /// The driver writes a word at this offset from the start of the ring.
    Write(u32, u64),
    /// As `Write`, so many reads of the device later.
    WriteLater(u8, u32, u64),
    /// The device pops a chain.
    Pop,
    /// It pops simple chains: so many, writable or not.
    PopSingles(u8, bool),
    /// It uses the chain that it has held for the longest, with this length.
    Use(u32),
    /// It gives the chain that it popped last back.
    Unpop,
    /// It publishes.
    Publish,
    /// It turns kicks on or off.
    Kicks(bool),
    /// It looks how many chains there are.
    Backlog(u16),
    /// It can't access a buffer.
    Latch,
}

impl Op {
    /// The bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut write = |kind: u8, at: u32, word: u64| {
            bytes.push(kind);
            bytes.extend(at.to_le_bytes());
            bytes.extend(word.to_le_bytes());
        };
        match *self {
            Op::Write(at, word) => write(0, at, word),
            Op::WriteLater(reads, at, word) => {
                write(1, at, word);
                bytes.push(reads);
            }
            Op::Pop => bytes.push(2),
            Op::PopSingles(count, writable) => bytes.extend([3, count, u8::from(writable)]),
            Op::Use(written) => {
                bytes.push(4);
                bytes.extend(written.to_le_bytes());
            }
            Op::Unpop => bytes.push(5),
            Op::Publish => bytes.push(6),
            Op::Kicks(on) => bytes.extend([7, u8::from(on)]),
            Op::Backlog(want) => {
                bytes.push(8);
                bytes.extend(want.to_le_bytes());
            }
            Op::Latch => bytes.push(9),
        }
        bytes
    }

    fn decode(bytes: &mut Bytes<'_>) -> Op {
        match bytes.u8() % 10 {
            0 => Op::Write(bytes.u32(), bytes.u64()),
            1 => {
                let (at, word) = (bytes.u32(), bytes.u64());
                Op::WriteLater(bytes.u8(), at, word)
            }
            2 => Op::Pop,
            3 => Op::PopSingles(bytes.u8(), bytes.u8() & 1 == 1),
            4 => Op::Use(bytes.u32()),
            5 => Op::Unpop,
            6 => Op::Publish,
            7 => Op::Kicks(bytes.u8() & 1 == 1),
            8 => Op::Backlog(bytes.u16()),
            _ => Op::Latch,
        }
    }
}

/// Plays `data` to a split ring. Returns how the ring broke, if it did.
///
/// # Panics
/// When something does not hold.
pub fn split_ring(data: &[u8]) -> Option<RingFault> {
    play::<SplitDriver>(data)
}

/// As [`split_ring`], on a packed ring.
///
/// # Panics
/// When something does not hold.
pub fn packed_ring(data: &[u8]) -> Option<RingFault> {
    play::<PackedDriver>(data)
}

fn play<D: Driver>(data: &[u8]) -> Option<RingFault> {
    let mut bytes = Bytes(data);
    let input = RingInput::decode(&mut bytes);
    if input.has(6) {
        thread_local!(static RAM_OF_THREAD: Arc<GuestRam> = session::memory());
        let ram = RAM_OF_THREAD.with(Arc::clone);
        session::clear(&ram);
        let script = Script::decode(D::Format::PACKED, &mut bytes);
        Session::<D>::within(ram, &script).play(&script.steps);
        return None;
    }
    let mut rig = match Rig::<D::Format>::new(&input) {
        Ok(rig) => rig,
        Err(fault) => return Some(fault),
    };
    let before = read_guest(&rig.ram, 0, RING as usize);
    while !bytes.is_empty() {
        rig.step(Op::decode(&mut bytes));
        rig.check();
    }
    rig.end();
    assert!(
        before == read_guest(&rig.ram, 0, RING as usize),
        "memory that no chain names was written"
    );
    rig.vq.fault()
}

/// Guest memory, zeroed. Mapping it anew for each input would take most of the time.
fn memory() -> Arc<GuestRam> {
    thread_local! {
        static RAM_OF_THREAD: Arc<GuestRam> = GuestRam::for_test(&[
            (0, SEAM),
            (SEAM, RAM - SEAM),
            (VAST, VAST_BYTES),
        ]);
    }
    let ram = RAM_OF_THREAD.with(Arc::clone);
    write_guest(&ram, 0, &[0; SEAM as usize]);
    write_guest(&ram, SEAM, &[0; (RAM - SEAM) as usize]);
    ram
}

/// A ring under a hostile driver.
struct Rig<F: RingFormat> {
    ram: Arc<GuestRam>,
    vq: Virtqueue<F>,
    /// A second handle on the ring, to look at what was written.
    areas: Areas,
    size: u16,
    segments: Segments,
    /// Chains popped and not used, oldest first.
    held: VecDeque<ChainId>,
    /// Used and not published.
    staged: VecDeque<(u16, u32)>,
    /// The driver wrote since the last publish: what is in the ring need not be ours.
    disturbed: bool,
    /// A write that was put off has happened.
    meddled: Rc<Cell<bool>>,
    /// Used elements so far, for the split index.
    used: u16,
    in_order: bool,
}

impl<F: RingFormat> Rig<F> {
    fn new(input: &RingInput) -> Result<Rig<F>, RingFault> {
        let ram = memory();
        let base = VringBase::from_u32(F::PACKED, input.base);
        let config = RingConfig {
            size: input.size,
            event_idx: input.has(0),
            indirect: input.has(1),
            in_order: input.has(2),
            readable_only: input.has(3),
            base,
        };
        // A size that is impossible has no memory of its own; the ring must refuse it.
        let sized = input.size.clamp(1, PLAYED_SIZE_MAX);
        let small = if input.has(4) {
            (sized / 2).max(1)
        } else {
            sized
        };
        let areas = RingMemory::new::<F>(&ram, RING, small).areas::<F>();
        let vq = Virtqueue::new(Arc::clone(&ram), areas, &config)?;
        let room = if input.has(5) { 3 } else { 4096 };
        Ok(Rig {
            vq,
            areas: RingMemory::new::<F>(&ram, RING, sized).areas::<F>(),
            size: input.size,
            segments: Segments::with_capacity(room),
            held: VecDeque::new(),
            staged: VecDeque::new(),
            disturbed: false,
            meddled: Rc::default(),
            used: 0,
            in_order: input.has(2),
            ram,
        })
        .map(|mut rig: Rig<F>| {
            rig.used = rig.vq.base().used;
            rig
        })
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Write(at, word) => self.write(at, word),
            Op::WriteLater(reads, at, word) => self.write_later(reads, at, word),
            Op::Pop => self.pop(),
            Op::PopSingles(count, writable) => self.pop_singles(count, writable),
            Op::Use(written) => self.use_oldest(written),
            Op::Unpop => {
                // Chains are given back before any popped earlier is used.
                if let Some(id) = self.held.pop_back() {
                    self.vq.unpop(id);
                }
            }
            Op::Publish => self.publish(),
            Op::Kicks(on) => {
                let work = self.vq.set_kicks(on);
                assert!(
                    !work || (on && self.vq.fault().is_none()),
                    "work unasked for"
                );
            }
            Op::Backlog(want) => {
                let fault = self.vq.fault();
                let backlog = self.vq.backlog(want);
                // A driver that gives more than it may is found out by the pop; what was given back
                // comes on top until then.
                assert!(backlog <= (2 * self.size).max(want), "backlog");
                assert!(fault.is_none() || backlog == 0, "a broken ring has none");
            }
            Op::Latch => self.vq.latch(RingFault::Memory),
        }
    }

    /// Where in guest memory an offset is: from the ring on.
    fn place(at: u32) -> u64 {
        RING + u64::from(at) % (RAM - RING - 8)
    }

    fn write(&mut self, at: u32, word: u64) {
        write_guest(&self.ram, Self::place(at), &word.to_le_bytes());
        self.disturbed = true;
    }

    /// Where the build has the hook, the write comes between two reads; elsewhere at once.
    fn write_later(&mut self, reads: u8, at: u32, word: u64) {
        self.disturbed = true;
        #[cfg(fuzzing)]
        {
            let (ram, meddled) = (Arc::clone(&self.ram), Rc::clone(&self.meddled));
            let mut left = reads;
            crate::memory::meddle::between_reads(Box::new(move || {
                if left == 0 {
                    write_guest(&ram, Self::place(at), &word.to_le_bytes());
                    meddled.set(true);
                    return false;
                }
                left -= 1;
                true
            }));
        }
        #[cfg(not(fuzzing))]
        {
            let _ = reads;
            self.write(at, word);
        }
    }

    fn pop(&mut self) {
        self.segments.clear();
        let fault = self.vq.fault();
        match self.vq.pop(&mut self.segments) {
            Ok(Popped::Chain(chain)) => {
                assert_eq!(fault, None, "a broken ring gives out a chain");
                self.check_chain(&chain);
                self.held.push_back(chain.id);
            }
            Ok(Popped::Empty | Popped::Wait) => {
                assert!(self.segments.is_empty(), "no chain, no segments");
            }
            Err(found) => {
                assert!(
                    fault.is_none_or(|fault| fault == found),
                    "the first one stays"
                );
                assert_eq!(self.vq.fault(), Some(found));
                assert!(self.segments.is_empty(), "a fault leaves nothing behind");
            }
        }
    }

    fn check_chain(&self, chain: &Chain) {
        let bytes = |list: &[Segment]| list.iter().map(Segment::len).sum::<usize>();
        let (read, write) = (
            chain.readable(&self.segments),
            chain.writable(&self.segments),
        );
        assert_eq!(read.len() + write.len(), self.segments.len());
        assert_eq!(bytes(read), chain.readable_bytes as usize);
        assert_eq!(bytes(write), chain.writable_bytes as usize);
        assert!(self.segments.len() <= SEGMENTS_OF_A_CHAIN);
        for segment in self.segments.as_slice() {
            self.check_inside(segment);
        }
    }

    /// All bytes of a segment are guest memory.
    fn check_inside(&self, segment: &Segment) {
        assert!(!segment.is_empty());
        let first = self.ram.gpa_of(&segment.take(1)).expect("its first byte");
        let last = self.ram.gpa_of(&segment.skip(segment.len() - 1));
        assert_eq!(
            last,
            Some(first + segment.len() as u64 - 1),
            "its last byte"
        );
    }

    fn pop_singles(&mut self, count: u8, writable: bool) {
        let fault = self.vq.fault();
        let mut singles: Vec<_> = (0..count % 80).map(|_| Single::EMPTY).collect();
        let taken = self.vq.pop_singles(writable, &mut singles);
        assert!(
            fault.is_none() || taken == 0,
            "a broken ring gives out chains"
        );
        for single in &mut singles[..taken] {
            self.check_inside(&single.segment);
            self.held.push_back(single.take_id());
        }
    }

    fn use_oldest(&mut self, written: u32) {
        if let Some(id) = self.held.pop_front() {
            self.staged.push_back((id.id(), written));
            if written.is_multiple_of(3) && id.slots() == 1 {
                let singles = [Single::new(id, Segment::EMPTY)];
                self.vq
                    .put_used_singles(&singles, core::iter::once(written));
            } else {
                self.vq.put_used(id, written, &[]);
            }
        }
    }

    fn publish(&mut self) {
        let staged = core::mem::take(&mut self.staged);
        assert_eq!(self.vq.staged() as usize, staged.len());
        self.vq.publish();
        let disturbed = core::mem::take(&mut self.disturbed) | self.meddled.take();
        if F::PACKED || disturbed || staged.is_empty() {
            // What a packed ring shows is checked by the models, whose driver reads it.
            self.used = self.used.wrapping_add(staged.len() as u16);
            return;
        }
        let places = (0..).map(|ahead| self.used.wrapping_add(ahead));
        let elements: Vec<_> = places.zip(&staged).map(|(at, used)| (at, *used)).collect();
        self.used = self.used.wrapping_add(staged.len() as u16);
        // One element stands for a batch of chains that nothing was written to: in the place of the
        // first, with the head of the last (VIRTIO 1.3 §2.7.9).
        let in_order = self.in_order;
        let batches = elements.chunk_by(|one, next| in_order && one.1.1 == 0 && next.1.1 == 0);
        for batch in batches {
            let place = batch[0].0;
            let (id, written) = batch[batch.len() - 1].1;
            let at = 4 + 8 * usize::from(place % self.size);
            let shown = (
                self.areas.device.load32(at),
                self.areas.device.load32(at + 4),
            );
            // A write that was put off may come with any read, and these are some.
            if self.meddled.get() {
                continue;
            }
            // A lap later the same place holds a later element.
            if staged.len() <= usize::from(self.size) {
                assert_eq!(shown, (u32::from(id), written), "a used element");
            }
        }
        let index = self.areas.device.load16(2);
        if !self.meddled.get() {
            assert_eq!(index, self.used, "the index moves by all chains");
        }
    }

    fn check(&self) {
        assert!(self.vq.in_flight() <= u32::from(self.size), "in flight");
        assert!(self.held.len() <= usize::from(self.size), "held");
    }

    /// Whatever happened: what was taken can be given back, and nothing is left.
    fn end(&mut self) {
        #[cfg(fuzzing)]
        crate::memory::meddle::stop();
        while !self.held.is_empty() {
            self.use_oldest(if self.in_order { 0 } else { 1 });
        }
        self.disturbed = true;
        self.publish();
        assert_eq!((self.vq.in_flight(), self.vq.staged()), (0, 0));
    }
}
