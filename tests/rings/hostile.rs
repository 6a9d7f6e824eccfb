//! Garbage in ring memory: whatever the driver writes, `pop` ends, stays inside guest memory, and
//! a fault is for good.

use std::sync::Arc;

use proptest::prelude::*;
use vringd::memory::{GuestRam, Segment, Segments};
use vringd::ring::{
    Areas, Chain, ChainQueue, Popped, RingConfig, RingFault, RingFormat, Virtqueue,
};
use vringd::testing::driver::{
    Buf, Driver, PackedDriver, RingMemory, SplitDriver, read_guest, write_guest,
};

use crate::support::cases::cases;

/// The honest ring, the hostile one, indirect tables, and where memory ends.
const HOSTILE: u64 = 0x1_0000;
const TABLES: u64 = 0x2_0000;
const ENTRIES: usize = 64;
const SEAM: u64 = 0x3_0000;
const RAM: u64 = 0x4_0000;
/// What one pop may read: the longest chain in the ring, and the longest table behind it.
const STEPS_MAX: usize = 64 + 1024;

/// A descriptor as a driver might write it that has nothing good in mind.
#[derive(Debug, Clone, Copy)]
struct Junk {
    addr: u64,
    len: u32,
    flags: u16,
    /// `next` or the buffer id.
    id: u16,
}

impl Junk {
    /// The two words of the descriptor, in the layout of either format.
    fn words(self, packed: bool) -> [u64; 2] {
        let (high, middle) = if packed {
            (self.flags, self.id)
        } else {
            (self.id, self.flags)
        };
        let rest = u64::from(self.len) | (u64::from(middle) << 32) | (u64::from(high) << 48);
        [self.addr, rest]
    }
}

fn junk(size: u16) -> impl Strategy<Value = Junk> {
    let addr = prop_oneof![
        6 => 0..RAM,
        4 => (0u64..4).prop_map(|entry| TABLES + entry * 16),
        1 => (RAM - 64)..(RAM + 64),
        1 => (SEAM - 64)..(SEAM + 64),
        1 => (u64::MAX - 64)..=u64::MAX,
        1 => any::<u64>(),
    ];
    let len = prop_oneof![
        6 => 0u32..4096,
        6 => (0u32..80).prop_map(|entries| entries * 16),
        1 => (u32::MAX - 64)..=u32::MAX,
        1 => any::<u32>(),
    ];
    // NEXT often, WRITE and INDIRECT now and then; with the packed format's bits in their places.
    let flags =
        (0u16..8, any::<bool>(), any::<u16>(), 0u8..12).prop_map(|(low, ready, anything, kind)| {
            match kind {
                0 => anything,
                1..=4 => low | if ready { 0x80 } else { 0x8000 },
                5..=8 => 1 | if ready { 0x80 } else { 0x8000 },
                _ => 0x80,
            }
        });
    let id = prop_oneof![8 => 0..size, 4 => 0u16..8, 1 => any::<u16>()];
    (addr, len, flags, id).prop_map(|(addr, len, flags, id)| Junk {
        addr,
        len,
        flags,
        id,
    })
}

/// What is in memory, and how the device goes about it.
#[derive(Debug, Clone)]
struct Attack {
    size: u16,
    descs: Vec<Junk>,
    table: Vec<Junk>,
    /// Split: the available ring, and how far its index is ahead.
    heads: Vec<u16>,
    ahead: u16,
    /// Whether a chain is kept for long, and what the attacker does after the pop.
    pops: Vec<(bool, u16)>,
    room: usize,
    /// IN_ORDER was taken: what is popped is used at once, most of it with nothing written.
    in_order: bool,
}

fn attack(sizes: &'static [u16]) -> impl Strategy<Value = Attack> {
    prop::sample::select(sizes).prop_flat_map(|size| {
        let count = usize::from(size);
        let heads = prop_oneof![12 => 0..size, 1 => any::<u16>()];
        let ahead = prop_oneof![8 => 0..=size, 1 => any::<u16>()];
        (
            prop::collection::vec(junk(size), count),
            prop::collection::vec(junk(8), ENTRIES),
            prop::collection::vec(heads, count),
            ahead,
            prop::collection::vec((any::<bool>(), any::<u16>()), 1..100),
            prop_oneof![Just(4096usize), 1usize..40],
            any::<bool>(),
        )
            .prop_map(
                move |(descs, table, heads, ahead, pops, room, in_order)| Attack {
                    size,
                    descs,
                    table,
                    heads,
                    ahead,
                    pops,
                    room,
                    in_order,
                },
            )
    })
}

/// A hostile ring beside an honest one, in the same memory.
struct Rig<D: Driver> {
    ram: Arc<GuestRam>,
    honest: D,
    honest_vq: Virtqueue<D::Format>,
    vq: Virtqueue<D::Format>,
    areas: Areas,
    segments: Segments,
    in_order: bool,
}

impl<D: Driver> Rig<D> {
    fn new(attack: &Attack) -> Rig<D> {
        let ram = GuestRam::for_test(&[(0, SEAM), (SEAM, RAM - SEAM)]);
        let honest_ring = RingMemory::new::<D::Format>(&ram, 0, 16);
        let ring = RingMemory::new::<D::Format>(&ram, HOSTILE, attack.size);
        let packed = D::Format::PACKED;
        let put = |gpa, junk: &[Junk]| {
            let words = junk.iter().flat_map(|junk| junk.words(packed));
            let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
            write_guest(&ram, gpa, &bytes);
        };
        put(ring.at[0], &attack.descs);
        put(TABLES, &attack.table);
        if !packed {
            let heads: Vec<u8> = attack.heads.iter().flat_map(|h| h.to_le_bytes()).collect();
            write_guest(&ram, ring.at[1] + 4, &heads);
            write_guest(&ram, ring.at[1] + 2, &attack.ahead.to_le_bytes());
        }
        Rig {
            honest: D::new(&honest_ring, true),
            honest_vq: honest_ring.device::<D::Format>(true),
            vq: ring.device_with(&RingConfig {
                event_idx: true,
                in_order: attack.in_order,
                ..ring.config::<D::Format>()
            }),
            in_order: attack.in_order,
            areas: ring.areas::<D::Format>(),
            segments: Segments::with_capacity(attack.room),
            ram,
        }
    }

