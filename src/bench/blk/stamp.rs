//! What a verified block holds: a stamp that says which block it is, which write of which run, and
//! a checksum over everything; after it, bytes that follow from the stamp.

/// Bytes of the stamp: magic, offset, generation, seed, checksum, length.
const STAMP_BYTES: usize = 40;
const MAGIC: u64 = 0x706d_6174_7362_7276;
const CRC_AT: usize = 32;
const LENGTH_AT: usize = 36;

/// Which block, and which write of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    /// Offset on the disk, in bytes.
    pub offset: u64,
    /// Writes of this block in its run, counted from 1.
    pub generation: u64,
    /// Of the run.
    pub seed: u64,
}

/// What a block that is read has to be.
#[derive(Debug, Clone, Copy)]
pub(super) struct Expected {
    /// Offset on the disk, in bytes.
    pub offset: u64,
    /// The last write of it, if this run did one.
    pub generation: Option<u64>,
    /// Of the run that wrote it, if that is known.
    pub seed: Option<u64>,
}

/// A block that is not what it has to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Mismatch {
    /// A word of the stamp differs.
    #[error("offset {offset}: expected {what} {expected:#x}, got {got:#x}")]
    Word {
        /// Where the block is on the disk.
        offset: u64,
        /// Which word.
        what: &'static str,
        /// What it has to be.
        expected: u64,
        /// What it is.
        got: u64,
    },
    /// The checksum is not that of the bytes.
    #[error(
        "offset {offset}: expected crc32c {expected:#010x}, got {got:#010x}{}",
        wrong_byte(first)
    )]
    Crc {
        /// Where the block is on the disk.
        offset: u64,
        /// The checksum in the stamp.
        expected: u32,
        /// That of the block's bytes.
        got: u32,
        /// The first byte that is not what follows from the stamp: its offset on the disk, what it
        /// has to be, what it is. None when the stamp itself is damaged.
        first: Option<(u64, u8, u8)>,
    },
}

fn wrong_byte(first: &Option<(u64, u8, u8)>) -> String {
    match first {
        Some((at, expected, got)) => {
            format!("; first wrong byte at {at}: expected {expected:#04x}, got {got:#04x}")
        }
        None => "; the stamp itself is damaged".to_owned(),
    }
}

/// A step of splitmix64: a word that looks random, from a counter.
#[inline]
pub(super) fn mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut word = *state;
    word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

/// Fills `block`, of 512 bytes at least, with what `stamp` asks for.
pub(super) fn write(block: &mut [u8], stamp: &Stamp) {
    fill(block, stamp);
    let crc = checksum(block);
    block[CRC_AT..LENGTH_AT].copy_from_slice(&crc.to_le_bytes());
}

/// Everything but the checksum.
fn fill(block: &mut [u8], stamp: &Stamp) {
    let words = [MAGIC, stamp.offset, stamp.generation, stamp.seed];
    for (to, word) in block.chunks_exact_mut(8).zip(words) {
        to.copy_from_slice(&word.to_le_bytes());
    }
    let length = u32::try_from(block.len()).unwrap_or(u32::MAX);
    block[LENGTH_AT..STAMP_BYTES].copy_from_slice(&length.to_le_bytes());
    let mut state = stamp.seed ^ stamp.offset.rotate_left(32) ^ stamp.generation;
    for to in block[STAMP_BYTES..].chunks_exact_mut(8) {
        to.copy_from_slice(&mix(&mut state).to_le_bytes());
    }
}

/// Of all bytes but the checksum's own.
fn checksum(block: &[u8]) -> u32 {
    let crc = crc32c::crc32c(&block[..CRC_AT]);
    crc32c::crc32c_append(crc, &block[LENGTH_AT..])
}

