//! DISCARD and WRITE_ZEROES.

use super::*;

const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;
const UNMAP: u32 = 1;

/// Sector, sectors, flags.
type Entry = (u64, u32, u32);

impl Rig {
    fn add_ranges(&mut self, kind: u32, entries: &[Entry]) -> u16 {
        let bytes = entries.iter().flat_map(|(sector, sectors, flags)| {
            let mut entry = sector.to_le_bytes().to_vec();
            entry.extend(sectors.to_le_bytes());
            entry.extend(flags.to_le_bytes());
            entry
        });
        let bytes: Vec<u8> = bytes.collect();
        write_guest(&self.ram, DATA, &bytes);
        self.add(0, kind, 0, u32::try_from(bytes.len()).unwrap())
    }

    /// The status of a request with these ranges.
    fn ranges(&mut self, kind: u32, entries: &[Entry]) -> u8 {
        let id = self.add_ranges(kind, entries);
        assert_eq!(self.finish(), (id, 1));
        self.status(0)
    }
}

#[test]
fn several_ranges_of_one_request_are_zeroed_and_nothing_else() {
    let mut rig = Rig::new(FLUSH | RANGES);
    let mut want = rig.disk.bytes.clone();
    let entries = [(2, 3, 0), (9, 0, UNMAP), (127, 1, UNMAP), (64, 8, UNMAP)];
    assert_eq!(rig.ranges(WRITE_ZEROES, &entries), STATUS_OK);
    for range in [1024..2560, 127 * 512..128 * 512, 64 * 512..72 * 512] {
        want[range].fill(0);
    }
    assert!(rig.disk.bytes == want, "other bytes");
    assert_eq!((rig.disk.unmaps, rig.disk.flushes), (2, 0));
    assert_eq!(rig.counter("write_zeroes"), 1);
    assert_eq!(rig.counter("zeroed_bytes"), 12 * 512);
    assert_eq!(rig.ranges(DISCARD, &[(0, 8, 0), (16, 1, 0)]), STATUS_OK);
    assert_eq!(rig.disk.discards, [(0, 4096), (8192, 512)]);
    assert_eq!(rig.counter("discard_bytes"), 4608);
    assert!(
        rig.disk.bytes == want,
        "a discard of this disk does nothing"
    );
}

#[test]
fn ranges_are_continued_after_short_and_failed_operations() {
    let mut rig = Rig::new(FLUSH | RANGES);
    rig.disk.endings.extend([
        Ending::Short(512),
        Ending::Error(EAGAIN),
        Ending::Error(EINTR),
        Ending::Short(1024),
    ]);
    let mut want = rig.disk.bytes.clone();
    want[..4096].fill(0);
    want[8192..12288].fill(0);
    assert_eq!(
        rig.ranges(WRITE_ZEROES, &[(0, 8, 0), (16, 8, 0)]),
        STATUS_OK
    );
    assert!(rig.disk.bytes == want, "other bytes");
    for ending in [Ending::Error(5), Ending::Error(28), Ending::Short(0)] {
        rig.disk.endings.push_back(Ending::Whole);
        rig.disk.endings.push_back(ending);
        assert_eq!(
            rig.ranges(WRITE_ZEROES, &[(0, 1, 0), (1, 1, 0)]),
            STATUS_IOERR
        );
    }
    assert_eq!(rig.counter("errors"), 3);
}

#[test]
fn zeros_are_durable_where_writes_are() {
    let mut rig = Rig::new(RANGES);
    assert_eq!(rig.ranges(WRITE_ZEROES, &[(0, 1, 0), (5, 1, 0)]), STATUS_OK);
    assert_eq!(rig.disk.flushes, 1);
    rig.disk.endings.extend([Ending::Whole, Ending::Error(5)]);
    assert_eq!(rig.ranges(WRITE_ZEROES, &[(0, 1, 0)]), STATUS_IOERR);
    assert_eq!(rig.ranges(DISCARD, &[(0, 1, 0)]), STATUS_OK);
    assert_eq!(rig.disk.flushes, 1);
}