    /// Pops once, checks what came, and uses it or keeps it. Whether to go on.
    fn pop(
        &mut self,
        kept: &mut Vec<Chain>,
        (keep, share): (bool, u16),
    ) -> Result<bool, RingFault> {
        self.segments.clear();
        // What nothing was written to may share a used element with its neighbours.
        let written = u32::from(!self.in_order || share.is_multiple_of(3));
        for write in [false, true] {
            if keep && let Some(mut single) = self.vq.pop_single(write) {
                assert!(self.segments.push(single.segment));
                self.check_segments();
                self.vq.put_used(single.take_id(), written, &[]);
                return Ok(true);
            }
        }
        match self.vq.pop(&mut self.segments)? {
            Popped::Chain(chain) => {
                self.check_segments();
                assert_eq!(
                    self.segments.len(),
                    (chain.readable + chain.writable) as usize
                );
                if keep && !self.in_order {
                    kept.push(chain);
                } else {
                    self.vq.put_used(chain.id, written, &[]);
                }
                Ok(true)
            }
            Popped::Empty | Popped::Wait => {
                assert!(self.segments.is_empty(), "no chain, no segments");
                Ok(false)
            }
        }
    }

    /// Makes more available, whether it is the driver's to give or not.
    fn attack_again(&self, attack: &Attack, next: u16) {
        if D::Format::PACKED {
            // A descriptor as the next lap has it.
            let at = usize::from(next % attack.size) * 16 + 8;
            let word = self.areas.desc.load64(at);
            self.areas.desc.store64(at, word ^ 0x8080 << 48);
        } else {
            let index = self.areas.driver.load16(2);
            self.areas.driver.store16(2, index.wrapping_add(next % 3));
        }
    }

    fn check_segments(&self) {
        // Each step adds two at most: a buffer over the seam.
        assert!(self.segments.len() <= 2 * STEPS_MAX);
        for segment in self.segments.as_slice() {
            check_inside(&self.ram, segment);
        }
    }

    /// The honest ring works as ever.
    fn check_honest(&mut self) {
        let before = read_guest(&self.ram, 0, 0x1000);
        for round in 0..3 {
            let id = self.honest.add(&[Buf::writable(0x8000, 64)]).unwrap();
            self.honest.publish();
            self.segments.clear();
            let Ok(Popped::Chain(chain)) = self.honest_vq.pop(&mut self.segments) else {
                panic!("the honest ring is disturbed");
            };
            self.honest_vq.put_used(chain.id, round, &[]);
            self.honest_vq.publish();
            assert_eq!(self.honest.used(), Some((id, round)));
        }
        assert!(before != read_guest(&self.ram, 0, 0x1000), "it is this one");
    }

    fn run(&mut self, attack: &Attack) {
        self.check_honest();
        let honest = read_guest(&self.ram, 0, usize::try_from(HOSTILE).unwrap());
        let mut kept = Vec::new();
        let mut fault = None;
        for &(keep, next) in &attack.pops {
            self.vq.backlog(attack.size);
            match self.pop(&mut kept, (keep, next)) {
                Ok(_) => {}
                Err(found) => {
                    assert_eq!(*fault.get_or_insert(found), found, "the first one stays");
                    assert!(self.segments.is_empty(), "a fault leaves nothing behind");
                    assert_eq!(self.vq.fault(), fault);
                    assert_eq!(self.vq.has_available(), Err(found));
                    assert!(!self.vq.set_kicks(true), "a broken ring reports no work");
                    assert_eq!(self.vq.backlog(1), 0);
                    assert!(self.vq.pop_single(true).is_none());
                    assert!(self.vq.pop_single(false).is_none());
                }
            }
            assert!(self.vq.in_flight() <= u32::from(attack.size));
            if !self.in_order || next.is_multiple_of(4) {
                self.vq.publish();
            }
            self.attack_again(attack, next);
        }
        for chain in kept {
            self.vq.put_used(chain.id, 2, &[]);
        }
        self.vq.publish();
        assert_eq!(self.vq.in_flight(), 0);
        let after = read_guest(&self.ram, 0, usize::try_from(HOSTILE).unwrap());
        assert!(honest == after, "nothing of the honest ring was written");
        self.check_honest();
    }
}

/// All bytes of a segment are guest memory.
pub fn check_inside(ram: &GuestRam, segment: &Segment) {
    assert!(!segment.is_empty());
    let first = ram.gpa_of(&segment.take(1)).expect("its first byte");
    let last = ram.gpa_of(&segment.skip(segment.len() - 1));
    assert_eq!(
        last,
        Some(first + segment.len() as u64 - 1),
        "its last byte"
    );
}

proptest! {
    #![proptest_config(cases(1000))]

    #[test]
    fn garbage_in_a_split_ring_stays_in_its_ring(attack in attack(&[2, 4, 16, 64])) {
        Rig::<SplitDriver>::new(&attack).run(&attack);
    }

    #[test]
    fn garbage_in_a_packed_ring_stays_in_its_ring(attack in attack(&[1, 2, 3, 7, 13, 16, 64])) {
        Rig::<PackedDriver>::new(&attack).run(&attack);
    }
}