/// Checks a block that was read.
///
/// # Errors
/// [`Mismatch`] says what is wrong first.
pub(super) fn check(block: &[u8], expected: &Expected) -> Result<(), Mismatch> {
    let word = |at: usize| {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&block[at..at + 8]);
        u64::from_le_bytes(bytes)
    };
    let Expected { offset, .. } = *expected;
    let same = |what, expected: u64, got: u64| {
        let wrong = Mismatch::Word {
            offset,
            what,
            expected,
            got,
        };
        if expected == got { Ok(()) } else { Err(wrong) }
    };
    let [magic, written_at, generation, seed] = [0, 8, 16, 24].map(word);
    same("stamp", MAGIC, magic)?;
    #[expect(clippy::cast_possible_truncation, reason = "the low half")]
    let (crc, length) = (word(CRC_AT) as u32, word(CRC_AT) >> 32);
    let got = checksum(block);
    if crc != got {
        let stamp = Stamp {
            offset: written_at,
            generation,
            seed,
        };
        return Err(Mismatch::Crc {
            offset,
            expected: crc,
            got,
            first: first_difference(block, &stamp, offset),
        });
    }
    same("length", block.len() as u64, length)?;
    same("block of offset", offset, written_at)?;
    if let Some(expected) = expected.seed {
        same("seed", expected, seed)?;
    }
    if let Some(expected) = expected.generation {
        same("generation", expected, generation)?;
    }
    Ok(())
}

/// The first byte after the stamp that does not follow from it, when the stamp has its place right.
fn first_difference(block: &[u8], stamp: &Stamp, offset: u64) -> Option<(u64, u8, u8)> {
    if stamp.offset != offset {
        return None;
    }
    let mut whole = vec![0; block.len()];
    fill(&mut whole, stamp);
    let pairs = whole.iter().zip(block).enumerate().skip(STAMP_BYTES);
    let (at, (expected, got)) = pairs.into_iter().find(|(_, (a, b))| a != b)?;
    Some((offset + at as u64, *expected, *got))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STAMP: Stamp = Stamp {
        offset: 8192,
        generation: 3,
        seed: 77,
    };

    fn expected() -> Expected {
        Expected {
            offset: 8192,
            generation: Some(3),
            seed: Some(77),
        }
    }

    fn block(bytes: usize) -> Vec<u8> {
        let mut block = vec![0; bytes];
        write(&mut block, &STAMP);
        block
    }

    #[test]
    fn a_block_as_written_passes() {
        for bytes in [512, 4096, 65536] {
            check(&block(bytes), &expected()).unwrap();
            let any = Expected {
                offset: 8192,
                generation: None,
                seed: None,
            };
            check(&block(bytes), &any).unwrap();
        }
    }

    #[test]
    fn every_byte_counts() {
        for at in 0..512 {
            for bit in [1, 0x80] {
                let mut wrong = block(512);
                wrong[at] ^= bit;
                let mismatch = check(&wrong, &expected()).unwrap_err();
                let says = mismatch.to_string();
                assert!(says.starts_with("offset 8192: expected "), "{says}");
                if at >= STAMP_BYTES {
                    let place = format!("first wrong byte at {}:", 8192 + at);
                    assert!(says.contains(&place), "{says}");
                }
            }
        }
    }

    #[test]
    fn another_block_write_or_run_is_named() {
        let says = |expected: Expected| check(&block(512), &expected).unwrap_err().to_string();
        let other = Expected {
            offset: 4096,
            ..expected()
        };
        let text = "offset 4096: expected block of offset 0x1000, got 0x2000";
        assert_eq!(says(other), text);
        let later = Expected {
            generation: Some(4),
            ..expected()
        };
        let text = "offset 8192: expected generation 0x4, got 0x3";
        assert_eq!(says(later), text);
        let run = Expected {
            seed: Some(78),
            ..expected()
        };
        let text = "offset 8192: expected seed 0x4e, got 0x4d";
        assert_eq!(says(run), text);
        let zeros = check(&[0; 512], &expected()).unwrap_err().to_string();
        assert!(zeros.ends_with("got 0x0"), "{zeros}");
    }

    #[test]
    fn a_block_of_another_size_is_no_whole_block() {
        let long = block(1024);
        assert!(matches!(
            check(&long[..512], &expected()),
            Err(Mismatch::Crc { .. })
        ));
    }
}
