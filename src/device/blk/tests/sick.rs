//! Disks that are full, or become larger and smaller.

use super::*;

const ENOSPC: i32 = 28;
const EDQUOT: i32 = 122;
const HOLD: SickPolicy = SickPolicy {
    hold: true,
    io_timeout: None,
};

impl Rig {
    /// Polls and releases until nothing moves any more, without a second of waiting.
    fn settle(&mut self) {
        for _ in 0..8 {
            self.poll();
            self.disk.release();
        }
    }

    /// Puts a range behind the header of the next request.
    fn zeroes(&mut self, number: u64, sector: u64, sectors: u32) -> u16 {
        write_guest(&self.ram, DATA + number * 4096, &sector.to_le_bytes());
        let rest = [sectors.to_le_bytes(), [0; 4]].concat();
        write_guest(&self.ram, DATA + number * 4096 + 8, &rest);
        self.add(number, 13, 0, 16)
    }
}

#[test]
fn only_what_writes_waits_for_space_and_the_end_of_the_queue_ends_the_wait() {
    let mut rig = Rig::with(FLUSH | RANGES, HOLD, Arc::default());
    // A read and a flush are never the better for waiting.
    for (number, kind, bytes) in [(0, 0, 512), (1, 4, 0)] {
        rig.disk.endings.push_back(Ending::Error(ENOSPC));
        rig.add(number, kind, 0, bytes);
        rig.finish();
        assert_eq!(rig.status(number), STATUS_IOERR);
    }
    rig.disk.endings.push_back(Ending::Error(5));
    rig.add(2, 1, 0, 512);
    rig.finish();
    assert_eq!(rig.status(2), STATUS_IOERR, "EIO is not for waiting");
    assert_eq!(rig.counter("held"), 0);
    // The first part of the data finds its space, the rest has none.
    let data: Vec<u8> = (0..1024).map(|i| u8::try_from(i % 249).unwrap()).collect();
    write_guest(&rig.ram, DATA + 3 * 4096, &data);
    rig.disk
        .endings
        .extend([Ending::Short(300), Ending::Error(ENOSPC)]);
    let write = rig.add(3, 1, 8, 1024);
    rig.settle();
    rig.disk.endings.push_back(Ending::Error(EDQUOT));
    let zeroes = rig.zeroes(4, 32, 8);
    rig.settle();
    assert_eq!((rig.counter("held"), rig.handler.in_flight()), (2, 2));
    assert_eq!(rig.driver.used(), None);
    // Others pass.
    let id = rig.add(5, 0, 0, 512);
    assert_eq!(rig.finish(), (id, 513));
    // The end: one has its space now, the other has not.
    rig.handler.stop_holding();
    rig.poll();
    rig.disk.endings.clear();
    rig.settle();
    let used: Vec<_> = core::iter::from_fn(|| rig.driver.used()).collect();
    assert!(used.contains(&(write, 1)) && used.contains(&(zeroes, 1)));
    assert_eq!((rig.status(3), rig.status(4)), (STATUS_OK, STATUS_OK));
    assert!(rig.disk.bytes[4096..5120] == data, "byte for byte");
    assert!(rig.disk.bytes[16384..20480] == [0; 4096]);
    assert_eq!(rig.counter("held"), 0);
    // From now on nothing waits.
    rig.disk.endings.push_back(Ending::Error(ENOSPC));
    rig.add(6, 1, 0, 512);
    rig.finish();
    assert_eq!(rig.status(6), STATUS_IOERR);
    assert!(rig.handler.is_drained());
}

#[test]
fn the_flush_behind_durable_zeroes_does_not_wait() {
    let mut rig = Rig::with(RANGES, HOLD, Arc::default());
    rig.disk
        .endings
        .extend([Ending::Whole, Ending::Error(ENOSPC)]);
    let id = rig.zeroes(0, 0, 8);
    assert_eq!(rig.finish(), (id, 1));
    assert_eq!(rig.status(0), STATUS_IOERR);
}

#[test]
fn what_waits_fails_when_the_disk_ends_before_it() {
    let mut rig = Rig::with(FLUSH | RANGES, HOLD, Arc::default());
    rig.disk.endings.extend([Ending::Error(ENOSPC); 3]);
    rig.add(0, 1, 100, 1024);
    rig.zeroes(1, 120, 8);
    rig.add(2, 1, 10, 1024);
    rig.settle();
    assert_eq!(rig.counter("held"), 3);
    assert!(!rig.model.size().set(101 * 512, true));
    rig.handler.stop_holding();
    let before = rig.disk.bytes.clone();
    rig.settle();
    let statuses = [0, 1, 2].map(|number| rig.status(number));
    assert_eq!(statuses, [STATUS_IOERR, STATUS_IOERR, STATUS_OK]);
    assert!(rig.disk.bytes[101 * 512..] == before[101 * 512..]);
}

#[test]
fn what_the_host_had_no_room_for_fails_when_the_disk_ends_before_it() {
    let mut rig = Rig::new(FLUSH);
    rig.disk.room = 1;
    rig.add(0, 1, 10, 1024);
    rig.add(1, 1, 100, 1024);
    rig.add(2, 1, 20, 1024);
    rig.poll();
    assert!(!rig.model.size().set(101 * 512, true));
    let before = rig.disk.bytes.clone();
    rig.settle();
    let statuses = [0, 1, 2].map(|number| rig.status(number));
    assert_eq!(statuses, [STATUS_OK, STATUS_IOERR, STATUS_OK]);
    assert!(rig.disk.bytes[101 * 512..] == before[101 * 512..]);
}

#[test]
fn requests_are_checked_against_the_size_of_the_moment() {
    let mut rig = Rig::new(FLUSH | RANGES);
    let last = DISK as u64 / 512;
    let status = |rig: &mut Rig, sector| {
        rig.add(0, 0, sector, 512);
        rig.finish();
        rig.status(0)
    };
    assert_eq!(status(&mut rig, last - 1), STATUS_OK);
    assert_eq!(status(&mut rig, last), STATUS_IOERR);
    rig.disk.bytes.resize(2 * DISK, 7);
    assert!(rig.model.size().set(2 * DISK as u64, true));
    assert_eq!(status(&mut rig, last), STATUS_OK);
    assert_eq!(status(&mut rig, 2 * last), STATUS_IOERR);
    assert_eq!(rig.model.config()[..8], (2 * last).to_le_bytes());
    assert!(!rig.model.size().set(512, true));
    assert_eq!(status(&mut rig, 0), STATUS_OK);
    assert_eq!(status(&mut rig, 1), STATUS_IOERR);
    assert_eq!(
        rig.model.config()[..8],
        (2 * last).to_le_bytes(),
        "not told"
    );
}
