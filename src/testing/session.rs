//! A session on one ring, and the model that every answer of the ring is compared with: what
//! property tests make up by chance, and fuzz targets read from their bytes.
//!
//! The model is a list of chains, and counters that never wrap. A position is counted in the
//! format's own unit: elements when split, slots when packed. The rings' indices are these
//! positions modulo 2^16, or modulo two laps.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::memory::{GuestRam, Segment, Segments, copy};
use crate::ring::{
    ChainId, ChainQueue, Desc, Popped, RingConfig, RingFormat, Single, Virtqueue, VringBase,
};

use super::driver::{Buf, Calls, Driver, RingMemory, write_guest};

mod script;

pub use script::{Layout, Script, Shape, Step};

/// Where buffers lie, behind every ring; the two regions meet in their middle.
const BUFFERS: u64 = 0x10_0000;
const BUFFERS_END: u64 = 0x30_0000;
const SEAM: u64 = 0x20_0000;
/// Indirect tables, one at a time per place.
const TABLES: u64 = 0x30_0000;
const TABLE_BYTES: u64 = 0x100;
const TABLES_MAX: u64 = 64;
const RAM: u64 = 0x40_0000;

/// A piece of guest memory: address and length.
pub type Piece = (u64, usize);

/// A chain as the driver posted it.
#[derive(Debug)]
struct Posted {
    serial: usize,
    id: u16,
    /// Descriptors in the ring.
    descriptors: u16,
    /// Position of its first slot (split: its element), and how many it takes.
    at: u64,
    slots: u16,
    readable: Vec<Piece>,
    writable: Vec<Piece>,
    table: Option<u64>,
}

/// What came out of a ring, by the order in which chains were posted: independent of the format.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Log {
    /// Chains that the device popped: their number, what was read, where may be written.
    pub popped: Vec<(usize, Vec<u8>, Vec<Piece>)>,
    /// Chains that the driver took back: their number, and the used length.
    pub reaped: Vec<(usize, u32)>,
}

/// When one side wants to be told.
#[derive(Debug, Clone, Copy)]
enum Wish {
    Never,
    Always,
    /// When the position that is this modulo the ring's modulus is passed.
    Passing(u64),
}

/// The memory of a session, zeroed.
pub(super) fn memory() -> Arc<GuestRam> {
    GuestRam::for_test(&[(0, SEAM), (SEAM, RAM - SEAM)])
}

/// Zeroes the rings of a session that is over, small ones.
pub(super) fn clear(ram: &GuestRam) {
    write_guest(ram, 0, &[0; 1 << 16]);
}

/// What the chain number `turn` of some was used with.
fn length(written: u32, turn: u32) -> u32 {
    match written {
        0 => 0,
        _ => written.wrapping_add(turn),
    }
}

/// Both sides of a ring, and the model.
#[derive(Debug)]
pub struct Session<D: Driver> {
    ram: Arc<GuestRam>,
    driver: D,
    vq: Virtqueue<D::Format>,
    config: RingConfig,
    segments: Segments,
    event_idx: bool,
    in_order: bool,
    restarts: bool,
    size: u16,
    /// After so many positions the ring's indices repeat.
    modulus: u64,
    posted: usize,
    free_tables: Vec<u64>,
    next_buffer: u64,
    /// Free descriptors.
    room: u16,
    /// Written, not shown; shown, not popped; popped, not used; used, not shown; shown, not reaped.
    written: VecDeque<Posted>,
    available: VecDeque<Posted>,
    popped: VecDeque<(ChainId, Posted)>,
    staged: VecDeque<(Posted, u32)>,
    used: VecDeque<(Posted, u32)>,
    /// Positions of the driver's end, of what is shown of it, of the device's cursor, of what it
    /// used, of what it showed of that, and of what the driver took back.
    end: u64,
    shown: u64,
    cursor: u64,
    done: u64,
    told: u64,
    taken: u64,
    calls: Wish,
    kicks: Wish,
    /// What came out so far.
    pub log: Log,
    /// What was read is in it, too.
    logs_bytes: bool,
}

impl<D: Driver> Session<D> {
    const PACKED: bool = D::Format::PACKED;

