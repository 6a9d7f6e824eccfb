//! Requests of a disk, parsed: pure functions of bytes and limits. VIRTIO 1.3 §5.2.6.
//!
//! Any framing is legal: header, data and status may be split over descriptors in any way. The
//! header is the first 16 readable bytes, the status the last writable one, data what is between.

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use crate::memory::{Segment, copy};

use super::SECTOR_BYTES;
use super::ranges::RangeLimits;

/// Bytes of the request header: type, reserved, sector.
pub(super) const HEADER_BYTES: usize = 16;
/// Data segments of one request at most: what one `readv` takes (IOV_MAX).
pub(super) const SEGMENTS_PER_REQUEST: usize = 1024;

/// What a disk allows.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Capacity in bytes.
    pub capacity_bytes: u64,
    /// Logical block size in bytes.
    pub block_size: u32,
    /// Writes are refused.
    pub read_only: bool,
    /// The driver may discard.
    pub discard: bool,
    /// The driver may write zeroes.
    pub write_zeroes: bool,
    /// What ranges there may be.
    pub ranges: RangeLimits,
}

/// What a request asks for. Offsets and lengths in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Disk to guest.
    In {
        /// First byte on the disk.
        offset: u64,
        /// Length.
        bytes: u32,
    },
    /// Guest to disk.
    Out {
        /// First byte on the disk.
        offset: u64,
        /// Length.
        bytes: u32,
    },
    /// Make written data durable.
    Flush,
    /// Tell the serial number.
    GetId,
    /// Give up ranges that are in the data.
    Discard,
    /// Zero ranges that are in the data.
    WriteZeroes,
}

/// Why a request is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reject {
    /// The status byte to answer with.
    Status(u8),
    /// There is no whole header, or no room for a status byte: nothing can be answered.
    Unanswerable,
}

/// An I/O error.
#[expect(clippy::cast_possible_truncation, reason = "a status is one byte")]
pub(super) const IOERR: Reject = Reject::Status(VIRTIO_BLK_S_IOERR as u8);
/// A request type that we don't have.
#[expect(clippy::cast_possible_truncation, reason = "a status is one byte")]
pub(super) const UNSUPP: Reject = Reject::Status(VIRTIO_BLK_S_UNSUPP as u8);

/// Parses the request of a chain with these segments.
///
/// # Errors
/// [`Reject`] says what to answer instead.
pub(super) fn parse(
    readable: &[Segment],
    writable: &[Segment],
    limits: &Limits,
) -> Result<Request, Reject> {
    let mut header = [0; HEADER_BYTES];
    let bytes = |segments: &[Segment]| segments.iter().map(|s| s.len() as u64).sum::<u64>();
    let writable_bytes = bytes(writable);
    if copy::read(readable, 0, &mut header) < HEADER_BYTES || writable_bytes == 0 {
        return Err(Reject::Unanswerable);
    }
    let kind = u32::from_le_bytes([header[0], header[1], header[2], header[3]]);
    let sector = u64::from_le_bytes(core::array::from_fn(|i| header[8 + i]));
    let data_out = bytes(readable) - HEADER_BYTES as u64;
    let data_in = writable_bytes - 1;
    match kind {
        VIRTIO_BLK_T_IN => {
            let (offset, bytes) = range(sector, data_in, writable.len(), limits)?;
            Ok(Request::In { offset, bytes })
        }
        VIRTIO_BLK_T_OUT if limits.read_only => Err(IOERR),
        VIRTIO_BLK_T_OUT => {
            let (offset, bytes) = range(sector, data_out, readable.len(), limits)?;
            Ok(Request::Out { offset, bytes })
        }
        VIRTIO_BLK_T_FLUSH => Ok(Request::Flush),
        VIRTIO_BLK_T_GET_ID => Ok(Request::GetId),
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES if limits.read_only => Err(IOERR),
        VIRTIO_BLK_T_DISCARD if limits.discard => Ok(Request::Discard),
        VIRTIO_BLK_T_WRITE_ZEROES if limits.write_zeroes => Ok(Request::WriteZeroes),
        _ => Err(UNSUPP),
    }
}

