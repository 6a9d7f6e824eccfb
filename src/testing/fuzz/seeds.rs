//! Inputs to begin with: an honest session for each format, and one for each way to break a ring.

use crate::ring::{Desc, Packed, RingFault, RingFormat, Split};

use super::rings::{Op, RING, RingInput, SEAM, VAST};

const SIZE: u16 = 4;
/// Offsets of the buffers and of an indirect table from the start of the ring.
const BUFFERS: u64 = 0x8000;
const TABLE: u64 = 0x4000;
/// VIRTIO_F_INDIRECT_DESC, as [`RingInput::flags`] has it.
const INDIRECT: u8 = 1 << 1;
/// VIRTIO_F_IN_ORDER, likewise.
const IN_ORDER: u8 = 1 << 2;
const SMALL_AREAS: u8 = 1 << 4;
const LITTLE_ROOM: u8 = 1 << 5;
/// A packed descriptor that is available in the first and in the second lap.
const FIRST_LAP: u16 = 0x80;
const SECOND_LAP: u16 = 0x8000;

/// An input being written.
struct Seed {
    packed: bool,
    input: RingInput,
    ops: Vec<Op>,
}

impl Seed {
    fn new(packed: bool) -> Seed {
        let base = if packed { 0x8000_8000 } else { 0 };
        Seed {
            packed,
            input: RingInput {
                size: SIZE,
                base,
                flags: INDIRECT,
            },
            ops: Vec::new(),
        }
    }

    fn area(&self, area: usize) -> u32 {
        let bytes = if self.packed {
            Packed::area_bytes(self.input.size)
        } else {
            Split::area_bytes(self.input.size)
        };
        let before = bytes.iter().take(area);
        before.map(|bytes| bytes.next_multiple_of(64) as u32).sum()
    }

    fn words(&self, desc: Desc) -> [u64; 2] {
        let (high, middle) = if self.packed {
            (desc.flags, desc.id)
        } else {
            (desc.id, desc.flags)
        };
        let rest = u64::from(desc.len) | u64::from(middle) << 32 | u64::from(high) << 48;
        [desc.addr, rest]
    }

    fn put(&mut self, at: u32, desc: Desc) {
        for (word, at) in self.words(desc).into_iter().zip([at, at + 8]) {
            self.ops.push(Op::Write(at, word));
        }
    }

    /// A descriptor of the ring: a packed one is available in the first lap.
    fn desc(&mut self, slot: u16, desc: Desc) {
        let flags = desc.flags | if self.packed { FIRST_LAP } else { 0 };
        self.put(16 * u32::from(slot), Desc { flags, ..desc });
    }

    /// An entry of the indirect table.
    fn entry(&mut self, index: u32, desc: Desc) {
        self.put(TABLE as u32 + 16 * index, desc);
    }

    /// Split: heads from the first on, and the index after them.
    fn avail(&mut self, index: u16, heads: [u16; 2]) {
        if !self.packed {
            let word =
                u64::from(index) << 16 | u64::from(heads[0]) << 32 | u64::from(heads[1]) << 48;
            self.ops.push(Op::Write(self.area(1), word));
        }
    }

    fn finish(mut self, ops: &[Op]) -> Vec<u8> {
        self.ops.extend(ops);
        let mut bytes = self.input.encode();
        bytes.extend(self.ops.iter().flat_map(Op::encode));
        bytes
    }
}

fn buffer(flags: u16, next: u16) -> Desc {
    Desc {
        addr: RING + BUFFERS,
        len: 64,
        flags,
        id: next,
    }
}

fn table(len: u32) -> Desc {
    Desc {
        addr: RING + TABLE,
        len,
        flags: Desc::INDIRECT,
        id: 0,
    }
}

