//! The cold part of a disk: features, config space, counters. VIRTIO 1.3 §5.2.3, §5.2.4.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX,
    VIRTIO_BLK_F_TOPOLOGY, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ANY_LAYOUT, VIRTIO_F_NOTIFICATION_DATA, VIRTIO_F_ORDER_PLATFORM, VIRTIO_F_RING_PACKED,
    VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use crate::host::fault::Faults;
use crate::host::limit::DiskLimits;
use crate::sync::Counter;

use super::super::{ConfigWriteError, DeviceKind, DeviceModel, RingOptions};
use super::sick::{self, SickPolicy};
use super::size::DiskSize;
use super::{RangeLimits, SECTOR_BYTES};

/// Data segments of one request that drivers are told to stay below: with header and status, a
/// request fills a ring of 128.
pub const SEG_MAX: u32 = 126;

/// Bytes of one data segment that drivers are told to stay below: with [`SEG_MAX`] of them, a
/// request's length still fits 32 bits. Not a round number: SeaBIOS up to 1.16.2 keeps the low 16
/// bits of such a length (1.16.0), or of its blocks, and reads no blocks for ever where they are 0.
pub const SIZE_MAX: u32 = (32 << 20) - 4096;

/// Bytes of `struct virtio_blk_config` up to the write-zeroes limits.
const CONFIG_BYTES: usize = 60;

/// Where the fields that we set stand in config space.
mod offset {
    pub(super) const CAPACITY: usize = 0;
    pub(super) const SIZE_MAX: usize = 8;
    pub(super) const SEG_MAX: usize = 12;
    pub(super) const BLK_SIZE: usize = 20;
    pub(super) const PHYSICAL_BLOCK_EXP: usize = 24;
    pub(super) const ALIGNMENT_OFFSET: usize = 25;
    pub(super) const MIN_IO_SIZE: usize = 26;
    pub(super) const OPT_IO_SIZE: usize = 28;
    /// `writeback` in the specification.
    pub(super) const WCE: usize = 32;
    pub(super) const NUM_QUEUES: usize = 34;
    pub(super) const MAX_DISCARD_SECTORS: usize = 36;
    pub(super) const MAX_DISCARD_SEG: usize = 40;
    pub(super) const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub(super) const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub(super) const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub(super) const WRITE_ZEROES_MAY_UNMAP: usize = 56;
}

// The layout is the specification's; the bindings have it as a C structure.
const _: () = {
    use virtio_bindings::virtio_blk::virtio_blk_config as spec;
    assert!(core::mem::offset_of!(spec, capacity) == offset::CAPACITY);
    assert!(core::mem::offset_of!(spec, size_max) == offset::SIZE_MAX);
    assert!(core::mem::offset_of!(spec, physical_block_exp) == offset::PHYSICAL_BLOCK_EXP);
    assert!(core::mem::offset_of!(spec, alignment_offset) == offset::ALIGNMENT_OFFSET);
    assert!(core::mem::offset_of!(spec, min_io_size) == offset::MIN_IO_SIZE);
    assert!(core::mem::offset_of!(spec, opt_io_size) == offset::OPT_IO_SIZE);
    assert!(core::mem::offset_of!(spec, wce) == offset::WCE);
    assert!(core::mem::offset_of!(spec, seg_max) == offset::SEG_MAX);
    assert!(core::mem::offset_of!(spec, blk_size) == offset::BLK_SIZE);
    assert!(core::mem::offset_of!(spec, num_queues) == offset::NUM_QUEUES);
    assert!(core::mem::offset_of!(spec, max_discard_sectors) == offset::MAX_DISCARD_SECTORS);
    assert!(core::mem::offset_of!(spec, max_discard_seg) == offset::MAX_DISCARD_SEG);
    let alignment = core::mem::offset_of!(spec, discard_sector_alignment);
    assert!(alignment == offset::DISCARD_SECTOR_ALIGNMENT);
    let sectors = core::mem::offset_of!(spec, max_write_zeroes_sectors);
    assert!(sectors == offset::MAX_WRITE_ZEROES_SECTORS);
    assert!(core::mem::offset_of!(spec, max_write_zeroes_seg) == offset::MAX_WRITE_ZEROES_SEG);
    assert!(core::mem::offset_of!(spec, write_zeroes_may_unmap) == offset::WRITE_ZEROES_MAY_UNMAP);
};

