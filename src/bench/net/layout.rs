//! Where rings and buffers lie in the memory that a back-end is shown.

use super::super::BenchError;
use super::super::memory::{GPA, LINE, Memory, PAGE, TO_UVA};
use super::pair::longest;
use crate::config::{BenchMode, BenchNetConfig, Chains};
use crate::ring::RingFormat;

/// Where the frame begins in a buffer: after the virtio-net header of VIRTIO 1.3 §5.1.6.
pub(super) const FRAME_AT: u16 = 12;

/// With mergeable buffers a receive buffer is no larger than this, as in a guest.
const MERGEABLE_BYTES: u32 = 2048;

/// Buffers are this far apart at least, as in a guest; an odd number of cache lines, so that their
/// first lines fall into all sets of a cache.
const STRIDE_MIN: usize = 2048 + LINE;

/// The places of all vrings.
#[derive(Debug)]
pub(super) struct Layout {
    places: Vec<Place>,
    /// Buffers that a received frame takes at most.
    buffers_per_frame: u16,
    bytes: u64,
}

/// The place of one vring.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    /// Guest physical addresses of descriptor, driver and device area.
    rings: [u64; 3],
    /// Guest physical address of the first buffer.
    pub buffers: u64,
    /// Bytes from one buffer to the next.
    pub stride: usize,
    /// Bytes of a receive buffer.
    pub capacity: u32,
    /// Guest physical address of the first table, where descriptors are indirect. Each has a cache
    /// line of its own.
    pub tables: Option<u64>,
}

impl Place {
    /// Front-end addresses of descriptor, driver and device area.
    pub(super) fn rings_at(&self) -> [u64; 3] {
        self.rings.map(|gpa| gpa + TO_UVA)
    }

    /// Front-end address of the first buffer.
    pub(super) fn buffers_at(&self) -> u64 {
        self.buffers + TO_UVA
    }
}

impl Layout {
    /// Places for what `config` asks for, with rings of format `F`.
    pub(super) fn new<F: RingFormat>(config: &BenchNetConfig) -> Layout {
        let whole = u32::from(longest(config.size)) + u32::from(FRAME_AT);
        // What is sent back from the far end is sent from one buffer.
        let one_way = config.mode == BenchMode::Send;
        let capacity = if one_way || config.mergeable && config.far.is_none() {
            whole.min(MERGEABLE_BYTES)
        } else {
            whole
        };
        // Every buffer of a merged frame holds payload, the first a header too.
        let buffers_per_frame = if one_way { 1 } else { whole.div_ceil(capacity) };
        let buffers_per_frame = u16::try_from(buffers_per_frame).unwrap_or(u16::MAX);
        let lines = (whole as usize).div_ceil(LINE).max(STRIDE_MIN / LINE);
        let stride = (lines | 1) * LINE;
        let rings = F::area_bytes(config.ring_size).map(|bytes| bytes.next_multiple_of(LINE));
        let mut end = GPA;
        let place = |_| {
            let desc = end.next_multiple_of(PAGE as u64);
            let driver = desc + rings[0] as u64;
            let device = driver + rings[1] as u64;
            let buffers = (device + rings[2] as u64).next_multiple_of(PAGE as u64);
            end = buffers + (stride * usize::from(config.ring_size)) as u64;
            let tables = (config.chains == Chains::Indirect).then_some(end);
            if tables.is_some() {
                end += (LINE * usize::from(config.ring_size)) as u64;
            }
            Place {
                rings: [desc, driver, device],
                buffers,
                stride,
                capacity,
                tables,
            }
        };
        let places = (0..2 * config.queues).map(place).collect();
        Layout {
            places,
            buffers_per_frame,
            bytes: end - GPA,
        }
    }

    /// The place of vring `index`.
    pub(super) fn place(&self, index: usize) -> Place {
        self.places[index]
    }

    /// Frames that may be in flight: there has to be a receive buffer for each.
    pub(super) fn in_flight(&self, config: &BenchNetConfig) -> u16 {
        let most = (config.ring_size / self.buffers_per_frame).max(1);
        config.in_flight.min(most)
    }

    /// Takes the memory and maps it.
    ///
    /// # Errors
    /// When there is not enough memory.
    pub(super) fn memory(&self) -> Result<Memory, BenchError> {
        Memory::new(self.bytes)
    }
}
