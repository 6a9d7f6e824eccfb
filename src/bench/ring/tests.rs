//! The driver side against our own device side.

use super::*;
use crate::memory::Segments;
use crate::ring::{ChainId, ChainQueue, Popped, Virtqueue};
use crate::testing::driver::{RingMemory, UVA};

const SIZE: u16 = 8;
const BUFFERS: u64 = 65536;

fn ring<R: LoadRing>(in_order: bool, write: bool) -> (R, Virtqueue<R::Format>) {
    ring_of(SIZE, in_order, write)
}

fn ring_of<R: LoadRing>(size: u16, in_order: bool, write: bool) -> (R, Virtqueue<R::Format>) {
    let ram = GuestRam::for_test(&[(0, 1 << 20)]);
    let memory = RingMemory::new::<R::Format>(&ram, 4096, size);
    let setup = Setup {
        size,
        event_idx: false,
        in_order,
        write,
        chain: 1,
        at: memory.at.map(|gpa| gpa + UVA),
    };
    (R::new(&ram, &setup).unwrap(), memory.device(false))
}

fn pop<F: RingFormat>(device: &mut Virtqueue<F>) -> (ChainId, u32) {
    let mut segments = Segments::with_capacity(4);
    let Popped::Chain(chain) = device.pop(&mut segments).unwrap() else {
        panic!("nothing is available");
    };
    (chain.id, chain.readable_bytes + chain.writable_bytes)
}

fn post<R: LoadRing>(ring: &mut R, count: u16) {
    for _ in 0..count {
        let id = ring.ids().take().unwrap();
        ring.post(id, BUFFERS + u64::from(id) * 2048, 100 + u32::from(id));
    }
    ring.publish();
}

/// Several laps, more in flight or fewer, with a device that swaps each two buffers.
fn out_of_order<R: LoadRing>(size: u16) {
    let (mut ring, mut device) = ring_of::<R>(size, false, true);
    for lap in 0..20u16 {
        let count = 2 + lap % 3 * 2;
        post(&mut ring, count);
        assert_eq!(ring.used(), Ok(None));
        for _ in 0..count / 2 {
            let (first, second) = (pop(&mut device), pop(&mut device));
            for (chain, bytes) in [second, first] {
                device.put_used(chain, bytes, &[]);
            }
        }
        device.publish();
        for _ in 0..count {
            let (id, written) = ring.used().unwrap().unwrap();
            assert_eq!(written, 100 + u32::from(id));
            ring.ids().put(id);
        }
        assert_eq!(ring.used(), Ok(None));
        assert_eq!(ring.ids().room(), size);
    }
}

#[test]
fn buffers_come_back_in_any_order() {
    out_of_order::<SplitLoad>(SIZE);
    for size in [SIZE, 7, 9] {
        out_of_order::<PackedLoad>(size);
    }
}

fn in_order<R: LoadRing>(size: u16) {
    let (mut ring, mut device) = ring_of::<R>(size, true, false);
    let mut next = 0;
    for lap in 0..20u16 {
        let count = 1 + lap % size;
        post(&mut ring, count);
        for _ in 0..count {
            let (chain, bytes) = pop(&mut device);
            device.put_used(chain, bytes, &[]);
        }
        device.publish();
        for _ in 0..count {
            let (id, _) = ring.used().unwrap().unwrap();
            assert_eq!(id, next % size);
            next += 1;
            ring.ids().put(id);
        }
        assert_eq!(ring.used(), Ok(None));
    }
}

#[test]
fn in_order_the_ids_go_round() {
    in_order::<SplitLoad>(SIZE);
    for size in [SIZE, 7, 9] {
        in_order::<PackedLoad>(size);
    }
}

#[test]
fn one_element_gives_back_all_buffers_up_to_its_own() {
    let (mut split, _) = ring::<SplitLoad>(true, false);
    post(&mut split, 5);
    // The index moves by the whole batch; only the first place is written (§2.7.9).
    split.areas.device.store32(4, 4);
    split.areas.device.store16_release(2, 5);
    let (mut packed, _) = ring::<PackedLoad>(true, false);
    post(&mut packed, 5);
    let flags = u64::from(AVAIL | USED);
    let word = (4 << 32) | (flags << 48);
    packed.areas.desc.store64_release(8, word);
    for id in 0..5 {
        assert_eq!(split.used(), Ok(Some((id, 0))));
        assert_eq!(packed.used(), Ok(Some((id, 0))));
    }
    assert_eq!(split.used(), Ok(None));
    assert_eq!(packed.used(), Ok(None));
}

