//! `NetModel`: what control asks of a net device, features and config space. VIRTIO 1.3 §5.1.4.
//!
//! The control queue and what hangs on it (CTRL_*) are the front-end's: it has no vring here.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use virtio_bindings::virtio_net::VIRTIO_NET_S_LINK_UP;

use crate::device::{ConfigWriteError, DeviceKind, DeviceModel, RingOptions};
use crate::host::limit::PortLimits;

use super::counters::{NetCounters, QueueCounters};
use super::feature;

/// Bytes of `struct virtio_net_config`, to its last field.
const CONFIG_BYTES: usize = 24;

/// Speed that nobody knows; the same for duplex, in one byte.
const UNKNOWN: u32 = u32::MAX;

/// Queue pairs at most (VIRTIO_NET_CTRL_MQ_VQ_PAIRS_MAX).
pub const QUEUE_PAIRS_MAX: u16 = 0x8000;

/// Offloads that a link passes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Offloads {
    /// Unfinished checksums, both ways.
    pub csum: bool,
    /// TSO over IPv4 and IPv6, with ECN, both ways; needs `csum`.
    pub tso: bool,
    /// UDP segmentation, both ways; needs `csum`.
    pub uso: bool,
}

impl Offloads {
    /// Checksums and TSO: what a guest link or a tap passes through.
    pub const CSUM_TSO: Offloads = Offloads {
        csum: true,
        tso: true,
        uso: false,
    };

    /// All.
    pub const ALL: Offloads = Offloads {
        csum: true,
        tso: true,
        uso: true,
    };

    /// The feature bits.
    pub fn features(self) -> u64 {
        let Offloads { csum, tso, uso } = self;
        let mut features = 0;
        if csum {
            features |= feature::CSUM | feature::GUEST_CSUM;
        }
        if csum && tso {
            features |= feature::HOST_TSO4 | feature::HOST_TSO6 | feature::HOST_ECN;
            features |= feature::GUEST_TSO4 | feature::GUEST_TSO6 | feature::GUEST_ECN;
        }
        if csum && uso {
            features |= feature::HOST_USO | feature::GUEST_USO4 | feature::GUEST_USO6;
        }
        features
    }
}

/// Whether both ends of a link may send at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Duplex {
    /// One of them (DUPLEX_HALF).
    Half = 0,
    /// Both (DUPLEX_FULL).
    Full = 1,
}

/// What a guest is told of the link.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LinkInfo {
    /// It may come and go, and the guest is told.
    pub has_status: bool,
    /// In Mbit/s, at most 2^31-1.
    pub speed: Option<u32>,
    /// Whether both ends may send at a time.
    pub duplex: Option<Duplex>,
}

/// How a net device is set up.
#[derive(Debug, Clone)]
pub struct NetOptions {
    /// Its name in the configuration.
    pub name: String,
    /// Queue pairs, at least 1.
    pub queue_pairs: u16,
    /// The MAC address that the guest is told, if any.
    pub mac: Option<[u8; 6]>,
    /// The largest MTU that the guest is told, if any.
    pub mtu: Option<u16>,
    /// What the link passes through.
    pub offloads: Offloads,
    /// What the guest is told of the link.
    pub link: LinkInfo,
    /// What was chosen about its vrings.
    pub rings: RingOptions,
}

/// The model of a net device.
#[derive(Debug)]
pub struct NetModel {
    options: NetOptions,
    counters: NetCounters,
    limits: Arc<PortLimits>,
    link_up: AtomicBool,
}

impl NetModel {
    /// A net device as `options` says.
    pub fn new(options: NetOptions) -> NetModel {
        let counters = NetCounters::new(options.queue_pairs);
        NetModel {
            options,
            counters,
            limits: Arc::default(),
            link_up: AtomicBool::new(true),
        }
    }

    /// How much the port may send and receive: no limit until one is set.
    pub fn limits(&self) -> &Arc<PortLimits> {
        &self.limits
    }