/// An input after which a ring of this format is broken by `fault`; `None` where that can't be.
pub fn seed_for(packed: bool, fault: RingFault) -> Option<Vec<u8>> {
    let mut seed = Seed::new(packed);
    let impossible = match fault {
        RingFault::AvailIndexJump | RingFault::DescIndex => packed,
        RingFault::Base => !packed,
        _ => false,
    };
    if impossible {
        return None;
    }
    match fault {
        RingFault::Size => seed.input.size = 0,
        RingFault::Base => seed.input.base = 0x8009_8009,
        RingFault::Areas => seed.input.flags |= SMALL_AREAS,
        // Both are found outside of the ring.
        RingFault::Memory => return Some(seed.finish(&[Op::Latch, Op::Pop])),
        RingFault::Unanswerable => return None,
        RingFault::AvailIndexJump => seed.avail(SIZE + 1, [0, 1]),
        RingFault::DescIndex => seed.avail(1, [SIZE, 0]),
        RingFault::TooManyInFlight => return Some(too_many_in_flight(seed)),
        _ => {
            chain_at_fault(&mut seed, fault);
            seed.avail(1, [0, 0]);
        }
    }
    Some(seed.finish(&[Op::Pop, Op::Pop]))
}

/// Descriptors that break the ring when they are walked.
fn chain_at_fault(seed: &mut Seed, fault: RingFault) {
    let vast = |next| Desc {
        addr: VAST,
        len: u32::MAX / 2,
        flags: Desc::NEXT,
        id: next,
    };
    match fault {
        RingFault::ChainTooLong => {
            (0..SIZE).for_each(|slot| seed.desc(slot, buffer(Desc::NEXT, (slot + 1) % SIZE)));
        }
        RingFault::TooManySegments => {
            seed.input.flags |= LITTLE_ROOM;
            (0..SIZE - 1).for_each(|slot| seed.desc(slot, buffer(Desc::NEXT, slot + 1)));
            seed.desc(SIZE - 1, buffer(0, 0));
        }
        RingFault::IndirectNotNegotiated => {
            seed.input.flags &= !INDIRECT;
            seed.desc(0, table(16));
        }
        RingFault::IndirectNested => {
            seed.desc(0, table(16));
            seed.entry(0, table(16));
        }
        RingFault::IndirectLength => seed.desc(0, table(8)),
        RingFault::IndirectTooLong => {
            // Packed: a table that is too long. Split: one whose entries go round.
            seed.desc(0, table(if seed.packed { 16 * 1025 } else { 32 }));
            seed.entry(0, buffer(Desc::NEXT, 1));
            seed.entry(1, buffer(Desc::NEXT, 0));
        }
        RingFault::ReadableAfterWritable => {
            seed.desc(0, buffer(Desc::WRITE | Desc::NEXT, 1));
            seed.desc(1, buffer(0, 0));
        }
        RingFault::ChainBytes => {
            (0..SIZE - 1).for_each(|slot| seed.desc(slot, vast(slot + 1)));
            seed.desc(SIZE - 1, buffer(0, 0));
        }
        _ => seed.desc(
            0,
            Desc {
                addr: 1 << 50,
                ..buffer(0, 0)
            },
        ),
    }
}

/// All descriptors are taken, and the driver gives some of them once more.
fn too_many_in_flight(mut seed: Seed) -> Vec<u8> {
    (0..SIZE).for_each(|slot| seed.desc(slot, buffer(0, slot)));
    seed.avail(SIZE, [0, 1]);
    seed.ops.extend([Op::Pop; SIZE as usize]);
    if seed.packed {
        let again = Desc {
            flags: SECOND_LAP,
            ..buffer(0, 0)
        };
        seed.put(0, again);
    }
    seed.avail(SIZE + 1, [0, 1]);
    seed.finish(&[Op::Pop])
}

/// A session in which nobody does wrong.
fn honest(packed: bool) -> Vec<u8> {
    let mut seed = Seed::new(packed);
    seed.desc(0, buffer(0, 0));
    seed.desc(1, buffer(Desc::WRITE, 1));
    seed.desc(2, buffer(Desc::NEXT, 3));
    seed.desc(
        3,
        Desc {
            addr: SEAM - 32,
            ..buffer(Desc::WRITE, 0)
        },
    );
    seed.ops.push(Op::Kicks(true));
    if !packed {
        let at = seed.area(1);
        let word = 3 << 16 | 1 << 48;
        seed.ops.push(Op::Write(at, word));
        seed.ops.push(Op::Write(at + 8, 2));
    }
    seed.finish(&[
        Op::Kicks(false),
        Op::Backlog(3),
        Op::PopSingles(4, false),
        Op::PopSingles(4, true),
        Op::Pop,
        Op::Unpop,
        Op::Pop,
        Op::Use(0),
        Op::Use(64),
        Op::Publish,
        Op::Use(5),
        Op::Publish,
        Op::Pop,
    ])
}

