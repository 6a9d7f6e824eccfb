//! The Internet checksum: a sum of 16-bit words in ones' complement (RFC 1071).

/// A sum that grows. All parts but the last have an even number of bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Sum(u64);

impl Sum {
    pub(super) fn of(bytes: &[u8]) -> Sum {
        let mut sum = Sum::default();
        sum.add(bytes);
        sum
    }

    /// In the machine's byte order, whatever it is: the sum of swapped words is the swapped sum
    /// (RFC 1071, section 2 B).
    pub(super) fn add(&mut self, bytes: &[u8]) {
        let mut words = bytes.chunks_exact(4);
        let whole = words.by_ref().map(|word| {
            let word: [u8; 4] = [word[0], word[1], word[2], word[3]];
            u64::from(u32::from_ne_bytes(word))
        });
        self.0 += whole.sum::<u64>();
        let mut rest = [0; 4];
        rest[..words.remainder().len()].copy_from_slice(words.remainder());
        self.0 += u64::from(u32::from_ne_bytes(rest));
    }

    /// What is stored in the packet, as a number.
    pub(super) fn checksum(self) -> u16 {
        let mut sum = self.0;
        while sum > 0xffff {
            sum = (sum >> 16) + (sum & 0xffff);
        }
        let [low, high, ..] = sum.to_le_bytes();
        !u16::from_be_bytes(u16::from_le_bytes([low, high]).to_ne_bytes())
    }
}
