//! Notification windows: pure index arithmetic, no memory, no fence.
//!
//! VIRTIO 1.3 §2.7.7.2 and §2.7.10 (split), §2.8.21 (packed) with VIRTIO_F_EVENT_IDX.

/// Whether moving an index from `old` to `new` passes `event`, modulo 2^16 (split rings).
///
/// The specification asks for equality at each step; over a burst that is "event lies in
/// `[old, new)`".
#[inline]
pub fn need_event(event: u16, new: u16, old: u16) -> bool {
    new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
}

/// A position in a packed ring: a slot and the wrap counter of the lap it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedCursor {
    /// Slot number, below the ring's size.
    pub slot: u16,
    /// Wrap counter (VIRTIO 1.3 §2.8.1).
    pub wrap: bool,
}

impl PackedCursor {
    /// The position that `off_wrap` encodes: bits 0–14 the slot, bit 15 the wrap counter.
    #[inline]
    pub fn from_off_wrap(off_wrap: u16) -> PackedCursor {
        PackedCursor {
            slot: off_wrap & 0x7fff,
            wrap: off_wrap & 0x8000 != 0,
        }
    }

    /// The encoding of [`PackedCursor::from_off_wrap`].
    #[inline]
    pub fn off_wrap(self) -> u16 {
        self.slot | (u16::from(self.wrap) << 15)
    }

    /// Moves forward by `slots` (at most the ring's size).
    #[inline]
    pub fn advance(&mut self, slots: u16, size: u16) {
        // Sizes reach 32768, so the sum may pass 16 bits.
        let slot = u32::from(self.slot) + u32::from(slots);
        let wrapped = slot >= u32::from(size);
        let slot = if wrapped {
            slot - u32::from(size)
        } else {
            slot
        };
        #[expect(clippy::cast_possible_truncation, reason = "below the ring's size")]
        let slot = slot as u16;
        *self = PackedCursor {
            slot,
            wrap: self.wrap ^ wrapped,
        };
    }

    /// Moves back by `slots` (at most the ring's size).
    #[inline]
    pub fn retreat(&mut self, slots: u16, size: u16) {
        let wrapped = slots > self.slot;
        let slot = u32::from(self.slot) + if wrapped { u32::from(size) } else { 0 };
        #[expect(clippy::cast_possible_truncation, reason = "below the ring's size")]
        let slot = (slot - u32::from(slots)) as u16;
        *self = PackedCursor {
            slot,
            wrap: self.wrap ^ wrapped,
        };
    }
}

/// Whether moving a packed cursor from `old` to `new` (at most one lap) passes `event`.
///
/// All three are put on one line of two laps, where the test is `old <= event < new`.
#[inline]
pub fn packed_need_event(
    event: PackedCursor,
    new: PackedCursor,
    old: PackedCursor,
    size: u16,
) -> bool {
    let size = u32::from(size);
    // Distance ahead of `old`: the same lap counts from its slot, the other lap adds one size.
    let ahead = |at: PackedCursor| {
        let lap = if at.wrap == old.wrap { 0 } else { size };
        (u32::from(at.slot) + lap).checked_sub(u32::from(old.slot))
    };
    match (ahead(event), ahead(new)) {
        (Some(event), Some(new)) => event < new,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_window_agrees_with_stepping() {
        // VIRTIO 1.3 §2.7.10: brute force over bursts around the wrap of the 16-bit index.
        for old in [0u16, 1, 5, 65530, 65535] {
            for count in 0..20u16 {
                for event in (0..30u16).map(|i| old.wrapping_add(i).wrapping_sub(5)) {
                    let steps = (0..count).any(|i| old.wrapping_add(i) == event);
                    assert_eq!(need_event(event, old.wrapping_add(count), old), steps);
                }
            }
        }
    }

    #[test]
    fn packed_window_agrees_with_stepping() {
        // VIRTIO 1.3 §2.8.21: every old, every burst, every event, for all small sizes.
        for size in 1..=13u16 {
            for (start, wrap) in (0..size).flat_map(|s| [(s, false), (s, true)]) {
                let old = PackedCursor { slot: start, wrap };
                for count in 0..=size {
                    let mut new = old;
                    new.advance(count, size);
                    for event in (0..size).flat_map(|s| [(s, false), (s, true)]) {
                        let event = PackedCursor {
                            slot: event.0,
                            wrap: event.1,
                        };
                        let mut at = old;
                        let steps = (0..count).any(|_| {
                            let hit = at == event;
                            at.advance(1, size);
                            hit
                        });
                        assert_eq!(packed_need_event(event, new, old, size), steps);
                    }
                }
            }
        }
    }

    #[test]
    fn retreat_undoes_advance() {
        for size in [1u16, 2, 7, 255, 32768] {
            for slot in [0, size / 2, size - 1] {
                for slots in [0, 1, size / 2, size] {
                    let start = PackedCursor { slot, wrap: true };
                    let mut at = start;
                    at.advance(slots, size);
                    at.retreat(slots, size);
                    assert_eq!(at, start, "size {size} slot {slot} slots {slots}");
                }
            }
        }
    }

    #[test]
    fn off_wrap_round_trips() {
        for value in [0u16, 1, 0x7fff, 0x8000, 0xffff] {
            assert_eq!(PackedCursor::from_off_wrap(value).off_wrap(), value);
        }
    }
}