#[test]
fn a_buffer_that_the_device_does_not_have_is_a_fault() {
    for in_order in [false, true] {
        for id in [3, 8, 0xffff_ffff] {
            let (mut split, _) = ring::<SplitLoad>(in_order, false);
            post(&mut split, 2);
            split.areas.device.store32(4, id);
            split.areas.device.store16_release(2, 1);
            let found = (0..4).find_map(|_| split.used().err());
            assert!(found.is_some(), "{id} {in_order}");
        }
        let (mut packed, _) = ring::<PackedLoad>(in_order, false);
        post(&mut packed, 2);
        let flags = u64::from(AVAIL | USED);
        packed
            .areas
            .desc
            .store64_release(8, (7 << 32) | (flags << 48));
        let found = (0..8).find_map(|_| packed.used().err());
        assert!(found.is_some(), "{in_order}");
    }
}

#[test]
fn a_kick_is_wanted_only_when_the_device_says_so() {
    let (mut split, mut device) = ring::<SplitLoad>(false, false);
    for wanted in [true, false, true] {
        device.set_kicks(wanted);
        let id = split.ids().take().unwrap();
        split.post(id, BUFFERS, 64);
        assert_eq!(split.publish(), wanted);
        assert!(!split.publish(), "nothing new");
    }
    let (mut packed, mut device) = ring::<PackedLoad>(false, false);
    for wanted in [true, false, true] {
        device.set_kicks(wanted);
        let id = packed.ids().take().unwrap();
        packed.post(id, BUFFERS, 64);
        assert_eq!(packed.publish(), wanted);
        assert!(!packed.publish(), "nothing new");
    }
}

/// Three chains, one of them shorter, in a ring that their length does not divide, given back in
/// another order.
fn chains<R: LoadRing>(tables: bool) {
    let ram = GuestRam::for_test(&[(0, 1 << 20)]);
    let memory = RingMemory::new::<R::Format>(&ram, 4096, 16);
    let setup = Setup {
        size: 16,
        event_idx: false,
        in_order: false,
        write: false,
        chain: if tables { 1 } else { 3 },
        at: memory.at.map(|gpa| gpa + UVA),
    };
    let mut ring = R::new(&ram, &setup).unwrap();
    let mut device = memory.device::<R::Format>(false);
    let area = ram.area(BUFFERS + UVA, 65536, 64).unwrap();
    // Header, data and status; id 2 has no data.
    let buffers = |id: u16| {
        let at = BUFFERS + u64::from(id) * 4096;
        let buffer = |offset, len, flags| Buffer {
            addr: at + offset,
            len,
            flags,
        };
        let (head, status) = (buffer(0, 16, 0), buffer(16, 1, Desc::WRITE));
        match id {
            2 => vec![head, status],
            _ => vec![head, buffer(512, 100 + u32::from(id), Desc::WRITE), status],
        }
    };
    for id in 0..3 {
        let chain = buffers(id);
        if !tables {
            ring.set_chain(id, &chain);
            continue;
        }
        let count = u16::try_from(chain.len()).unwrap();
        for (index, buffer) in (0..count).zip(&chain) {
            let offset = usize::from(id) * 4096 + 64 + usize::from(index) * 16;
            let [addr, rest] = R::table_entry(index, count, buffer);
            area.store64(offset, addr);
            area.store64(offset + 8, rest);
        }
        let table = Buffer {
            addr: BUFFERS + u64::from(id) * 4096 + 64,
            len: u32::from(count) * 16,
            flags: Desc::INDIRECT,
        };
        ring.set_chain(id, &[table]);
    }
    for lap in 0..40u16 {
        let ids = [lap % 3, (lap + 1) % 3, (lap + 2) % 3];
        ids.iter().for_each(|id| ring.post_chain(*id));
        assert_eq!(ring.used(), Ok(None));
        ring.publish();
        let mut segments = Segments::with_capacity(4);
        let mut taken = ids.map(|id| {
            segments.clear();
            let Popped::Chain(chain) = device.pop(&mut segments).unwrap() else {
                panic!("nothing is available");
            };
            let wanted = buffers(id);
            let lengths: Vec<_> = segments.as_slice().iter().map(|it| it.len()).collect();
            assert_eq!(
                lengths,
                wanted.iter().map(|it| it.len as usize).collect::<Vec<_>>()
            );
            for (segment, buffer) in segments.as_slice().iter().zip(&wanted) {
                let same = ram.finder()(buffer.addr, buffer.len).unwrap();
                assert_eq!(format!("{segment:?}"), format!("{same:?}"));
            }
            (chain.id, id)
        });
        taken.rotate_left(usize::from(lap % 2));
        let order: Vec<u16> = taken.iter().map(|(_, id)| *id).collect();
        for (chain, id) in taken {
            device.put_used(chain, 1 + u32::from(id), &[]);
        }
        device.publish();
        for id in order {
            assert_eq!(ring.used(), Ok(Some((id, 1 + u32::from(id)))));
        }
        assert_eq!(ring.used(), Ok(None));
    }
}

#[test]
fn chains_made_once_are_posted_again_and_again() {
    for tables in [false, true] {
        chains::<SplitLoad>(tables);
        chains::<PackedLoad>(tables);
    }
}
