//! What the fuzz targets run: bytes become a ring, a session, a configuration or an image, and
//! whatever they say, certain things must hold. The same functions replay the corpora in the tests.
//!
//! A function here panics when something does not hold, and returns what the bytes led to.

#![expect(
    clippy::cast_possible_truncation,
    reason = "sizes of inputs and of the memory played with"
)]

mod config;
mod protocol;
mod qcow2;
mod rings;
mod seeds;

pub use config::{config, config_seeds};
pub use protocol::{protocol, protocol_seeds};
pub use qcow2::{Qcow2Outcome, qcow2, qcow2_seeds};
pub use rings::{Op, RingInput, packed_ring, split_ring};
pub use seeds::{ring_seeds, seed_for};

/// Bytes taken from the front; zeros once they are used up.
#[derive(Debug)]
pub(crate) struct Bytes<'a>(&'a [u8]);

impl Bytes<'_> {
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn take<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let count = N.min(self.0.len());
        bytes[..count].copy_from_slice(&self.0[..count]);
        self.0 = &self.0[count..];
        bytes
    }

    pub(crate) fn u8(&mut self) -> u8 {
        self.take::<1>()[0]
    }

    pub(crate) fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.take())
    }

    pub(crate) fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.take())
    }

    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.take())
    }
}
