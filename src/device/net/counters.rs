//! What a net device counts, per queue pair and direction.
//!
//! Directions are the guest's: `tx` is what it sends. Each direction has one writer, the worker
//! that owns the vring; it adds once per burst ([`Tally`]). A frame that is lost between two guests
//! is counted on both: as sent in vain by one, as not received by the other.

use std::sync::Arc;

use crate::host::net::{Cast, DropReason, Frame, Verdict};
use crate::sync::Counter;

/// Names of the drop counters of the sending direction, in the order of [`DropReason::NAMES`].
const TX_DROPS: [&str; DropReason::COUNT] = [
    "tx_drop_rx_too_small",
    "tx_drop_rx_ring_too_small",
    "tx_drop_no_offload",
    "tx_drop_bad_vnet_header",
    "tx_drop_bad_chain",
    "tx_drop_too_big",
    "tx_drop_host_full",
    "tx_drop_host_error",
    "tx_drop_sink",
    "tx_drop_peer_broken",
    "tx_drop_peer_full",
    "tx_drop_peer_down",
    "tx_drop_bad_frame",
    "tx_drop_vlan",
    "tx_drop_spoofed",
    "tx_drop_storm",
    "tx_drop_isolated",
    "tx_drop_mtu",
    "tx_drop_policed",
    "tx_drop_no_port",
    "tx_drop_disabled",
];

/// Names of the drop counters of the receiving direction, in the same order.
const RX_DROPS: [&str; DropReason::COUNT] = [
    "rx_drop_rx_too_small",
    "rx_drop_rx_ring_too_small",
    "rx_drop_no_offload",
    "rx_drop_bad_vnet_header",
    "rx_drop_bad_chain",
    "rx_drop_too_big",
    "rx_drop_host_full",
    "rx_drop_host_error",
    "rx_drop_sink",
    "rx_drop_peer_broken",
    "rx_drop_peer_full",
    "rx_drop_peer_down",
    "rx_drop_bad_frame",
    "rx_drop_vlan",
    "rx_drop_spoofed",
    "rx_drop_storm",
    "rx_drop_isolated",
    "rx_drop_mtu",
    "rx_drop_policed",
    "rx_drop_no_port",
    "rx_drop_disabled",
];

/// Bins for the sizes of frames, with the names that DPDK's virtio drivers give them.
pub const SIZES: [&str; 8] = [
    "undersize_packets",
    "size_64_packets",
    "size_65_127_packets",
    "size_128_255_packets",
    "size_256_511_packets",
    "size_512_1023_packets",
    "size_1024_1518_packets",
    "size_1519_max_packets",
];

/// Frames for groups and for all, with the names that DPDK's virtio drivers give them.
const CASTS: [&str; 2] = ["multicast_packets", "broadcast_packets"];

/// The bin of a frame.
#[inline]
fn bin(bytes: u64) -> usize {
    match bytes {
        0..64 => 0,
        64 => 1,
        65..128 => 2,
        128..256 => 3,
        256..512 => 4,
        512..1024 => 5,
        1024..1519 => 6,
        _ => 7,
    }
}

/// The counters of one direction of one queue pair, on cache lines of their own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub struct Direction {
    frames: Counter,
    bytes: Counter,
    bursts: Counter,
    /// Frames that went through the bounce buffer because the guest's buffers did not suffice.
    bounced: Counter,
    /// Frames whose checksum we completed for the receiver.
    software_csum: Counter,
    /// Frames that we cut from larger ones for the receiver.
    software_segments: Counter,
    /// Frames delivered, by size.
    sizes: [Counter; SIZES.len()],
    /// Frames delivered, for groups and for all.
    casts: [Counter; CASTS.len()],
    drops: [Counter; DropReason::COUNT],
}

impl Direction {
    /// Adds what one burst counted, and one burst. Only the owner of the vring may call this.
    #[inline]
    pub fn add(&self, tally: &Tally) {
        let Run { bytes, frames } = tally.run;
        self.bursts.add(1);
        self.frames.add(tally.frames + frames);
        self.bytes.add(tally.bytes + bytes * frames);
        self.sizes[bin(bytes)].add(frames);
        if tally.rare {
            for (counter, &count) in self.sizes.iter().zip(&tally.sizes) {
                counter.add(count);
            }
            for (counter, &count) in self.casts.iter().zip(&tally.casts) {
                counter.add(count);
            }
            self.bounced.add(tally.bounced);
            self.software_csum.add(tally.software_csum);
            self.software_segments.add(tally.software_segments);
            for (counter, &count) in self.drops.iter().zip(&tally.drops) {
                counter.add(count);
            }
        }
    }