    /// The counters of queue pair `index`, if there is such a pair.
    pub fn pair_counters(&self, index: u16) -> Option<&Arc<QueueCounters>> {
        self.counters.pair(index)
    }

    /// The largest MTU that the guest is told, if any.
    pub fn mtu(&self) -> Option<u16> {
        self.options.mtu
    }
}

impl DeviceModel for NetModel {
    fn name(&self) -> &str {
        &self.options.name
    }

    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn features(&self) -> u64 {
        let when = |on: bool, bit: u64| if on { bit } else { 0 };
        feature::RING
            | feature::MRG_RXBUF
            | self.options.rings.features()
            | self.options.offloads.features()
            | when(self.options.queue_pairs > 1, feature::MQ)
            | when(self.options.mac.is_some(), feature::MAC)
            | when(self.options.mtu.is_some(), feature::MTU)
            | when(self.options.link.has_status, feature::STATUS)
            | when(
                self.options.link.speed.is_some() || self.options.link.duplex.is_some(),
                feature::SPEED_DUPLEX,
            )
    }

    fn vrings_max(&self) -> u16 {
        self.options.queue_pairs.saturating_mul(2)
    }

    fn queues_max(&self) -> u16 {
        self.options.queue_pairs
    }

    fn ring_options(&self) -> RingOptions {
        self.options.rings
    }