    /// A ring as `script` has it, on which nothing has happened yet.
    ///
    /// # Panics
    /// When there can be no such ring.
    pub fn new(script: &Script) -> Session<D> {
        Session {
            logs_bytes: true,
            ..Session::within(memory(), script)
        }
    }

    /// As [`Session::new`], in memory that another session was played in.
    pub(super) fn within(ram: Arc<GuestRam>, script: &Script) -> Session<D> {
        let memory = RingMemory::new::<D::Format>(&ram, 0, script.size);
        let mut driver = D::standing_at(&memory, script.event_idx, script.base);
        driver.set_in_order(script.in_order);
        let config = RingConfig {
            event_idx: script.event_idx,
            in_order: script.in_order,
            base: script.base,
            ..memory.config::<D::Format>()
        };
        let vq = memory.device_with(&config);
        let size = u64::from(script.size);
        let modulus = if Self::PACKED { 2 * size } else { 1 << 16 };
        let start = if Self::PACKED {
            let lap = if script.base.avail & 0x8000 == 0 {
                1
            } else {
                0
            };
            u64::from(script.base.avail & 0x7fff) + lap * size
        } else {
            u64::from(script.base.avail)
        };
        // Not the first lap, so that a position behind the start is none below zero.
        let start = start + modulus;
        // Event fields are zero at first: an index when split, "always" when packed.
        let initial = match (script.event_idx, Self::PACKED) {
            (true, false) => Wish::Passing(0),
            _ => Wish::Always,
        };
        Session {
            ram,
            driver,
            vq,
            config,
            segments: Segments::with_capacity(4096),
            event_idx: script.event_idx,
            in_order: script.in_order,
            restarts: script.restarts,
            size: script.size,
            modulus,
            posted: 0,
            free_tables: (0..TABLES_MAX)
                .map(|i| TABLES + i * TABLE_BYTES + 3)
                .collect(),
            next_buffer: 0,
            room: script.size,
            written: VecDeque::new(),
            available: VecDeque::new(),
            popped: VecDeque::new(),
            staged: VecDeque::new(),
            used: VecDeque::new(),
            end: start,
            shown: start,
            cursor: start,
            done: start,
            told: start,
            taken: start,
            calls: initial,
            kicks: initial,
            log: Log::default(),
            logs_bytes: false,
        }
    }

    /// Fills the memory of the buffers with bytes that tell where they are from.
    pub fn mark_buffers(&self) {
        let bytes: Vec<u8> = (BUFFERS..BUFFERS_END)
            .flat_map(|at| (at % 251).to_le_bytes().into_iter().take(1))
            .collect();
        write_guest(&self.ram, BUFFERS, &bytes);
    }