    /// Adds what another one has counted so far, for a sum that is told by name.
    fn add_all(&self, other: &Direction) {
        let to = self.sizes.iter().chain(&self.casts).chain(&self.drops);
        let from = other.sizes.iter().chain(&other.casts).chain(&other.drops);
        to.zip(from).for_each(|(to, from)| to.add(from.get()));
        self.frames.add(other.frames());
        self.bytes.add(other.bytes());
    }

    /// Adds frames that were lost before they came to a vring. As [`Direction::add`].
    #[cold]
    pub fn add_lost(&self, reason: DropReason, count: usize) {
        self.drops[reason as usize].add(count as u64);
    }

    /// Frames delivered.
    pub fn frames(&self) -> u64 {
        self.frames.get()
    }

    /// Bytes delivered, without virtio-net headers.
    pub fn bytes(&self) -> u64 {
        self.bytes.get()
    }

    /// Frames delivered, in the bins of [`SIZES`].
    pub fn sizes(&self) -> [u64; SIZES.len()] {
        self.sizes.each_ref().map(Counter::get)
    }

    /// Frames delivered, for groups and for all.
    pub fn casts(&self) -> [u64; CASTS.len()] {
        self.casts.each_ref().map(Counter::get)
    }

    /// All of them, by the names that DPDK has for a queue of this direction (`rx` or `tx`) and
    /// number, or for a port; our own names where it has none. Drops only where there were some.
    fn named(&self, direction: &str, queue: Option<usize>, drops: &[&str]) -> Vec<(String, u64)> {
        let of = queue.map_or_else(String::new, |queue| format!("q{queue}_"));
        let count = |name: &str, value: u64| (format!("{direction}_{of}{name}"), value);
        let mut all = vec![
            count("good_packets", self.frames()),
            count("good_bytes", self.bytes()),
        ];
        all.extend(
            SIZES
                .into_iter()
                .zip(self.sizes())
                .map(|(n, v)| count(n, v)),
        );
        let casts = CASTS.into_iter().zip(self.casts());
        all.extend(casts.map(|(n, v)| count(n, v)));
        let dropped = self.drops.each_ref().map(Counter::get);
        all.push(count("errors", dropped.iter().sum()));
        for (name, value) in drops.iter().zip(dropped).filter(|(_, value)| *value > 0) {
            let reason = name.trim_start_matches(direction).trim_start_matches('_');
            all.push(count(reason, value));
        }
        all
    }

    /// Frames dropped for `reason`.
    pub fn dropped(&self, reason: DropReason) -> u64 {
        self.drops[reason as usize].get()
    }

    /// Frames that took the bounce buffer.
    pub fn bounced(&self) -> u64 {
        self.bounced.get()
    }

    /// Frames whose checksum was completed in software.
    pub fn software_csum(&self) -> u64 {
        self.software_csum.get()
    }

    /// Frames that were cut from larger ones in software.
    pub fn software_segments(&self) -> u64 {
        self.software_segments.get()
    }
}

/// The counters of one queue pair.
#[derive(Debug, Default)]
pub struct QueueCounters {
    /// What the guest sends.
    pub tx: Direction,
    /// What the guest receives.
    pub rx: Direction,
}

/// The counters of a device.
#[derive(Debug)]
pub struct NetCounters {
    pairs: Box<[Arc<QueueCounters>]>,
}

impl NetCounters {
    /// Counters for `pairs` queue pairs.
    pub fn new(pairs: u16) -> NetCounters {
        NetCounters {
            pairs: (0..pairs).map(|_| Arc::default()).collect(),
        }
    }

    /// The counters of queue pair `index`, if there is such a pair.
    pub fn pair(&self, index: u16) -> Option<&Arc<QueueCounters>> {
        self.pairs.get(usize::from(index))
    }

