//! `Xts`: AES-256-XTS of whole sectors, from one place in memory into another.
//!
//! IEEE 1619, with the number of the sector as the tweak: 64 bits, little-endian, in units of 512
//! bytes whatever the size of the sector ("plain64" of dm-crypt). The cipher is AWS-LC's, which
//! takes addresses: guest memory is never a slice, since the guest may change it meanwhile. What
//! comes out then is some other ciphertext or plaintext, of the guest's own data.

use std::fmt;
use std::io;
use std::ptr::{self, NonNull};

use aws_lc_sys::{
    EVP_CIPHER_CTX, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_Cipher, EVP_CipherInit_ex,
    EVP_aes_256_xts,
};

use crate::memory::Segment;

use super::key::DiskKey;

/// What sectors are counted in.
const UNIT_BYTES: u64 = 512;

/// Which way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// Plaintext to ciphertext.
    Encrypt,
    /// Ciphertext to plaintext.
    Decrypt,
}

/// A key that is ready for use in one direction.
struct Cipher(NonNull<EVP_CIPHER_CTX>);

// SAFETY: a context belongs to its owner alone and does not know the thread that made it.
unsafe impl Send for Cipher {}

impl Cipher {
    fn new(key: &DiskKey, direction: Direction) -> io::Result<Cipher> {
        // SAFETY: there is nothing to keep for this call; NULL means no memory.
        let context = NonNull::new(unsafe { EVP_CIPHER_CTX_new() });
        let cipher = Cipher(context.ok_or(io::ErrorKind::OutOfMemory)?);
        let encrypt = libc::c_int::from(direction == Direction::Encrypt);
        // SAFETY: the context is new and ours, the key has the 64 bytes that this cipher reads,
        // and NULL stands for no engine and no tweak yet.
        let done = unsafe {
            EVP_CipherInit_ex(
                cipher.0.as_ptr(),
                EVP_aes_256_xts(),
                ptr::null_mut(),
                key.bytes().as_ptr(),
                ptr::null(),
                encrypt,
            )
        };
        if done == 1 {
            Ok(cipher)
        } else {
            Err(io::Error::other("the cipher refuses the key"))
        }
    }

    /// One sector.
    #[inline]
    fn run(&mut self, tweak: &[u8; 16], from: *const u8, to: *mut u8, bytes: usize) -> bool {
        let context = self.0.as_ptr();
        // SAFETY: the tweak has the 16 bytes that this cipher reads; NULL and -1 keep cipher, key
        // and direction.
        let ready = unsafe {
            EVP_CipherInit_ex(
                context,
                ptr::null(),
                ptr::null_mut(),
                ptr::null(),
                tweak.as_ptr(),
                -1,
            )
        };
        // SAFETY: the caller holds `bytes` bytes at both addresses. XTS writes as many as it reads
        // and stands other bytes there at a second look.
        ready == 1 && unsafe { EVP_Cipher(context, to, from, bytes) } == 1
    }
}

impl Drop for Cipher {
    fn drop(&mut self) {
        // SAFETY: the context is ours and not used after this; its memory is wiped.
        unsafe { EVP_CIPHER_CTX_free(self.0.as_ptr()) };
    }
}

/// A disk's key, ready for use by one queue.
pub struct Xts {
    encrypt: Cipher,
    decrypt: Cipher,
    /// A power of two.
    sector: usize,
}

impl fmt::Debug for Xts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sector = self.sector;
        f.debug_struct("Xts")
            .field("sector", &sector)
            .finish_non_exhaustive()
    }
}

impl Xts {
    /// `key` for sectors of `sector` bytes, a power of two of at least 512.
    ///
    /// # Errors
    /// When there is no memory for it.
    ///
    /// # Panics
    /// For other sizes of a sector.
    pub fn new(key: &DiskKey, sector: u32) -> io::Result<Xts> {
        assert!(
            sector.is_power_of_two() && u64::from(sector) >= UNIT_BYTES,
            "sectors of {sector} bytes"
        );
        Ok(Xts {
            encrypt: Cipher::new(key, Direction::Encrypt)?,
            decrypt: Cipher::new(key, Direction::Decrypt)?,
            sector: sector as usize,
        })
    }

    /// Bytes of a sector.
    #[inline]
    pub fn sector(&self) -> usize {
        self.sector
    }

    /// As much of so many bytes as whole sectors are.
    #[inline]
    pub fn whole(&self, bytes: usize) -> usize {
        bytes & !(self.sector - 1)
    }

    /// Encrypts or decrypts the whole sectors of `from`, the first of which is `offset` bytes into
    /// the disk, into `to`, as far as that goes. Both may be the same, but not overlap otherwise.
    /// Returns the bytes done.
    ///
    /// # Panics
    /// When the cipher fails, which it does for nothing that a disk can ask of it: bytes that are
    /// not encrypted must never be taken for such that are.
    #[inline]
    pub fn run(&mut self, direction: Direction, offset: u64, from: Segment, to: Segment) -> usize {
        let cipher = match direction {
            Direction::Encrypt => &mut self.encrypt,
            Direction::Decrypt => &mut self.decrypt,
        };
        let bytes = from.len().min(to.len()) & !(self.sector - 1);
        let mut at = 0;
        while at < bytes {
            let number = (offset + at as u64) / UNIT_BYTES;
            let tweak = u128::from(number).to_le_bytes();
            let (from, to) = (from.base().wrapping_add(at), to.base().wrapping_add(at));
            let done = cipher.run(&tweak, from, to, self.sector);
            assert!(done, "the cipher fails at byte {offset}+{at}");
            at += self.sector;
        }
        bytes
    }
}

#[cfg(test)]
#[allow(unreachable_pub, reason = "shared with the integration tests")]
#[path = "../../tests/support/xts.rs"]
pub(crate) mod standard;
#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests;