/// Checks a range before any I/O: whole blocks, inside the disk, no sum that wraps.
fn range(sector: u64, bytes: u64, segments: usize, limits: &Limits) -> Result<(u64, u32), Reject> {
    let block = u64::from(limits.block_size);
    let offset = sector.checked_mul(SECTOR_BYTES).ok_or(IOERR)?;
    let end = offset.checked_add(bytes).ok_or(IOERR)?;
    let whole = bytes.is_multiple_of(block) && offset.is_multiple_of(block);
    // One segment more: the header's or the status byte's own.
    let few = segments <= SEGMENTS_PER_REQUEST + 1;
    if !whole || !few || end > limits.capacity_bytes {
        return Err(IOERR);
    }
    u32::try_from(bytes)
        .map(|bytes| (offset, bytes))
        .map_err(|_| IOERR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::{Access, GuestRam, Segments};

    const LIMITS: Limits = Limits {
        capacity_bytes: 8192,
        block_size: 512,
        read_only: false,
        discard: false,
        write_zeroes: true,
        ranges: RangeLimits::NULL,
    };

    fn parse_at(
        kind: u32,
        sector: u64,
        out: u32,
        data_in: u32,
        limits: &Limits,
    ) -> Result<Request, Reject> {
        let ram = GuestRam::for_test(&[(0, 65536)]);
        let mut list = Segments::with_capacity(8);
        ram.translate(0, 16 + out, Access::Read, &mut list).unwrap();
        ram.translate(32768, data_in, Access::Write, &mut list)
            .unwrap();
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        copy::write(list.as_slice(), 0, &header);
        parse(&list.as_slice()[..1], &list.as_slice()[1..], limits)
    }

    #[test]
    fn requests_are_checked_against_the_disk_before_any_io() {
        let large = Limits {
            block_size: 4096,
            ..LIMITS
        };
        let read_only = Limits {
            read_only: true,
            ..LIMITS
        };
        let cases = [
            (
                0,
                0,
                0,
                513,
                LIMITS,
                Ok(Request::In {
                    offset: 0,
                    bytes: 512,
                }),
            ),
            (
                0,
                15,
                0,
                513,
                LIMITS,
                Ok(Request::In {
                    offset: 7680,
                    bytes: 512,
                }),
            ),
            (0, 15, 0, 1025, LIMITS, Err(IOERR)),
            (0, 16, 0, 513, LIMITS, Err(IOERR)),
            (
                0,
                16,
                0,
                1,
                LIMITS,
                Ok(Request::In {
                    offset: 8192,
                    bytes: 0,
                }),
            ),
            (0, u64::MAX, 0, 513, LIMITS, Err(IOERR)),
            (0, u64::MAX / 512, 0, 513, LIMITS, Err(IOERR)),
            (0, 0, 0, 512, LIMITS, Err(IOERR)),
            (0, 0, 0, 0, LIMITS, Err(Reject::Unanswerable)),
            (
                1,
                1,
                1024,
                1,
                LIMITS,
                Ok(Request::Out {
                    offset: 512,
                    bytes: 1024,
                }),
            ),
            (1, 0, 511, 1, LIMITS, Err(IOERR)),
            (1, 0, 512, 1, read_only, Err(IOERR)),
            (1, 1, 4096, 1, large, Err(IOERR)),
            (
                1,
                8,
                4096,
                1,
                large,
                Ok(Request::Out {
                    offset: 4096,
                    bytes: 4096,
                }),
            ),
            (4, 0, 0, 1, LIMITS, Ok(Request::Flush)),
            (8, 0, 0, 21, LIMITS, Ok(Request::GetId)),
            (11, 0, 16, 1, LIMITS, Err(UNSUPP)),
            (11, 0, 16, 1, read_only, Err(IOERR)),
            (13, 0, 16, 1, LIMITS, Ok(Request::WriteZeroes)),
            (13, 0, 16, 1, read_only, Err(IOERR)),
            (77, 0, 0, 1, LIMITS, Err(UNSUPP)),
        ];
        for (kind, sector, out, data_in, limits, want) in cases {
            let got = parse_at(kind, sector, out, data_in, &limits);
            assert_eq!(
                got, want,
                "type {kind} sector {sector} out {out} in {data_in}"
            );
        }
    }
}