/// A session of an honest driver, for the model: steps as they come.
fn modelled() -> Vec<u8> {
    let input = RingInput {
        flags: 0x40,
        ..RingInput::default()
    };
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let steps = (0..600).map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()[0]
    });
    input.encode().into_iter().chain(steps).collect()
}

/// A chain and a table whose words change while they are read.
fn changing(packed: bool) -> Vec<u8> {
    let mut seed = Seed::new(packed);
    seed.desc(0, buffer(Desc::NEXT, 1));
    seed.desc(1, table(32));
    seed.entry(0, buffer(Desc::NEXT, 1));
    seed.entry(1, buffer(Desc::WRITE, 0));
    seed.avail(1, [0, 0]);
    for reads in 0..8 {
        seed.ops.push(Op::WriteLater(reads, 8, u64::MAX));
        seed.ops.push(Op::Pop);
        seed.ops.push(Op::Unpop);
    }
    seed.finish(&[Op::Pop, Op::Use(1), Op::Publish])
}

/// Chains used in order: three that were only read, one that was written, and in the next lap two.
fn batches(packed: bool) -> Vec<u8> {
    let mut seed = Seed::new(packed);
    seed.input.flags |= IN_ORDER;
    for slot in 0..SIZE {
        let id = if packed { slot } else { 0 };
        seed.desc(slot, buffer(if slot == 3 { Desc::WRITE } else { 0 }, id));
    }
    let at = seed.area(1);
    if !packed {
        let word = u64::from(SIZE) << 16 | 1 << 48;
        seed.ops.push(Op::Write(at, word));
        seed.ops.push(Op::Write(at + 8, 3 << 16 | 2));
    }
    let taken = [Op::PopSingles(4, false), Op::Pop, Op::Publish];
    seed.ops.extend(taken);
    seed.ops
        .extend([Op::Use(0), Op::Use(0), Op::Use(0), Op::Use(5)]);
    seed.ops.push(Op::Publish);
    // The same two heads again; a packed ring is in its second lap.
    for slot in [0, 1] {
        let flags = if packed { SECOND_LAP } else { 0 };
        let id = if packed { slot } else { 0 };
        seed.put(16 * u32::from(slot), buffer(flags, id));
    }
    if !packed {
        let word = u64::from(SIZE + 2) << 16 | 1 << 48;
        seed.ops.push(Op::Write(at, word));
    }
    seed.finish(&[
        Op::PopSingles(4, false),
        Op::Publish,
        Op::Use(0),
        Op::Use(0),
        Op::Publish,
        Op::Pop,
    ])
}

/// A ring of one descriptor that the driver gives again and again before it is told of its use.
fn given_again() -> Vec<u8> {
    let mut seed = Seed::new(true);
    seed.input.size = 1;
    seed.input.flags |= IN_ORDER;
    for lap in 0..6 {
        let flags = if lap % 2 == 0 { FIRST_LAP } else { SECOND_LAP };
        let desc = Desc {
            flags,
            ..buffer(0, 0)
        };
        seed.put(0, desc);
        seed.ops.extend([Op::Pop, Op::Use(0)]);
        if lap == 3 {
            seed.ops.push(Op::Publish);
        }
    }
    seed.finish(&[Op::Publish, Op::Pop, Op::Use(1), Op::Publish])
}

/// All seeds of a format, by name.
pub fn ring_seeds(packed: bool) -> Vec<(String, Vec<u8>)> {
    let mut seeds = vec![
        ("honest".to_owned(), honest(packed)),
        ("modelled".to_owned(), modelled()),
        ("changing".to_owned(), changing(packed)),
        ("batches".to_owned(), batches(packed)),
    ];
    if packed {
        seeds.push(("given-again".to_owned(), given_again()));
    }
    for fault in RingFault::ALL {
        if let Some(seed) = seed_for(packed, fault) {
            seeds.push((format!("fault-{fault:?}"), seed));
        }
    }
    seeds
}