    /// The sums over all queue pairs, and then the counters of each that was ever in use, by the
    /// names that DPDK has.
    pub fn by_queue(&self) -> Vec<Vec<(String, u64)>> {
        let named = |pair: &QueueCounters, queue| {
            let mut all = pair.rx.named("rx", queue, &RX_DROPS);
            all.extend(pair.tx.named("tx", queue, &TX_DROPS));
            all
        };
        let port = QueueCounters::default();
        for pair in &self.pairs {
            port.rx.add_all(&pair.rx);
            port.tx.add_all(&pair.tx);
        }
        let used = |pair: &Arc<QueueCounters>| pair.rx.bursts.get() + pair.tx.bursts.get() > 0;
        let pairs = self.pairs.iter().enumerate();
        let pairs = pairs.filter(|(_, pair)| used(pair));
        let pairs = pairs.map(|(queue, pair)| named(pair, Some(queue)));
        core::iter::once(named(&port, None)).chain(pairs).collect()
    }

    /// The sums over all queue pairs, by name.
    pub fn totals(&self) -> Vec<(&'static str, u64)> {
        let sum = |get: &dyn Fn(&QueueCounters) -> u64| {
            self.pairs
                .iter()
                .fold(0, |sum: u64, pair| sum.wrapping_add(get(pair)))
        };
        let mut totals = vec![
            ("rx_frames", sum(&|pair| pair.rx.frames.get())),
            ("rx_bytes", sum(&|pair| pair.rx.bytes.get())),
            ("rx_bursts", sum(&|pair| pair.rx.bursts.get())),
            ("rx_bounced", sum(&|pair| pair.rx.bounced.get())),
            ("rx_software_csum", sum(&|pair| pair.rx.software_csum.get())),
            (
                "rx_software_segments",
                sum(&|pair| pair.rx.software_segments.get()),
            ),
            ("tx_frames", sum(&|pair| pair.tx.frames.get())),
            ("tx_bytes", sum(&|pair| pair.tx.bytes.get())),
            ("tx_bursts", sum(&|pair| pair.tx.bursts.get())),
        ];
        for (reason, (rx, tx)) in RX_DROPS.into_iter().zip(TX_DROPS).enumerate() {
            totals.push((rx, sum(&|pair| pair.rx.drops[reason].get())));
            totals.push((tx, sum(&|pair| pair.tx.drops[reason].get())));
        }
        totals
    }
}

/// Frames of one size in a row.
#[derive(Debug, Default, Clone, Copy)]
struct Run {
    /// The size.
    bytes: u64,
    frames: u64,
}

/// What one burst counts, before it is added.
#[derive(Debug, Default)]
pub struct Tally {
    /// The last frames: sizes come in runs, and counting one more is all that most frames cost.
    run: Run,
    /// The frames before them, and their bytes.
    frames: u64,
    bytes: u64,
    bounced: u64,
    software_csum: u64,
    software_segments: u64,
    drops: [u64; DropReason::COUNT],
    /// The frames before the last run, by size.
    sizes: [u64; SIZES.len()],
    /// Frames for groups and for all.
    casts: [u64; CASTS.len()],
    /// Something beside frames, bytes and one run was counted.
    rare: bool,
}

impl Tally {
    /// A frame of `bytes` bytes was delivered.
    #[inline]
    pub fn sent(&mut self, bytes: u64, cast: Cast) {
        if cast != Cast::Unicast {
            self.casts[usize::from(cast == Cast::Broadcast)] += 1;
            self.rare = true;
        }
        if bytes != self.run.bytes {
            self.end_run(bytes);
        }
        self.run.frames += 1;
    }

    /// Frames of another size begin.
    #[inline]
    fn end_run(&mut self, next: u64) {
        let Run { bytes, frames } = core::mem::replace(
            &mut self.run,
            Run {
                bytes: next,
                frames: 0,
            },
        );
        if frames > 0 {
            self.frames += frames;
            self.bytes += bytes * frames;
            self.sizes[bin(bytes)] += frames;
            self.rare = true;
        }
    }

    /// A frame was dropped.
    #[inline]
    pub fn dropped(&mut self, reason: DropReason) {
        self.drops[reason as usize] += 1;
        self.rare = true;
    }

    /// A frame took the bounce buffer.
    pub fn bounced(&mut self) {
        self.bounced += 1;
        self.rare = true;
    }

    /// A frame was completed in software: its checksum, or so many segments of it.
    pub fn completed(&mut self, segments: Option<usize>) {
        match segments {
            Some(count) => self.software_segments += count as u64,
            None => self.software_csum += 1,
        }
        self.rare = true;
    }

    /// Whether nothing was counted.
    #[inline]
    pub fn is_empty(&self) -> bool {
        self.run.frames == 0 && !self.rare
    }