    fn config(&self) -> Vec<u8> {
        let mut config = vec![0; CONFIG_BYTES];
        #[expect(clippy::cast_possible_truncation, reason = "1")]
        let status = match self.link_up.load(Ordering::Relaxed) {
            true => VIRTIO_NET_S_LINK_UP as u16,
            false => 0,
        };
        let LinkInfo { speed, duplex, .. } = self.options.link;
        config[0..6].copy_from_slice(&self.options.mac.unwrap_or_default());
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.options.queue_pairs.to_le_bytes());
        config[10..12].copy_from_slice(&self.options.mtu.unwrap_or_default().to_le_bytes());
        config[12..16].copy_from_slice(&speed.unwrap_or(UNKNOWN).to_le_bytes());
        config[16] = duplex.map_or(UNKNOWN.to_le_bytes()[0], |duplex| duplex as u8);
        config
    }

    fn write_config(&self, offset: u32, bytes: &[u8]) -> Result<(), ConfigWriteError> {
        Err(ConfigWriteError {
            offset,
            len: bytes.len(),
            size: CONFIG_BYTES,
        })
    }

    fn has_link_status(&self) -> bool {
        self.options.link.has_status
    }

    fn set_link(&self, up: bool) -> bool {
        self.link_up.swap(up, Ordering::Relaxed) != up
    }

    fn only_in_config(&self) -> Vec<String> {
        let NetOptions { mac, link, .. } = &self.options;
        let mac = mac.map(|mac| {
            let octets = mac.map(|octet| format!("{octet:02x}"));
            format!("mac {}", octets.join(":"))
        });
        let speed = link.speed.map(|speed| format!("speed {speed}"));
        let duplex = link.duplex.map(|duplex| match duplex {
            Duplex::Half => "duplex half".to_owned(),
            Duplex::Full => "duplex full".to_owned(),
        });
        [mac, speed, duplex].into_iter().flatten().collect()
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.counters.totals()
    }

    fn queue_counters(&self) -> Vec<Vec<(String, u64)>> {
        self.counters.by_queue()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model(queue_pairs: u16, mac: Option<[u8; 6]>, mtu: Option<u16>) -> NetModel {
        let offloads = Offloads::CSUM_TSO;
        NetModel::new(NetOptions {
            name: "net0".into(),
            queue_pairs,
            mac,
            mtu,
            offloads,
            link: LinkInfo::default(),
            rings: RingOptions::default(),
        })
    }

    /// VIRTIO 1.3 §5.1.3.
    #[test]
    fn only_what_is_configured_is_offered() {
        let plain = model(1, None, None).features();
        assert_eq!(plain & (feature::MQ | feature::MAC | feature::MTU), 0);
        assert_eq!(plain & feature::HOST_USO, 0);
        let full = model(2, Some([2, 0, 0, 0, 0, 1]), Some(9000)).features();
        assert_eq!(full & !plain, feature::MQ | feature::MAC | feature::MTU);
        // VERSION_1, RING_PACKED, IN_ORDER, INDIRECT_DESC, EVENT_IDX by their numbers in the text.
        for bit in [
            32, 34, 35, 27, 28, 29, 36, 38, 15, 0, 1, 7, 8, 9, 11, 12, 13,
        ] {
            assert_ne!(plain & (1 << bit), 0, "bit {bit}");
        }
        // CTRL_VQ and UFO are not ours, and STATUS takes a link.
        for bit in [17, 16, 10, 14] {
            assert_eq!(full & (1 << bit), 0, "bit {bit}");
        }
    }

    /// VIRTIO 1.3 §5.1.3.1: what a feature requires.
    #[test]
    fn segmentation_is_never_offered_without_checksums() {
        let without = Offloads {
            csum: false,
            tso: true,
            uso: true,
        };
        assert_eq!(without.features(), 0);
        let with = Offloads {
            csum: true,
            tso: false,
            uso: true,
        };
        let bits = [0, 1, 54, 55, 56]
            .iter()
            .fold(0, |bits, bit| bits | 1u64 << bit);
        assert_eq!(with.features(), bits);
    }

    /// VIRTIO 1.3 §5.1.4.
    #[test]
    fn config_space_has_the_fields_of_the_text_little_endian() {
        let config = model(4, Some([2, 3, 4, 5, 6, 7]), Some(9000)).config();
        assert_eq!(config[..12], [2, 3, 4, 5, 6, 7, 1, 0, 4, 0, 0x28, 0x23]);
        assert_eq!(config.len(), 24);
    }

    #[test]
    fn link_status_speed_and_duplex_are_offered_where_they_are_known() {
        let bits = 1 << 16 | 1u64 << 63;
        let with = |link: LinkInfo| {
            let mut model = model(1, None, None);
            model.options.link = link;
            model
        };
        let plain = with(LinkInfo::default());
        assert_eq!(plain.features() & bits, 0);
        assert_eq!(plain.config()[6..8], [1, 0]);
        assert_eq!(plain.config()[12..17], [0xff; 5]);
        assert!(plain.only_in_config().is_empty());
        let told = with(LinkInfo {
            has_status: true,
            speed: Some(25_000),
            duplex: Some(Duplex::Full),
        });
        assert_eq!(told.features() & bits, bits);
        assert_eq!(told.config()[12..17], [0xa8, 0x61, 0, 0, 1]);
        assert_eq!(told.only_in_config(), ["speed 25000", "duplex full"]);
        assert!(!told.set_link(true), "no change");
        assert!(told.set_link(false));
        assert_eq!(told.config()[6..8], [0, 0]);
        assert!(told.set_link(true));
        assert_eq!(told.config()[6..8], [1, 0]);
        let half = with(LinkInfo {
            duplex: Some(Duplex::Half),
            ..LinkInfo::default()
        });
        assert_eq!(half.features() & bits, 1 << 63);
        assert_eq!(half.config()[12..17], [0xff, 0xff, 0xff, 0xff, 0]);
        let mac = model(1, Some([2, 0, 0xab, 0, 0, 1]), None);
        assert_eq!(mac.only_in_config(), ["mac 02:00:ab:00:00:01"]);
    }

    #[test]
    fn config_space_is_read_only() {
        let error = model(1, None, None).write_config(0, &[1]).unwrap_err();
        assert_eq!(
            error,
            ConfigWriteError {
                offset: 0,
                len: 1,
                size: 24
            }
        );
    }

    #[test]
    fn vrings_are_two_per_pair_and_each_pair_counts_for_itself() {
        let model = model(3, None, None);
        assert_eq!((model.queues_max(), model.vrings_max()), (3, 6));
        assert!(model.pair_counters(2).is_some());
        assert!(model.pair_counters(3).is_none());
    }
}
