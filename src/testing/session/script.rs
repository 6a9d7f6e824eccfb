//! What both sides of a ring do, as a list of steps.

use crate::ring::VringBase;
use crate::testing::driver::Calls;
use crate::testing::fuzz::Bytes;

/// How the driver lays a chain out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// In the ring.
    Direct,
    /// All of it in an indirect table.
    Indirect,
    /// The first buffer in the ring, the others in an indirect table behind it.
    Mixed,
}

/// A chain to be made available: lengths of its buffers.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Where its descriptors are.
    pub layout: Layout,
    /// Lengths of buffers that the device reads.
    pub readable: Vec<u32>,
    /// Lengths of those that it writes.
    pub writable: Vec<u32>,
}

/// One step of a session.
#[derive(Debug, Clone)]
pub enum Step {
    /// The driver writes a chain, if it has room.
    Add(Shape),
    /// The driver fills what is left of the ring with chains of one buffer.
    Fill,
    /// The driver shows what it wrote.
    Publish,
    /// The device pops up to so many chains, the simplest ones by the short way if `short`.
    Pop {
        /// Chains.
        count: u16,
        /// The simplest ones many at once.
        short: bool,
    },
    /// The device gives the last chain back.
    Unpop,
    /// The device uses up to `count` chains, chosen by `which`, with lengths from `written` on, or
    /// with 0 alone.
    Use {
        /// Chains.
        count: u16,
        /// Even: the oldest ones; odd: which of them.
        which: u16,
        /// Used length of the first.
        written: u32,
    },
    /// The device shows what it used.
    PublishUsed,
    /// The driver takes back up to so many chains.
    Reap(u16),
    /// The driver asks for calls.
    Calls(Calls),
    /// The device asks for kicks, or for none.
    Kicks(bool),
    /// Chains of so many descriptors, as far as there is room, go there and all the way back.
    Round(Vec<usize>),
}

/// A ring and what happens on it.
#[derive(Debug, Clone)]
pub struct Script {
    /// Descriptors.
    pub size: u16,
    /// VIRTIO_RING_F_EVENT_IDX.
    pub event_idx: bool,
    /// VIRTIO_F_IN_ORDER.
    pub in_order: bool,
    /// The device side starts anew, where it stands, after each step that leaves it without chains.
    pub restarts: bool,
    /// Where the ring stands.
    pub base: VringBase,
    /// What happens, in order.
    pub steps: Vec<Step>,
}

/// Steps of a session that is read from bytes, at most.
const STEPS_MAX: usize = 400;
/// Descriptors of its ring, at most: a lap must fit its steps.
const SIZE_MAX: u16 = 64;

impl Script {
    /// The session that these bytes tell, whatever they are, in the given format.
    pub(crate) fn decode(packed: bool, bytes: &mut Bytes<'_>) -> Script {
        let size = match (packed, bytes.u16()) {
            (true, size) => 1 + size % SIZE_MAX,
            (false, size) => 2 << (u32::from(size) % SIZE_MAX.ilog2()),
        };
        let flags = bytes.u8();
        let at = bytes.u16();
        let at = if packed {
            (at & 0x8000) | ((at & 0x7fff) % size)
        } else {
            at
        };
        let mut steps = Vec::new();
        while !bytes.is_empty() && steps.len() < STEPS_MAX {
            steps.push(Step::decode(bytes));
        }
        Script {
            size,
            event_idx: flags & 1 != 0,
            in_order: flags & 2 != 0,
            restarts: flags & 4 != 0,
            base: VringBase {
                avail: at,
                used: at,
            },
            steps,
        }
    }
}

impl Step {
    fn decode(bytes: &mut Bytes<'_>) -> Step {
        match bytes.u8() % 16 {
            0..=3 => Step::Add(Shape::decode(bytes)),
            4 => Step::Fill,
            5 | 6 => Step::Publish,
            7 | 8 => Step::Pop {
                count: few(bytes),
                short: bytes.u8() & 1 != 0,
            },
            9 => Step::Unpop,
            10 | 11 => Step::Use {
                count: few(bytes),
                which: bytes.u16(),
                written: bytes.u32(),
            },
            12 => Step::PublishUsed,
            13 => Step::Reap(few(bytes)),
            14 => match bytes.u8() {
                0 => Step::Calls(Calls::On),
                1 => Step::Calls(Calls::Off),
                after @ 2..128 => Step::Calls(Calls::After((after - 2).into())),
                kicks => Step::Kicks(kicks & 1 != 0),
            },
            _ => {
                let kind = bytes.u8();
                let count = |at: u8| 1 + usize::from(kind >> (2 * at) & 3);
                Step::Round((0..1 + (kind >> 6)).map(count).collect())
            }
        }
    }
}

/// A few chains, or all.
fn few(bytes: &mut Bytes<'_>) -> u16 {
    match bytes.u8() {
        u8::MAX => u16::MAX,
        count => u16::from(count % 8),
    }
}

impl Shape {
    fn decode(bytes: &mut Bytes<'_>) -> Shape {
        let kind = bytes.u8();
        let layout = match kind & 3 {
            0 | 1 => Layout::Direct,
            2 => Layout::Indirect,
            _ => Layout::Mixed,
        };
        let mut lens = |count: u8| (0..count).map(|_| u32::from(bytes.u16()) * 4).collect();
        let readable: Vec<u32> = lens(kind >> 2 & 3);
        let mut writable: Vec<u32> = lens(kind >> 4 & 3);
        // A chain has a buffer, and one of both kinds has one in each place.
        while readable.len() + writable.len() <= usize::from(layout == Layout::Mixed) {
            writable.push(kind.into());
        }
        Shape {
            layout,
            readable,
            writable,
        }
    }
}