#[test]
fn ranges_beyond_the_limits_are_refused_before_anything_is_done() {
    let mut rig = Rig::new(FLUSH | RANGES);
    let before = rig.disk.bytes.clone();
    let many = vec![(0, 1, 0); 33];
    let too_long = (0, (1 << 21) + 1, 0);
    for kind in [DISCARD, WRITE_ZEROES] {
        for bad in [
            &[(0, 1, 0), (128, 1, 0)][..],
            &[(0, 1, 0), (127, 2, 0)],
            &[(0, 1, 0), (u64::MAX, 1, 0)],
            &[(0, 1, 0), (u64::MAX / 512, u32::MAX, 0)],
            &[(0, 1, 0), too_long],
            // None, and one, where bytes are counted in 32 bits.
            &[(0, 1 << 23, 0)],
            &[(0, (1 << 23) + 1, 0)],
            &many,
            &[],
        ] {
            assert_eq!(rig.ranges(kind, bad), STATUS_IOERR, "{kind}: {bad:?}");
        }
        // A flag that is not known beats a range that is not there.
        for flags in [2, 1 << 31, u32::MAX] {
            let entries = [(1 << 40, 1, 0), (0, 1, flags)];
            assert_eq!(rig.ranges(kind, &entries), 2, "{kind}: {flags:x}");
        }
        let id = rig.add(0, kind, 0, 24);
        assert_eq!(rig.finish(), (id, 1));
        assert_eq!(rig.status(0), STATUS_IOERR, "a range and a half");
    }
    assert_eq!(rig.ranges(DISCARD, &[(0, 1, UNMAP)]), 2);
    assert!(rig.disk.bytes == before && rig.disk.discards.is_empty());
}

/// A hostile guest rewrites its ranges, or what kind of request it was, while they are acted on.
#[test]
fn ranges_that_change_after_they_were_read_change_nothing() {
    for kind in [DISCARD, WRITE_ZEROES] {
        let mut rig = Rig::new(FLUSH | RANGES);
        let mut want = rig.disk.bytes.clone();
        // The second is continued, the third tried again.
        rig.disk.endings.extend([
            Ending::Whole,
            Ending::Short(512),
            Ending::Whole,
            Ending::Error(EAGAIN),
        ]);
        let id = rig.add_ranges(kind, &[(0, 2, 0), (16, 4, 0), (32, 1, 0)]);
        let mut used = None;
        for turn in 0..20 {
            rig.poll();
            // Elsewhere, beyond the end, with flags that nobody knows, and as a write.
            let entry = [[100 + turn, 1], [u64::MAX, u64::MAX]][usize::from(turn % 2 == 1)];
            let bytes = entry.map(u64::to_le_bytes).concat().repeat(3);
            write_guest(&rig.ram, DATA, &bytes);
            rig.header(HEADER, 1, 120);
            rig.disk.release();
            rig.poll();
            used = used.or_else(|| rig.driver.used());
        }
        assert_eq!((used, rig.status(0)), (Some((id, 1)), STATUS_OK), "{kind}");
        if kind == DISCARD {
            let parts = [(0, 1024), (8192, 512), (8704, 1536), (16384, 512)];
            assert_eq!(rig.disk.discards, parts);
        } else {
            for range in [0..1024, 8192..10240, 16384..16896] {
                want[range].fill(0);
            }
        }
        assert!(rig.disk.bytes == want, "{kind}: other bytes");
        let counted = if kind == DISCARD {
            "discard_bytes"
        } else {
            "zeroed_bytes"
        };
        assert_eq!(rig.counter(counted), 7 * 512);
    }
}

#[test]
fn what_was_not_negotiated_is_not_supported() {
    let mut rig = Rig::new(FLUSH);
    for kind in [DISCARD, WRITE_ZEROES, 14, 24] {
        assert_eq!(rig.ranges(kind, &[(0, 1, 0)]), 2, "{kind}");
    }
    assert_eq!(rig.counter("unsupported"), 4);
}
