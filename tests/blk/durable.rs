//! What config space says of the cache, and which writes are durable. VIRTIO 1.3 §5.2.6.2.

use super::front_end::{F_CONFIG_WCE, F_FLUSH, F_WRITE_ZEROES, FLUSH, FrontEnd, OUT, range};
use super::front_end::{IN, WRITE_ZEROES};
use super::served::{Served, assert_same, image};
use crate::support::tmp::{TempDir, random_bytes};
use vringd::testing::driver::{Driver, PackedDriver, SplitDriver};

/// `writeback` in config space.
const WCE: u32 = 32;

fn write<D: Driver>(front: &mut FrontEnd<D>, model: &mut [u8], sector: u64, seed: u64) {
    let data = random_bytes(seed, 4096);
    assert_eq!(front.run(OUT, sector, &data, 0).status, 0);
    let at = usize::try_from(sector).unwrap() * 512;
    model[at..at + 4096].copy_from_slice(&data);
    assert_same("read", &front.run(IN, sector, &[], 4096).data, &data);
}

fn follows_the_driver<D: Driver>(cache: &str) {
    let dir = TempDir::new("cache");
    let (path, mut model) = image(&dir);
    let keys = format!("path={},cache={cache}", path.display());
    let served = Served::start(dir, &keys);
    let durable = || served.daemon.counter("disk0", "durable_writes");
    let mut front = served.open::<D>(F_FLUSH | F_CONFIG_WCE);
    assert!(front.has(F_CONFIG_WCE));
    let start = u8::from(cache == "writeback");
    assert_eq!(front.config()[WCE as usize], start);
    let mut want = 0;
    for (number, writeback) in [start, 0, 1, 0].into_iter().enumerate() {
        assert!(front.set_config(WCE, writeback));
        assert_eq!(front.config()[WCE as usize], writeback);
        write(&mut front, &mut model, 8 * number as u64, 7);
        want += u64::from(writeback == 0);
        assert_eq!(durable(), want, "write {number}");
    }
    assert!(!front.set_config(WCE, 2) && !front.set_config(0, 1));
    assert_eq!(front.run(FLUSH, 0, &[], 0).status, 0);
    drop(front);
    // Without FLUSH there is nothing that could make a write durable later.
    let mut front = served.open::<D>(F_CONFIG_WCE | F_WRITE_ZEROES);
    assert!(!front.has(F_FLUSH));
    assert!(front.set_config(WCE, 1));
    write(&mut front, &mut model, 4096, 8);
    assert_eq!(durable(), want + 1);
    let zeroes = front.run(WRITE_ZEROES, 0, &range(4096, 4, 0), 0);
    assert_eq!(zeroes.status, 0);
    model[4096 * 512..4100 * 512].fill(0);
    assert_same("the file", &std::fs::read(&path).unwrap(), &model);
    assert_eq!(served.daemon.counter("disk0", "errors"), 0);
}

#[test]
fn the_cache_follows_the_driver_on_a_split_ring() {
    follows_the_driver::<SplitDriver>("writeback");
}

#[test]
fn the_cache_follows_the_driver_on_a_packed_ring() {
    follows_the_driver::<PackedDriver>("writethrough");
}

#[test]
fn config_space_tells_the_medium() {
    let dir = TempDir::new("topology");
    let (path, _) = image(&dir);
    let block = u32::try_from(std::os::unix::fs::MetadataExt::blksize(
        &path.metadata().unwrap(),
    ));
    let block = block.unwrap();
    for logical in [512, 4096] {
        let keys = format!("path={},block_size={logical},queues=3", path.display());
        let served = Served::start(TempDir::new("topology"), &keys);
        let config = served.open::<SplitDriver>(F_FLUSH).config();
        let word = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
        assert_eq!((word(0), word(4)), (16384, 0), "capacity in sectors");
        assert_eq!(
            (word(8), word(12)),
            ((32 << 20) - 4096, 126),
            "size_max, seg_max"
        );
        assert_eq!(word(20), logical);
        assert_eq!(logical << config[24], block, "physical block");
        assert_eq!(config[25], 0, "alignment offset");
        assert_eq!(word(24) >> 16, block / logical, "least I/O");
        assert_eq!(word(28), 0, "best I/O");
        assert_eq!(config[34..36], [3, 0], "queues");
        assert_eq!(word(44), block / 512, "alignment of discards");
    }
}