/// What is counted per request queue. One writer: the worker that owns the queue.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct BlkCounters {
    /// IN requests that succeeded.
    pub reads: Counter,
    /// Bytes of those.
    pub read_bytes: Counter,
    /// OUT requests that succeeded.
    pub writes: Counter,
    /// Bytes of those.
    pub write_bytes: Counter,
    /// OUT operations that the host was asked to make durable.
    pub durable_writes: Counter,
    /// FLUSH requests that succeeded.
    pub flushes: Counter,
    /// DISCARD requests that succeeded.
    pub discards: Counter,
    /// Bytes of those.
    pub discard_bytes: Counter,
    /// WRITE_ZEROES requests that succeeded.
    pub write_zeroes: Counter,
    /// Bytes of those.
    pub zeroed_bytes: Counter,
    /// GET_ID requests.
    pub ids: Counter,
    /// Requests answered with IOERR.
    pub errors: Counter,
    /// Requests answered with UNSUPP.
    pub unsupported: Counter,
    /// Chains that no status byte could be written to.
    pub bad_chains: Counter,
    /// Reads and writes that the host did in several parts.
    pub short_ios: Counter,
    /// Operations whose buffers don't suit direct I/O, copied through a bounce buffer.
    pub unaligned: Counter,
    /// Operations on files in memory that were done at once.
    pub at_once: Counter,
    /// Operations that went wrong because that was asked for.
    pub injected: Counter,
    /// Requests that wait for space now.
    pub held: Counter,
    /// Attempts to carry out such requests again.
    pub held_retries: Counter,
    /// Requests that were in flight for longer than they should be.
    pub timeouts: Counter,
    /// Since when the oldest request is in flight, in milliseconds of the model's time; 0 for none.
    pub(super) oldest: Counter,
    /// Requests that a limit held up. Those behind them in the ring are not among them.
    pub throttled: Counter,
    /// How long the queue had requests that a limit held up, in nanoseconds.
    pub throttled_ns: Counter,
}

/// What is told of the medium below, in logical blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct BlkTopology {
    /// A physical block has two to the power of this.
    pub physical_block_exp: u8,
    /// The first block that begins a physical one.
    pub alignment_offset: u8,
    /// The least I/O that is worth while.
    pub min_io: u16,
    /// The best I/O; 0 where there is none.
    pub opt_io: u32,
}

impl BlkTopology {
    /// From lengths in bytes, as the host tells them.
    pub fn from_bytes(
        block_size: u32,
        physical: u32,
        offset: u32,
        min_io: u32,
        opt_io: u32,
    ) -> BlkTopology {
        let exp = (physical / block_size).max(1).ilog2();
        BlkTopology {
            physical_block_exp: u8::try_from(exp).unwrap_or(0),
            alignment_offset: u8::try_from(offset / block_size).unwrap_or(0),
            min_io: u16::try_from(min_io / block_size).unwrap_or(0).max(1),
            opt_io: opt_io / block_size,
        }
    }
}

/// How a disk is set up.
#[derive(Debug, Clone, Default)]
pub struct BlkSetup {
    /// Its name in the configuration.
    pub name: String,
    /// Capacity in bytes at first, a multiple of `block_size`.
    pub capacity_bytes: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Request queues at most.
    pub queues: u16,
    /// The guest may not write.
    pub read_only: bool,
    /// Writes are durable when they are acknowledged, until the driver says otherwise.
    pub write_through: bool,
    /// What is told of the medium below.
    pub topology: BlkTopology,
    /// What it does with ranges that the guest gives up or wants zero.
    pub ranges: RangeLimits,
    /// What GET_ID answers, at most 20 bytes.
    pub serial: String,
    /// What is done when it is full or slow.
    pub sick: SickPolicy,
    /// What was chosen about its vrings.
    pub rings: RingOptions,
    /// How much may pass.
    pub limits: Arc<DiskLimits>,
    /// What goes wrong, for tests.
    pub faults: Arc<Faults>,
}

/// The model of a disk.
#[derive(Debug)]
pub struct BlkModel {
    setup: BlkSetup,
    queues: Box<[Arc<BlkCounters>]>,
    /// Not `writeback` of config space; read by the workers at each write.
    write_through: Arc<AtomicBool>,
    /// The driver can't flush, so that the cache is off whatever was chosen.
    cacheless: AtomicBool,
    size: Arc<DiskSize>,
    born: Instant,
}

