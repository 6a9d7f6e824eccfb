//! How much of long chains is walked in one burst: a driver can make all its chains as long as they
//! may be, of descriptors without a byte, which fill no list of segments.

use super::*;

/// Descriptors after which no other chain of many is begun in the same burst.
const WALK_MAX: u32 = 16384;
const TABLE: u64 = 0x21_0000;

/// Writes a table of `count` entries without a byte. Returns the descriptor of it.
fn empty_table<D: Driver>(rig: &Rig<D>, count: u32) -> (Buf, u16) {
    let bufs = vec![Buf::readable(BUFFERS, 0); count as usize];
    let words = D::table(&bufs);
    let bytes: Vec<u8> = words
        .iter()
        .flatten()
        .flat_map(|word| word.to_le_bytes())
        .collect();
    write_guest(&rig.ram, TABLE, &bytes);
    (Buf::readable(TABLE, 16 * count), Desc::INDIRECT)
}

/// Pops until that ends, uses what it got. How many chains, and what came after them.
fn burst<D: Driver>(rig: &mut Rig<D>) -> (u32, Popped) {
    let mut chains = Vec::new();
    rig.segments.clear();
    let end = loop {
        match rig.vq.pop(&mut rig.segments).unwrap() {
            Popped::Chain(chain) => chains.push(chain),
            end => break end,
        }
    };
    assert!(rig.segments.is_empty());
    let count = u32::try_from(chains.len()).unwrap();
    for chain in chains {
        rig.vq.put_used(chain.id, 0, &[]);
    }
    rig.vq.publish();
    (count, end)
}

/// Shows `count` chains alike; all come, `each` a burst.
fn in_bursts<D: Driver>(rig: &mut Rig<D>, descs: &[(Buf, u16)], count: u32, each: u32) {
    for _ in 0..count {
        rig.driver.add_raw(descs).unwrap();
    }
    rig.driver.publish();
    let mut left = count;
    while left > each {
        assert_eq!(burst(rig), (each, Popped::Wait));
        left -= each;
    }
    let (last, end) = burst(rig);
    assert_eq!(last, left);
    // Whether there is more is only looked at where more may be walked.
    assert!(end == Popped::Empty || last == each);
    for _ in 0..count {
        assert!(rig.driver.used().is_some());
    }
    assert_eq!((rig.vq.in_flight(), rig.vq.fault()), (0, None));
}

pub(super) fn long_tables<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    for entries in [1024, 300, 64] {
        let table = empty_table(&rig, entries);
        in_bursts(&mut rig, &[table], 300, WALK_MAX.div_ceil(entries));
    }
    // Behind a direct descriptor too.
    let table = empty_table(&rig, 1023);
    let descs = [(Buf::readable(BUFFERS, 0), Desc::NEXT), table];
    in_bursts(&mut rig, &descs, 40, 16);
}

pub(super) fn longer_than_all<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let table = empty_table(&rig, size.into());
    in_bursts(&mut rig, &[table], 3, 1);
    let direct = vec![(Buf::readable(BUFFERS, 0), 0); WALK_MAX as usize - 1];
    in_bursts(&mut rig, &direct, 2, 2);
    let direct = vec![(Buf::readable(BUFFERS, 0), 0); usize::from(size)];
    for _ in 0..2 {
        in_bursts(&mut rig, &direct, 1, 1);
    }
}

pub(super) fn singles_are_free<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    // Not the simplest ones: they have no byte.
    for _ in 0..3 {
        let count = u32::from(size);
        in_bursts(&mut rig, &[(Buf::readable(BUFFERS, 0), 0)], count, u32::MAX);
    }
}

pub(super) fn unpop_is_no_way_round<D: Driver>(size: u16) {
    let mut rig = Rig::<D>::new(size);
    let table = empty_table(&rig, 1024);
    rig.driver.add_raw(&[table]).unwrap();
    rig.driver.publish();
    for _ in 0..2 {
        for _ in 0..16 {
            let chain = rig.pop().expect("a chain");
            rig.vq.unpop(chain.id);
        }
        assert_eq!(rig.vq.pop(&mut rig.segments), Ok(Popped::Wait));
        assert_eq!(rig.vq.pop(&mut rig.segments), Ok(Popped::Wait));
        assert!(rig.vq.set_kicks(true), "nobody sleeps over it");
        rig.vq.publish();
    }
    assert_eq!(burst(&mut rig).0, 1);
}