    /// Plays all steps, then brings everything that is under way to its end.
    ///
    /// # Panics
    /// When the ring does something else than the model.
    pub fn play(&mut self, steps: &[Step]) {
        for step in steps {
            self.step(step);
        }
        self.publish();
        self.pop(u16::MAX, false);
        self.use_chains(u16::MAX, 7, 7);
        self.publish_used();
        self.reap(u16::MAX);
        assert_eq!(self.log.reaped.len(), self.posted, "every chain came back");
        assert_eq!((self.room, self.vq.in_flight()), (self.size, 0));
        assert!(!self.vq.publish(), "nothing is left to show");
        assert_eq!(self.vq.fault(), None);
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Add(ref shape) => self.add(shape),
            Step::Fill => self.fill(),
            Step::Publish => self.publish(),
            Step::Pop { count, short } => self.pop(count, short),
            Step::Unpop => self.unpop(),
            Step::Use {
                count,
                which,
                written,
            } => self.use_chains(count, which, written),
            Step::PublishUsed => self.publish_used(),
            Step::Reap(count) => self.reap(count),
            Step::Calls(calls) => self.set_calls(calls),
            Step::Kicks(wanted) => self.set_kicks(wanted),
            Step::Round(ref chains) => self.round(chains),
        }
        if self.restarts {
            self.restart();
        }
        let unit = |posted: &Posted| u32::from(posted.slots);
        let in_flight: u32 = self.popped.iter().map(|(_, posted)| unit(posted)).sum();
        assert_eq!(self.vq.in_flight(), in_flight);
        let base = self.vq.base();
        assert_eq!(self.index(self.cursor), base.avail, "avail cursor");
        assert_eq!(self.index(self.done), base.used, "used cursor");
    }

    /// A position as the ring writes it.
    fn index(&self, position: u64) -> u16 {
        let at = position % self.modulus;
        let size = u64::from(self.size);
        let index = match Self::PACKED {
            true if at < size => at | 0x8000,
            true => at - size,
            false => at,
        };
        u16::try_from(index).expect("an index")
    }

    /// Whether a step from `old` to `new` is one that `wish` asks to be told of: by trying each.
    fn wanted(&self, wish: Wish, old: u64, new: u64) -> bool {
        match wish {
            Wish::Never => false,
            Wish::Always => true,
            Wish::Passing(event) => (old..new).any(|at| at % self.modulus == event % self.modulus),
        }
    }

    fn buffer(&mut self, len: u32, write: bool) -> Buf {
        // Some place; every now and then one that reaches over the seam of the two regions.
        self.next_buffer += 1;
        let len64 = u64::from(len);
        let addr = match self.next_buffer % 7 {
            0 => SEAM - len64 / 2,
            n => BUFFERS + (self.next_buffer * 40_961 + n) % (BUFFERS_END - BUFFERS - len64),
        };
        Buf { addr, len, write }
    }

    /// The pieces of memory that the device must see for `bufs`.
    fn pieces(bufs: &[Buf], write: bool) -> Vec<Piece> {
        let mut pieces = Vec::new();
        for buf in bufs.iter().filter(|buf| buf.write == write) {
            let (start, end) = (buf.addr, buf.addr + u64::from(buf.len));
            let seam = SEAM.clamp(start, end);
            for (from, to) in [(start, seam), (seam, end)] {
                if to > from {
                    pieces.push((from, usize::try_from(to - from).expect("a length")));
                }
            }
        }
        pieces
    }

    fn add(&mut self, shape: &Shape) {
        let mut bufs = Vec::new();
        for &len in &shape.readable {
            bufs.push(self.buffer(len, false));
        }
        for &len in &shape.writable {
            bufs.push(self.buffer(len, true));
        }
        let direct = match shape.layout {
            Layout::Direct => bufs.len(),
            Layout::Indirect => 0,
            Layout::Mixed => 1,
        };
        let mut table = None;
        if direct < bufs.len() {
            match self.free_tables.pop() {
                None => return,
                place => table = place,
            }
        }
        self.post(&bufs, direct, table);
    }

    fn post(&mut self, bufs: &[Buf], direct: usize, table: Option<u64>) {
        let mut descs: Vec<_> = bufs[..direct].iter().map(|buf| (*buf, 0)).collect();
        if let Some(table) = table {
            let words = D::table(&bufs[direct..]);
            let bytes: Vec<u8> = words
                .iter()
                .flatten()
                .flat_map(|word| word.to_le_bytes())
                .collect();
            write_guest(&self.ram, table, &bytes);
            let len = u32::try_from(bytes.len()).expect("a small table");
            descs.push((Buf::readable(table, len), Desc::INDIRECT));
        }
        let descriptors = u16::try_from(descs.len()).expect("few descriptors");
        let id = self.driver.add_raw(&descs);
        assert_eq!(id.is_some(), descriptors <= self.room, "room for a chain");
        let Some(id) = id else {
            self.free_tables.extend(table);
            return;
        };
        self.room -= descriptors;
        let slots = if Self::PACKED { descriptors } else { 1 };
        self.written.push_back(Posted {
            serial: self.posted,
            id,
            descriptors,
            at: self.end,
            slots,
            readable: Self::pieces(bufs, false),
            writable: Self::pieces(bufs, true),
            table,
        });
        self.posted += 1;
        self.end += u64::from(slots);
    }

    fn fill(&mut self) {
        while self.room > 0 {
            let buf = self.buffer(1, self.room.is_multiple_of(3));
            self.post(&[buf], 1, None);
        }
    }

    /// Small rings are gone through often this way, and stand with nothing under way often.
    fn round(&mut self, chains: &[usize]) {
        for &count in chains {
            let bufs: Vec<_> = (0..count).map(|_| self.buffer(64, false)).collect();
            self.post(&bufs, count, None);
        }
        self.publish();
        self.pop(u16::MAX, false);
        self.use_chains(u16::MAX, 1, 0);
        self.publish_used();
        self.reap(u16::MAX);
    }

    fn publish(&mut self) {
        if self.written.is_empty() {
            return;
        }
        let kick = self.driver.publish();
        assert_eq!(kick, self.wanted(self.kicks, self.shown, self.end), "kick");
        self.shown = self.end;
        self.available.append(&mut self.written);
    }

    fn pop(&mut self, count: u16, short: bool) {
        assert_eq!(
            self.vq.has_available(),
            Ok(!self.available.is_empty()),
            "has_available"
        );
        if self.written.is_empty() {
            let certain = u64::from(self.vq.backlog(count));
            assert_eq!(certain > 0, !self.available.is_empty(), "backlog");
            assert!(certain <= self.shown - self.cursor, "backlog");
        }
        let mut left = usize::from(count);
        while left > 0 {
            let taken = if short { self.pop_singles(left) } else { 0 };
            match taken {
                0 if self.pop_one() => left -= 1,
                0 => return,
                _ => left -= taken,
            }
        }
    }

    /// The simplest chains, many at once, of whichever direction comes next.
    fn pop_singles(&mut self, count: usize) -> usize {
        let count = count.min(self.size.into());
        let mut singles: Vec<_> = (0..count).map(|_| Single::EMPTY).collect();
        for write in [false, true] {
            let taken = self.vq.pop_singles(write, &mut singles);
            for single in &mut singles[..taken] {
                self.segments.clear();
                assert!(self.segments.push(single.segment));
                self.check(single.take_id(), usize::from(!write));
            }
            if taken > 0 {
                return taken;
            }
        }
        0
    }

    fn pop_one(&mut self) -> bool {
        self.segments.clear();
        match self.vq.pop(&mut self.segments).expect("an honest ring") {
            Popped::Chain(chain) => {
                let bytes = |list: &[Segment]| list.iter().map(Segment::len).sum::<usize>();
                let sums = (chain.readable_bytes as usize, chain.writable_bytes as usize);
                assert_eq!(bytes(chain.readable(&self.segments)), sums.0);
                assert_eq!(bytes(chain.writable(&self.segments)), sums.1);
                assert_eq!(chain.first, 0);
                let count = chain.readable as usize + chain.writable as usize;
                assert_eq!(self.segments.len(), count);
                self.check(chain.id, chain.readable as usize);
                true
            }
            Popped::Empty => {
                assert!(self.available.is_empty(), "a chain is available");
                assert!(self.segments.is_empty(), "no chain, no segments");
                false
            }
            Popped::Wait => panic!("nothing to wait for"),
        }
    }

    /// A chain was popped: `self.segments`, the first `readable` of them to be read.
    fn check(&mut self, id: ChainId, readable: usize) {
        let posted = self.available.front().expect("no chain was available");
        assert_eq!((id.id(), id.slots()), (posted.id, posted.slots));
        let (ours, theirs) = self.segments.as_slice().split_at(readable);
        assert_eq!(self.seen(ours), posted.readable, "readable buffers");
        assert_eq!(self.seen(theirs), posted.writable, "writable buffers");
        let mut bytes = vec![0; ours.iter().map(Segment::len).sum()];
        assert_eq!(copy::read(ours, 0, &mut bytes), bytes.len());
        let posted = self.available.pop_front().expect("the same");
        assert_eq!(posted.at, self.cursor, "in the order of availability");
        self.cursor += u64::from(posted.slots);
        if self.logs_bytes {
            let entry = (posted.serial, bytes, posted.writable.clone());
            self.log.popped.push(entry);
        }
        self.popped.push_back((id, posted));
    }

    fn seen(&self, segments: &[Segment]) -> Vec<Piece> {
        let piece = |segment: &Segment| {
            (
                self.ram.gpa_of(segment).expect("guest memory"),
                segment.len(),
            )
        };
        segments.iter().map(piece).collect()
    }

    fn unpop(&mut self) {
        // Only the chain popped last, and only as long as it is the last.
        let is_last =
            |(_, posted): &(_, Posted)| posted.at + u64::from(posted.slots) == self.cursor;
        if self.popped.back().is_some_and(is_last) {
            let (id, posted) = self.popped.pop_back().expect("the last");
            self.cursor = posted.at;
            self.vq.unpop(id);
            self.available.push_front(posted);
            self.log.popped.pop();
        }
    }

    fn use_chains(&mut self, count: u16, which: u16, written: u32) {
        if which.is_multiple_of(2) {
            return self.use_singles(usize::from(count), written);
        }
        for turn in 0..u32::from(count) {
            if self.popped.is_empty() {
                return;
            }
            let at = if self.in_order {
                0
            } else {
                (usize::from(which) + turn as usize) % self.popped.len()
            };
            let (id, posted) = self.popped.remove(at).expect("one of them");
            let written = length(written, turn);
            self.vq.put_used(id, written, &[]);
            self.done += u64::from(posted.slots);
            self.staged.push_back((posted, written));
        }
    }

    /// The oldest chains, those of one descriptor many at once.
    fn use_singles(&mut self, count: usize, written: u32) {
        let mut singles = Vec::new();
        let mut lens = (0..).map(|turn| length(written, turn));
        for _ in 0..count.min(self.popped.len()) {
            let (id, posted) = self.popped.pop_front().expect("one of them");
            self.done += u64::from(posted.slots);
            let staged = self.staged.len() - singles.len();
            if posted.slots == 1 {
                singles.push(Single::new(id, Segment::EMPTY));
            } else {
                let before = self.staged.iter().skip(staged).map(|(_, len)| *len);
                self.vq.put_used_singles(&singles, before);
                singles.clear();
                self.vq
                    .put_used(id, lens.clone().next().expect("no end"), &[]);
            }
            self.staged
                .push_back((posted, lens.next().expect("no end")));
        }
        let staged = self.staged.len() - singles.len();
        let lens = self.staged.iter().skip(staged).map(|(_, len)| *len);
        self.vq.put_used_singles(&singles, lens);
    }

    /// Over the 32-bit value of the protocol, whatever the driver has written meanwhile.
    fn restart(&mut self) {
        if self.popped.is_empty() && self.staged.is_empty() {
            let base = self.vq.base().to_u32(Self::PACKED);
            self.config.base = VringBase::from_u32(Self::PACKED, base);
            self.vq = self.driver.memory().device_with(&self.config);
        }
    }

    fn publish_used(&mut self) {
        let call = self.vq.publish();
        let wanted = !self.staged.is_empty() && self.wanted(self.calls, self.told, self.done);
        assert_eq!(call, wanted, "call");
        self.told = self.done;
        self.used.append(&mut self.staged);
    }

    fn reap(&mut self, count: u16) {
        for _ in 0..count {
            let want = self.used.pop_front();
            let got = self.driver.used();
            assert_eq!(got, want.as_ref().map(|(posted, len)| (posted.id, *len)));
            let Some((posted, written)) = want else {
                return;
            };
            self.room += posted.descriptors;
            self.taken += u64::from(posted.slots);
            self.free_tables.extend(posted.table);
            self.log.reaped.push((posted.serial, written));
        }
    }

    fn set_calls(&mut self, calls: Calls) {
        // An event further than a lap away can't be written.
        let calls = match calls {
            Calls::After(n) => Calls::After(n.min(self.size)),
            other => other,
        };
        self.driver.set_calls(calls);
        self.calls = match (calls, self.event_idx, Self::PACKED) {
            (Calls::After(n), true, _) => Wish::Passing(self.taken + u64::from(n)),
            // With the event index a split driver has no other way to say yes and no.
            (Calls::On, true, false) => Wish::Passing(self.taken),
            (Calls::Off, true, false) => Wish::Passing(self.taken - 1),
            (Calls::Off, _, _) => Wish::Never,
            _ => Wish::Always,
        };
    }

    fn set_kicks(&mut self, wanted: bool) {
        let work = self.vq.set_kicks(wanted);
        assert_eq!(work, wanted && !self.available.is_empty(), "work meanwhile");
        self.kicks = match (wanted, self.event_idx, Self::PACKED) {
            (true, true, _) => Wish::Passing(self.cursor),
            (true, false, _) => Wish::Always,
            // The index stays where it is: passed already, or about to be.
            (false, true, false) => self.kicks,
            (false, _, _) => Wish::Never,
        };
    }
}
