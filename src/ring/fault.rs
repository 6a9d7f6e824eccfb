//! `RingFault`: every way in which a driver can break the rules of a virtqueue.

/// A rule of VIRTIO 1.3 §2.7 or §2.8 that the driver broke. The ring is latched with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
#[repr(u8)]
pub enum RingFault {
    /// The avail index is more than the ring's size ahead of us.
    #[error("avail index is more than the ring size ahead")]
    AvailIndexJump,
    /// A head or `next` field names a descriptor outside the table.
    #[error("descriptor index outside the descriptor table")]
    DescIndex,
    /// A chain in the main ring has more descriptors than the ring.
    #[error("descriptor chain longer than the ring")]
    ChainTooLong,
    /// More chains (or, packed, slots) were made available than the ring holds.
    #[error("more descriptors in flight than the ring holds")]
    TooManyInFlight,
    /// An indirect descriptor although VIRTIO_F_INDIRECT_DESC was not negotiated.
    #[error("indirect descriptor without VIRTIO_F_INDIRECT_DESC")]
    IndirectNotNegotiated,
    /// An indirect descriptor inside an indirect table, or one that says NEXT.
    #[error("nested or chained indirect descriptor")]
    IndirectNested,
    /// The length of an indirect table is zero or not a multiple of 16.
    #[error("indirect table of an impossible length")]
    IndirectLength,
    /// An indirect table has more entries than the limit.
    #[error("indirect table with too many entries")]
    IndirectTooLong,
    /// A readable descriptor follows a writable one.
    #[error("device-readable descriptor after a device-writable one")]
    ReadableAfterWritable,
    /// The lengths of a chain add up to more than 2^32 - 1 bytes.
    #[error("descriptor chain of more than 2^32 - 1 bytes")]
    ChainBytes,
    /// A buffer or an indirect table is not in guest memory.
    #[error("buffer outside guest memory")]
    Unmapped,
    /// A chain needs more segments than can ever be held.
    #[error("descriptor chain of too many memory segments")]
    TooManySegments,
    /// The ring's size is zero, too large, or (split) not a power of two.
    #[error("impossible ring size")]
    Size,
    /// An index that the front-end gave as vring base is impossible for the ring's size.
    #[error("impossible vring base")]
    Base,
    /// The device's own memory access failed where the table said it was mapped.
    #[error("guest memory can't be accessed")]
    Memory,
    /// The areas of the ring are smaller than its size asks for.
    #[error("ring area smaller than the ring size asks for")]
    Areas,
    /// A request without a whole header, or without a byte for its status: what was asked for can't
    /// be told, or the answer not be given. Found by the device.
    #[error("request without a whole header or a byte for its status")]
    Unanswerable,
}

impl RingFault {
    /// All faults, for tables of tests and seeds.
    pub const ALL: [RingFault; 17] = [
        RingFault::AvailIndexJump,
        RingFault::DescIndex,
        RingFault::ChainTooLong,
        RingFault::TooManyInFlight,
        RingFault::IndirectNotNegotiated,
        RingFault::IndirectNested,
        RingFault::IndirectLength,
        RingFault::IndirectTooLong,
        RingFault::ReadableAfterWritable,
        RingFault::ChainBytes,
        RingFault::Unmapped,
        RingFault::TooManySegments,
        RingFault::Size,
        RingFault::Base,
        RingFault::Memory,
        RingFault::Areas,
        RingFault::Unanswerable,
    ];
}
