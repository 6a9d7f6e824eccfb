//! XTS as IEEE 1619 words it, one block after the other: slow, and not the cipher of the daemon.

use aes::Aes256;
use aes::cipher::{BlockDecrypt, BlockEncrypt, KeyInit};

/// `data` encrypted or decrypted, in sectors of `sector` bytes, the first of them `offset` bytes
/// into the disk; sectors are counted in 512 bytes.
pub fn reference(
    key: &[u8; 64],
    sector: usize,
    offset: u64,
    data: &[u8],
    encrypt: bool,
) -> Vec<u8> {
    let cipher = |half: &[u8]| Aes256::new_from_slice(half).expect("half a key has 32 bytes");
    let (data_key, tweak_key) = (cipher(&key[..32]), cipher(&key[32..]));
    let mut out = data.to_vec();
    for (index, sector_data) in out.chunks_exact_mut(sector).enumerate() {
        let number = offset / 512 + (index * sector / 512) as u64;
        let mut tweak = [0; 16];
        tweak[..8].copy_from_slice(&number.to_le_bytes());
        tweak_key.encrypt_block((&mut tweak).into());
        for block in sector_data.chunks_exact_mut(16) {
            let mut whitened: [u8; 16] = core::array::from_fn(|i| block[i] ^ tweak[i]);
            if encrypt {
                data_key.encrypt_block((&mut whitened).into());
            } else {
                data_key.decrypt_block((&mut whitened).into());
            }
            for (i, byte) in block.iter_mut().enumerate() {
                *byte = whitened[i] ^ tweak[i];
            }
            tweak = times_alpha(tweak);
        }
    }
    out
}

/// The next block's tweak: a shift by one bit through all bytes, and 0x87 for what falls out.
fn times_alpha(tweak: [u8; 16]) -> [u8; 16] {
    let mut carry = 0;
    let mut next = tweak.map(|byte| {
        let shifted = (byte << 1) | carry;
        carry = byte >> 7;
        shifted
    });
    next[0] ^= 0x87 * carry;
    next
}
