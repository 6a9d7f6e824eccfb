//! What a disk asks of io_uring beside the usual: the keys about it, checked together.

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{BlkBackend, EncryptConfig, IoOptions};

/// The keys, as they were given.
pub(super) struct RawIo {
    pub(super) iopoll: Option<bool>,
    pub(super) sqpoll: Option<bool>,
    pub(super) fixed_buffers: Option<bool>,
}

/// What a disk with this backend asks for.
pub(super) fn check(
    table: &Table,
    raw: &RawIo,
    backend: &BlkBackend,
    direct: Option<bool>,
    encrypt: Option<&EncryptConfig>,
) -> Result<IoOptions, ConfigError> {
    let keys = [
        ("iopoll", raw.iopoll),
        ("sqpoll", raw.sqpoll),
        ("fixed_buffers", raw.fixed_buffers),
    ];
    let given = keys.into_iter().find(|(_, given)| given.is_some());
    if let (Some((key, _)), false) = (given, matches!(backend, BlkBackend::Path(_))) {
        return Err(table.key_error(key, Problem::OnlyWith("path")));
    }
    let [iopoll, sqpoll, fixed_buffers] = keys.map(|(_, given)| given.unwrap_or(false));
    if iopoll && direct == Some(false) {
        return Err(table.key_error("iopoll", Problem::OnlyWith("direct I/O")));
    }
    // Memory is registered with the ordinary ring; and an encrypted disk never touches the guest's.
    if fixed_buffers && iopoll {
        return Err(table.error(Problem::Exclusive("fixed_buffers", "iopoll")));
    }
    if fixed_buffers && encrypt.is_some() {
        return Err(table.error(Problem::Exclusive("fixed_buffers", "encrypt")));
    }
    Ok(IoOptions {
        iopoll,
        sqpoll,
        fixed_buffers,
    })
}
