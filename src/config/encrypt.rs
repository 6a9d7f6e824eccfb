//! Encryption of a disk: the keys about it, checked together.

use std::os::fd::RawFd;
use std::path::PathBuf;

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{BlkBackend, EncryptConfig, KeySource};

const CIPHERS: &str = "aes-256-xts";
/// The first number that is not a standard stream.
const FIRST_FD: u64 = 3;

/// The keys, as they were given.
pub(super) struct RawEncrypt {
    pub(super) cipher: Option<String>,
    pub(super) key_file: Option<String>,
    pub(super) key_fd: Option<u64>,
    /// Understood already.
    pub(super) sector: Option<u32>,
}

/// How a disk with this backend and block size is encrypted, if it is.
pub(super) fn check(
    table: &Table,
    raw: RawEncrypt,
    backend: &BlkBackend,
    block_size: u32,
) -> Result<Option<EncryptConfig>, ConfigError> {
    let Some(cipher) = raw.cipher else {
        let keys = [
            ("key_file", raw.key_file.is_some()),
            ("key_fd", raw.key_fd.is_some()),
            ("encrypt_sector", raw.sector.is_some()),
        ];
        return match keys.into_iter().find(|(_, given)| *given) {
            Some((key, _)) => Err(table.key_error(key, Problem::OnlyWith("encrypt"))),
            None => Ok(None),
        };
    };
    if cipher != CIPHERS {
        let problem = Problem::UnknownKind {
            what: "cipher",
            given: cipher,
            known: CIPHERS,
        };
        return Err(table.key_error("encrypt", problem));
    }
    if !matches!(backend, BlkBackend::Path(_)) {
        return Err(table.key_error("encrypt", Problem::OnlyWith("path")));
    }
    let key = match (raw.key_file, raw.key_fd) {
        (Some(_), Some(_)) => return Err(table.error(Problem::Exclusive("key_file", "key_fd"))),
        (None, None) => return Err(table.error(Problem::Missing("key_file (or key_fd)"))),
        (Some(path), None) if path.is_empty() => {
            return Err(table.key_error("key_file", Problem::Empty));
        }
        (Some(path), None) => KeySource::File(PathBuf::from(path)),
        (None, Some(fd)) => {
            let max = RawFd::MAX.unsigned_abs().into();
            let known = RawFd::try_from(fd).ok().filter(|_| fd >= FIRST_FD);
            let min = FIRST_FD;
            let outside = || table.key_error("key_fd", Problem::OutOfRange { min, max });
            KeySource::Fd(known.ok_or_else(outside)?)
        }
    };
    let sector = raw.sector.unwrap_or(512);
    if sector > block_size {
        return Err(table.key_error("encrypt_sector", Problem::OnlyWith("block_size = 4096")));
    }
    Ok(Some(EncryptConfig { key, sector }))
}
