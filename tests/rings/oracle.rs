//! The split queue of the `virtio-queue` crate as an oracle: the same driver's bytes are given to
//! both, and both must pop the same chains and write the same bytes.
//!
//! The oracle works on a copy of guest memory, brought up to date before each of its turns, so that
//! neither sees what the other wrote. All that VIRTIO 1.3 §2.7.5, §2.7.6 and §2.7.8 lay out is read
//! and written by both.

use proptest::prelude::*;
use virtio_queue::{DescriptorChain, Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vringd::memory::{GuestRam, Segment, Segments};
use vringd::ring::{ChainId, ChainQueue, Desc, Popped, Split, Virtqueue, VringBase};
use vringd::testing::driver::{
    Buf, Calls, Driver, RingMemory, SplitDriver, read_guest, write_guest,
};
use vringd::testing::session::{Layout, Shape};

use super::script::shape;
use crate::support::cases::cases;

const BUFFERS: u64 = 0x1_0000;
const TABLES: u64 = 0x8_0000;
const TABLE_BYTES: u64 = 0x100;
const TABLES_MAX: u64 = 256;
const RAM: u64 = 0xa_0000;

/// Address, length, whether the device writes.
type Seen = (u64, usize, bool);

#[derive(Debug, Clone)]
struct Turn {
    chains: Vec<Shape>,
    calls: Option<Calls>,
    kicks: Option<bool>,
    pop: usize,
    used: usize,
    which: usize,
    written: u32,
    reap: usize,
}

fn turn() -> impl Strategy<Value = Turn> {
    let calls = prop_oneof![
        Just(Calls::On),
        Just(Calls::Off),
        (0u16..6).prop_map(Calls::After)
    ];
    let calls = prop::option::of(calls);
    let chains = prop::collection::vec(shape(), 0..6);
    let counts = (0usize..8, 0usize..8, any::<usize>(), 0usize..8);
    let kicks = prop::option::of(any::<bool>());
    (chains, calls, kicks, counts, any::<u32>()).prop_map(
        |(chains, calls, kicks, (pop, used, which, reap), written)| Turn {
            chains,
            calls,
            kicks,
            pop,
            used,
            which,
            written,
            reap,
        },
    )
}

/// One driver, two devices.
struct Pair {
    ram: std::sync::Arc<GuestRam>,
    driver: SplitDriver,
    ours: Virtqueue<Split>,
    segments: Segments,
    memory: GuestMemoryMmap,
    theirs: Queue,
    /// Guest addresses of the used ring: its first byte, and the one after its last.
    used_ring: [u64; 2],
    event_idx: bool,
    next_table: u64,
    next_buffer: u64,
    popped: Vec<ChainId>,
}

impl Pair {
    fn new(size: u16, event_idx: bool, start: u16) -> Pair {
        let ram = GuestRam::for_test(&[(0, RAM)]);
        let ring = RingMemory::new::<Split>(&ram, 0, size);
        let base = VringBase {
            avail: start,
            used: start,
        };
        let driver = SplitDriver::standing_at(&ring, event_idx, base);
        let length = usize::try_from(RAM).unwrap();
        let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), length)]).unwrap();
        let bytes = read_guest(&ram, 0, length);
        memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        let mut theirs = Queue::new(size).unwrap();
        theirs
            .try_set_desc_table_address(GuestAddress(ring.at[0]))
            .unwrap();
        theirs
            .try_set_avail_ring_address(GuestAddress(ring.at[1]))
            .unwrap();
        theirs
            .try_set_used_ring_address(GuestAddress(ring.at[2]))
            .unwrap();
        theirs.set_next_avail(start);
        theirs.set_next_used(start);
        theirs.set_event_idx(event_idx);
        theirs.set_ready(true);
        assert!(theirs.is_valid(&memory));
        Pair {
            driver,
            ours: ring.device_at::<Split>(event_idx, base),
            segments: Segments::with_capacity(4096),
            memory,
            theirs,
            used_ring: [ring.at[2], ring.end::<Split>()],
            event_idx,
            next_table: 0,
            next_buffer: 0,
            popped: Vec::new(),
            ram,
        }
    }

    fn play(&mut self, turn: &Turn) {
        for shape in &turn.chains {
            self.add(shape);
        }
        self.driver.publish();
        if let Some(calls) = turn.calls {
            self.driver.set_calls(calls);
        }
        self.show_the_oracle();
        for _ in 0..turn.pop {
            if !self.pop() {
                break;
            }
        }
        if let Some(wanted) = turn.kicks {
            let work = self.ours.set_kicks(wanted);
            let same = if wanted {
                self.theirs.enable_notification(&self.memory).unwrap()
            } else {
                self.theirs.disable_notification(&self.memory).unwrap();
                false
            };
            assert_eq!(work, same, "work found when kicks were asked for");
        }
        self.put_used(turn);
        self.compare_used_ring();
        for _ in 0..turn.reap {
            self.driver.used();
        }
    }

    fn add(&mut self, shape: &Shape) {
        let lens = [(&shape.readable, false), (&shape.writable, true)];
        let mut bufs = Vec::new();
        for (lens, write) in lens {
            for &len in lens {
                self.next_buffer += 1;
                let room = TABLES - BUFFERS - u64::from(len);
                let addr = BUFFERS + self.next_buffer * 40_961 % room;
                bufs.push(Buf { addr, len, write });
            }
        }
        let direct = match shape.layout {
            Layout::Direct => bufs.len(),
            Layout::Indirect => 0,
            Layout::Mixed => 1,
        };
        let mut descs: Vec<_> = bufs[..direct].iter().map(|buf| (*buf, 0)).collect();
        if direct < bufs.len() {
            // A place comes again only when no chain of the ring can still use it.
            let table = TABLES + self.next_table % TABLES_MAX * TABLE_BYTES;
            self.next_table += 1;
            let words = SplitDriver::table(&bufs[direct..]);
            let bytes: Vec<u8> = words
                .iter()
                .flatten()
                .flat_map(|w| w.to_le_bytes())
                .collect();
            write_guest(&self.ram, table, &bytes);
            let len = u32::try_from(bytes.len()).unwrap();
            descs.push((Buf::readable(table, len), Desc::INDIRECT));
        }
        self.driver.add_raw(&descs);
    }

    /// Copies everything but the used ring.
    fn show_the_oracle(&self) {
        for (from, to) in [(0, self.used_ring[0]), (TABLES, RAM)] {
            let bytes = read_guest(&self.ram, from, usize::try_from(to - from).unwrap());
            self.memory.write_slice(&bytes, GuestAddress(from)).unwrap();
        }
    }

    fn pop(&mut self) -> bool {
        self.segments.clear();
        let theirs = self.theirs.pop_descriptor_chain(&self.memory);
        let chain = match self.ours.pop(&mut self.segments).unwrap() {
            Popped::Chain(chain) => chain,
            Popped::Empty => {
                assert!(theirs.is_none(), "the oracle has a chain");
                return false;
            }
            Popped::Wait => panic!("nothing to wait for"),
        };
        let theirs = theirs.expect("the oracle has no chain");
        assert_eq!(chain.id.id(), theirs.head_index());
        let readable = chain
            .readable(&self.segments)
            .iter()
            .map(|s| self.seen(s, false));
        let writable = chain
            .writable(&self.segments)
            .iter()
            .map(|s| self.seen(s, true));
        assert_eq!(
            readable.chain(writable).collect::<Vec<_>>(),
            described(theirs)
        );
        self.popped.push(chain.id);
        true
    }

    fn seen(&self, segment: &Segment, write: bool) -> Seen {
        (self.ram.gpa_of(segment).unwrap(), segment.len(), write)
    }

    fn put_used(&mut self, turn: &Turn) {
        for count in 0..turn.used.min(self.popped.len()) {
            let at = turn.which % self.popped.len();
            let id = self.popped.remove(at);
            let written = turn.written.wrapping_add(u32::try_from(count).unwrap());
            self.theirs
                .add_used(&self.memory, id.id(), written)
                .unwrap();
            self.ours.put_used(id, written, &[]);
        }
        let call = self.ours.publish();
        let same = self.theirs.needs_notification(&self.memory).unwrap();
        // Without the event index the oracle always calls.
        if self.event_idx {
            assert_eq!(call, same, "call");
        }
    }

    fn compare_used_ring(&self) {
        let [from, to] = self.used_ring;
        let length = usize::try_from(to - from).unwrap();
        let mut theirs = vec![0; length];
        self.memory
            .read_slice(&mut theirs, GuestAddress(from))
            .unwrap();
        assert!(read_guest(&self.ram, from, length) == theirs, "used ring");
    }
}

fn described(chain: DescriptorChain<&GuestMemoryMmap>) -> Vec<Seen> {
    chain
        .map(|desc| (desc.addr().0, desc.len() as usize, desc.is_write_only()))
        .filter(|seen| seen.1 > 0)
        .collect()
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn the_split_ring_does_what_virtio_queue_does(
        size in prop::sample::select(&[2u16, 4, 8, 256][..]),
        event_idx in any::<bool>(),
        start in prop_oneof![Just(0u16), 65_500u16..=65_535, any::<u16>()],
        turns in prop::collection::vec(turn(), 1..40),
    ) {
        let mut pair = Pair::new(size, event_idx, start);
        for turn in &turns {
            pair.play(turn);
        }
    }
}