impl BlkModel {
    /// A disk as `setup` says.
    pub fn new(setup: BlkSetup) -> BlkModel {
        let queues = (0..setup.queues).map(|_| Arc::default()).collect();
        let write_through = Arc::new(AtomicBool::new(setup.write_through));
        BlkModel {
            size: Arc::new(DiskSize::new(setup.capacity_bytes)),
            setup,
            queues,
            write_through,
            cacheless: AtomicBool::new(false),
            born: Instant::now(),
        }
    }

    /// How it is set up.
    pub fn setup(&self) -> &BlkSetup {
        &self.setup
    }

    /// How large it is, as it changes.
    pub fn size(&self) -> &Arc<DiskSize> {
        &self.size
    }

    /// What the times in the counters count from.
    pub(super) fn born(&self) -> Instant {
        self.born
    }

    /// Whether writes are durable when they are acknowledged, as it changes.
    pub(super) fn write_through(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.write_through)
    }

    /// The counters of queue `index`, if there is such a queue.
    pub fn queue_counters(&self, index: u16) -> Option<&Arc<BlkCounters>> {
        self.queues.get(usize::from(index))
    }
}

impl BlkModel {
    /// The fields about DISCARD and WRITE_ZEROES.
    fn put_ranges(&self, put: &mut impl FnMut(usize, &[u8])) {
        let limits = &self.setup.ranges;
        let mut put_u32 = |at, value: u32| put(at, &value.to_le_bytes());
        let sectors = |bytes: u32| bytes >> SECTOR_BYTES.trailing_zeros();
        if limits.discard {
            let alignment = limits.align_bytes.max(self.setup.block_size);
            put_u32(offset::MAX_DISCARD_SECTORS, sectors(limits.discard_bytes));
            put_u32(offset::MAX_DISCARD_SEG, limits.segments);
            put_u32(offset::DISCARD_SECTOR_ALIGNMENT, sectors(alignment));
        }
        put_u32(offset::MAX_WRITE_ZEROES_SECTORS, sectors(limits.zero_bytes));
        put_u32(offset::MAX_WRITE_ZEROES_SEG, limits.segments);
        let unmaps = limits.discard && limits.zero_unmaps;
        put(offset::WRITE_ZEROES_MAY_UNMAP, &[u8::from(unmaps)]);
    }
}