    /// Counts `frame` by its verdict.
    #[inline]
    pub fn frame(&mut self, frame: &Frame) {
        match frame.verdict {
            Verdict::Sent => self.sent(u64::from(frame.bytes), frame.cast),
            Verdict::Dropped(reason) => self.dropped(reason),
            Verdict::Retry => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_reasons_are_in_step() {
        for (index, (reason, name)) in DropReason::NAMES.into_iter().enumerate() {
            assert_eq!(reason as usize, index);
            assert_eq!(RX_DROPS[index], format!("rx_{name}"));
            assert_eq!(TX_DROPS[index], format!("tx_{name}"));
        }
    }

    #[test]
    fn sizes_are_counted_in_the_bins_of_dpdk() {
        let direction = Direction::default();
        let sizes = [
            60, 63, 64, 64, 65, 127, 128, 255, 256, 511, 512, 1023, 1024, 1518, 1519, 9000,
        ];
        for turn in 0..2 {
            let mut tally = Tally::default();
            for &size in &sizes[..sizes.len() - turn] {
                tally.sent(size, Cast::Unicast);
            }
            direction.add(&tally);
        }
        assert_eq!(direction.sizes(), [4, 4, 4, 4, 4, 4, 4, 3]);
        let named = direction.named("rx", Some(3), &RX_DROPS);
        let bins = named.iter().filter(|(name, _)| name.contains("size"));
        assert_eq!(
            bins.map(|(_, count)| count).sum::<u64>(),
            direction.frames()
        );
        assert_eq!(named[0], ("rx_q3_good_packets".to_owned(), 31));
        assert_eq!(named[3], ("rx_q3_size_64_packets".to_owned(), 4));
    }

    #[test]
    fn the_port_is_listed_and_queues_that_were_never_used_are_not() {
        let counters = NetCounters::new(3);
        let mut tally = Tally::default();
        tally.sent(100, Cast::Multicast);
        tally.dropped(DropReason::TooBig);
        counters.pair(1).unwrap().tx.add(&tally);
        counters.pair(2).unwrap().tx.add(&tally);
        let queues = counters.by_queue();
        assert_eq!(queues.len(), 3);
        let port = |name: &str| queues[0].iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        assert_eq!(port("rx_good_packets"), Some(0));
        assert_eq!(port("tx_good_packets"), Some(2));
        assert_eq!(port("tx_good_bytes"), Some(200));
        assert_eq!(port("tx_size_65_127_packets"), Some(2));
        assert_eq!(port("tx_multicast_packets"), Some(2));
        assert_eq!(port("tx_errors"), Some(2));
        assert_eq!(port("tx_drop_too_big"), Some(2));
        let of = |name: &str| queues[1].iter().find(|(n, _)| n == name).map(|(_, v)| *v);
        assert_eq!(of("rx_q1_good_packets"), Some(0));
        assert_eq!(of("tx_q1_good_bytes"), Some(100));
        assert_eq!(of("tx_q1_size_65_127_packets"), Some(1));
        assert_eq!(of("tx_q1_multicast_packets"), Some(1));
        assert_eq!(of("tx_q1_broadcast_packets"), Some(0));
        assert_eq!(of("tx_q1_errors"), Some(1));
        assert_eq!(of("tx_q1_drop_too_big"), Some(1));
        assert_eq!(of("tx_q1_drop_sink"), None);
    }

    #[test]
    fn totals_are_the_sums_over_the_pairs() {
        let counters = NetCounters::new(2);
        for index in 0..2 {
            let mut tally = Tally::default();
            tally.sent(60, Cast::Unicast);
            tally.dropped(DropReason::TooBig);
            tally.bounced();
            let pair = counters.pair(index).unwrap();
            pair.rx.add(&tally);
            pair.tx.add(&tally);
            pair.tx.add(&tally);
        }
        assert!(counters.pair(2).is_none());
        let totals = counters.totals();
        let of = |name| totals.iter().find(|(n, _)| *n == name).unwrap().1;
        assert_eq!(
            (of("rx_frames"), of("rx_bytes"), of("rx_bursts")),
            (2, 120, 2)
        );
        assert_eq!(
            (of("tx_frames"), of("tx_bytes"), of("tx_bursts")),
            (4, 240, 4)
        );
        assert_eq!(
            (
                of("rx_bounced"),
                of("rx_drop_too_big"),
                of("tx_drop_too_big")
            ),
            (2, 2, 4)
        );
        assert_eq!((of("rx_drop_sink"), of("tx_drop_sink")), (0, 0));
    }
}
