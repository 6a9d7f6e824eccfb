//! Where the rings, requests and data of all queues lie.

use super::super::memory::{GPA, LINE, PAGE, TO_UVA};
use crate::config::{BenchBlkConfig, Chains};
use crate::ring::RingFormat;

/// Parts of a request's place: the table of an indirect chain has a line of its own, which stays
/// unchanged; the header is beside the status, as in a guest.
pub(super) const HEADER_AT: usize = 0;
pub(super) const STATUS_AT: usize = 16;
pub(super) const TABLE_AT: usize = 64;
pub(super) const SLOT_BYTES: usize = 2 * LINE;

/// Least size of a ring that is chosen here: that of many guests.
const RING_MIN: u32 = 128;
/// The largest that there is (VIRTIO 1.3 §2.7).
const RING_MAX: u32 = 32768;

/// The places of all queues.
#[derive(Debug)]
pub(super) struct Layout {
    places: Vec<Place>,
    bytes: u64,
    /// Descriptors of a ring.
    pub ring_size: u16,
    /// Descriptors of a chain.
    pub chain: u16,
}

/// The place of one queue.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Guest physical addresses of descriptor, driver and device area.
    rings: [u64; 3],
    /// Guest physical address of the first request.
    slots: u64,
    /// From there to the data of the first request, and to the end.
    pub data_at: usize,
    pub bytes: usize,
    /// From the data of one request to that of the next.
    pub stride: usize,
}

impl Place {
    /// Front-end addresses of descriptor, driver and device area.
    pub(super) fn rings_at(&self) -> [u64; 3] {
        self.rings.map(|gpa| gpa + TO_UVA)
    }

    /// Front-end address of the first request.
    pub(super) fn slots_at(&self) -> u64 {
        self.slots + TO_UVA
    }

    /// Guest physical address of what lies `offset` behind the first request.
    pub(super) fn gpa(&self, offset: usize) -> u64 {
        self.slots + offset as u64
    }
}

impl Layout {
    /// Places for what `config` asks for, with rings of format `F`. `None` when the ring has not
    /// enough descriptors for the requests in flight.
    pub(super) fn new<F: RingFormat>(config: &BenchBlkConfig) -> Option<Layout> {
        let chain = match config.chains {
            Chains::Direct => 3,
            Chains::Indirect => 1,
        };
        // One more, to flush.
        let slots = usize::from(config.io_depth) + 1;
        let needed = (u32::from(config.io_depth) + 1) * u32::from(chain);
        let chosen = needed.next_power_of_two().max(RING_MIN);
        let ring_size = config.ring_size.map_or(chosen, u32::from);
        if needed > ring_size || ring_size > RING_MAX {
            return None;
        }
        let ring_size = u16::try_from(ring_size).ok()?;
        let rings = F::area_bytes(ring_size).map(|bytes| bytes.next_multiple_of(LINE));
        let stride = (config.block_bytes as usize).next_multiple_of(PAGE);
        let data_at = (slots * SLOT_BYTES).next_multiple_of(PAGE);
        let bytes = data_at + stride * slots;
        let mut end = GPA;
        let place = |_| {
            let desc = end.next_multiple_of(PAGE as u64);
            let driver = desc + rings[0] as u64;
            let device = driver + rings[1] as u64;
            let slots = (device + rings[2] as u64).next_multiple_of(PAGE as u64);
            end = slots + bytes as u64;
            Place {
                rings: [desc, driver, device],
                slots,
                data_at,
                bytes,
                stride,
            }
        };
        let places = (0..config.queues).map(place).collect();
        Some(Layout {
            places,
            bytes: end - GPA,
            ring_size,
            chain,
        })
    }

    /// The place of a queue.
    pub(super) fn place(&self, queue: u16) -> Place {
        self.places[usize::from(queue)]
    }

    /// Bytes of all.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }
}