impl DeviceModel for BlkModel {
    fn name(&self) -> &str {
        &self.setup.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Blk
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_F_VERSION_1,
            VIRTIO_F_ANY_LAYOUT,
            VIRTIO_F_ORDER_PLATFORM,
            VIRTIO_F_NOTIFICATION_DATA,
            VIRTIO_F_RING_PACKED,
            VIRTIO_RING_F_INDIRECT_DESC,
            VIRTIO_RING_F_EVENT_IDX,
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_MQ,
        ];
        if self.setup.read_only {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.push(VIRTIO_BLK_F_CONFIG_WCE);
            bits.push(VIRTIO_BLK_F_WRITE_ZEROES);
            if self.setup.ranges.discard {
                bits.push(VIRTIO_BLK_F_DISCARD);
            }
        }
        bits.into_iter()
            .fold(self.setup.rings.features(), |features, bit| {
                features | 1 << bit
            })
    }

    fn config_changes(&self) -> bool {
        true
    }

    fn vrings_max(&self) -> u16 {
        self.setup.queues
    }

    fn queues_max(&self) -> u16 {
        self.setup.queues
    }

    fn ring_options(&self) -> RingOptions {
        self.setup.rings
    }

    fn config(&self) -> Vec<u8> {
        let mut bytes = vec![0; CONFIG_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(
            offset::CAPACITY,
            &(self.size.told() / SECTOR_BYTES).to_le_bytes(),
        );
        put(offset::SIZE_MAX, &SIZE_MAX.to_le_bytes());
        put(offset::SEG_MAX, &SEG_MAX.to_le_bytes());
        put(offset::BLK_SIZE, &self.setup.block_size.to_le_bytes());
        let topology = &self.setup.topology;
        put(offset::PHYSICAL_BLOCK_EXP, &[topology.physical_block_exp]);
        put(offset::ALIGNMENT_OFFSET, &[topology.alignment_offset]);
        put(offset::MIN_IO_SIZE, &topology.min_io.to_le_bytes());
        put(offset::OPT_IO_SIZE, &topology.opt_io.to_le_bytes());
        let writeback = !self.write_through.load(Ordering::Relaxed);
        put(offset::WCE, &[u8::from(writeback)]);
        put(offset::NUM_QUEUES, &self.setup.queues.to_le_bytes());
        if !self.setup.read_only {
            self.put_ranges(&mut put);
        }
        bytes
    }

    /// A driver that may choose, and can't flush, finds the cache off (VIRTIO 1.3 §5.2.5.2). What
    /// one with the same features as the last chose stays: a front-end tells them anew whenever it
    /// starts the device.
    fn negotiated(&self, features: u64) {
        let has = |bit: u32| features & (1 << bit) != 0;
        let cacheless = has(VIRTIO_BLK_F_CONFIG_WCE) && !has(VIRTIO_BLK_F_FLUSH);
        // Control alone does this, one session at a time.
        if self.cacheless.load(Ordering::Relaxed) != cacheless {
            self.cacheless.store(cacheless, Ordering::Relaxed);
            let write_through = cacheless || self.setup.write_through;
            self.write_through.store(write_through, Ordering::Relaxed);
        }
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        // The only field that a driver may write.
        if let (offset::WCE, &[writeback @ (0 | 1)], false) =
            (offset as usize, bytes, self.setup.read_only)
        {
            // The acknowledgement of this message comes before the driver's next write.
            self.write_through.store(writeback == 0, Ordering::Relaxed);
            return Ok(());
        }
        Err(ConfigWriteError {
            offset,
            len: bytes.len(),
            size: CONFIG_BYTES,
        })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        let sum = |of: fn(&BlkCounters) -> &Counter| {
            self.queues
                .iter()
                .fold(0, |sum: u64, queue| sum.wrapping_add(of(queue).get()))
        };
        let ages = self
            .queues
            .iter()
            .map(|c| sick::age_ms(&c.oldest, self.born));
        vec![
            ("reads", sum(|c| &c.reads)),
            ("read_bytes", sum(|c| &c.read_bytes)),
            ("writes", sum(|c| &c.writes)),
            ("write_bytes", sum(|c| &c.write_bytes)),
            ("durable_writes", sum(|c| &c.durable_writes)),
            ("flushes", sum(|c| &c.flushes)),
            ("discards", sum(|c| &c.discards)),
            ("discard_bytes", sum(|c| &c.discard_bytes)),
            ("write_zeroes", sum(|c| &c.write_zeroes)),
            ("zeroed_bytes", sum(|c| &c.zeroed_bytes)),
            ("ids", sum(|c| &c.ids)),
            ("errors", sum(|c| &c.errors)),
            ("unsupported", sum(|c| &c.unsupported)),
            ("bad_chains", sum(|c| &c.bad_chains)),
            ("short_ios", sum(|c| &c.short_ios)),
            ("unaligned", sum(|c| &c.unaligned)),
            ("at_once", sum(|c| &c.at_once)),
            ("injected", sum(|c| &c.injected)),
            ("held", sum(|c| &c.held)),
            ("held_retries", sum(|c| &c.held_retries)),
            ("timeouts", sum(|c| &c.timeouts)),
            ("oldest_ms", ages.max().unwrap_or(0)),
            ("throttled", sum(|c| &c.throttled)),
            ("throttled_us", sum(|c| &c.throttled_ns) / 1000),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn old_firmware_finds_blocks_to_read_in_the_limits() {
        // In 32 bits, as SeaBIOS does it; it reads up to 127 sectors at once.
        let bytes = SIZE_MAX.checked_mul(SEG_MAX).expect("fits 32 bits");
        for block in [512, 4096] {
            assert!((bytes & 0xffff) / block >= 2, "1.16.0, blocks of {block}");
            assert!((bytes / block) & 0xffff >= 127, "1.16.2, blocks of {block}");
        }
    }

    /// VIRTIO 1.3 §5.2.3, §5.2.4.
    #[test]
    fn config_space_says_what_was_set_up() {
        let setup = BlkSetup {
            rings: RingOptions::default(),
            name: "disk0".into(),
            capacity_bytes: 3 << 20,
            block_size: 4096,
            queues: 5,
            read_only: true,
            serial: "x".into(),
            ..BlkSetup::default()
        };
        let model = BlkModel::new(setup);
        let bytes = model.config();
        assert_eq!(bytes[..8], 6144u64.to_le_bytes());
        assert_eq!(bytes[12..16], 126u32.to_le_bytes());
        assert_eq!(bytes[20..24], 4096u32.to_le_bytes());
        assert_eq!(bytes[8..12], SIZE_MAX.to_le_bytes());
        assert_eq!(bytes[34..36], 5u16.to_le_bytes());
        assert_ne!(model.features() & (1 << VIRTIO_BLK_F_RO), 0);
        assert!(model.write_config(32, &[1]).is_err());
        assert_eq!(bytes[36..], [0; 24], "no ranges where nothing is written");
    }

    #[test]
    fn the_topology_is_told_in_logical_blocks() {
        let setup = BlkSetup {
            block_size: 512,
            topology: BlkTopology::from_bytes(512, 4096, 1024, 4096, 1 << 20),
            ..BlkSetup::default()
        };
        let bytes = BlkModel::new(setup).config();
        assert_eq!(bytes[24..32], [3, 2, 8, 0, 0, 8, 0, 0]);
        let same = BlkTopology::from_bytes(4096, 512, 0, 0, 0);
        assert_eq!(
            (same.physical_block_exp, same.min_io, same.opt_io),
            (0, 1, 0)
        );
    }

    /// VIRTIO 1.3 §5.2.5.2.
    #[test]
    fn a_driver_that_can_not_flush_finds_the_cache_off() {
        let both = (1 << VIRTIO_BLK_F_CONFIG_WCE) | (1 << VIRTIO_BLK_F_FLUSH);
        let model = BlkModel::new(BlkSetup::default());
        let shows = |writeback| assert_eq!(model.config()[32], writeback);
        model.negotiated(both);
        shows(1);
        model.write_config(32, &[0]).unwrap();
        model.negotiated(both);
        shows(0);
        model.write_config(32, &[1]).unwrap();
        model.negotiated(1 << VIRTIO_BLK_F_CONFIG_WCE);
        shows(0);
        model.write_config(32, &[1]).unwrap();
        model.negotiated(1 << VIRTIO_BLK_F_CONFIG_WCE);
        shows(1);
        model.negotiated(both);
        shows(1);
    }

    #[test]
    fn the_driver_chooses_between_write_back_and_write_through() {
        for write_through in [false, true] {
            let model = BlkModel::new(BlkSetup {
                write_through,
                ..BlkSetup::default()
            });
            assert_ne!(model.features() & (1 << VIRTIO_BLK_F_CONFIG_WCE), 0);
            assert_eq!(model.config()[32], u8::from(!write_through));
            for writeback in [0, 1, 0] {
                model.write_config(32, &[writeback]).unwrap();
                assert_eq!(model.config()[32], writeback);
            }
            for (at, bytes) in [
                (32, &[2][..]),
                (32, &[1, 0]),
                (31, &[1]),
                (33, &[1]),
                (32, &[]),
            ] {
                model.write_config(at, bytes).unwrap_err();
            }
            assert_eq!(model.config()[32], 0);
        }
        let read_only = BlkModel::new(BlkSetup {
            read_only: true,
            ..BlkSetup::default()
        });
        assert_eq!(read_only.features() & (1 << VIRTIO_BLK_F_CONFIG_WCE), 0);
        read_only.write_config(32, &[0]).unwrap_err();
    }

    #[test]
    fn config_space_tells_the_limits_of_ranges() {
        let mut setup = BlkSetup {
            ranges: RangeLimits::file(4096, u64::MAX),
            block_size: 512,
            ..BlkSetup::default()
        };
        let word = |bytes: &[u8], at: usize| {
            u32::from_le_bytes(core::array::from_fn(|index| bytes[at + index]))
        };
        let bytes = BlkModel::new(setup.clone()).config();
        let words = [36, 40, 44, 48, 52].map(|at| word(&bytes, at));
        assert_eq!(words, [524_288, 32, 8, 32_768, 32]);
        assert_eq!(bytes[56..], [1, 0, 0, 0]);
        setup.ranges.discard = false;
        let model = BlkModel::new(setup);
        assert_eq!(model.features() & (1 << VIRTIO_BLK_F_DISCARD), 0);
        assert_ne!(model.features() & (1 << VIRTIO_BLK_F_WRITE_ZEROES), 0);
        let bytes = model.config();
        let words = [36, 40, 44, 48, 52].map(|at| word(&bytes, at));
        assert_eq!(words, [0, 0, 0, 32_768, 32]);
        assert_eq!(bytes[56], 0, "no space is given back");
    }
}
