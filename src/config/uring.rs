//! What a disk asks of io_uring beside the usual: the keys about it, checked together.

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{BlkBackend, EncryptConfig, IoOptions};

const KEYS: [&str; 3] = ["iopoll", "sqpoll", "fixed_buffers"];

/// What a disk with this backend asks for; `given` has the values of the keys in their order.
pub(super) fn check(
    table: &Table,
    given: [Option<bool>; 3],
    backend: &BlkBackend,
    direct: Option<bool>,
    encrypt: Option<&EncryptConfig>,
) -> Result<IoOptions, ConfigError> {
    let first = KEYS.iter().zip(given).find(|(_, given)| given.is_some());
    if let (Some((key, _)), false) = (first, matches!(backend, BlkBackend::Path(_))) {
        return Err(table.key_error(key, Problem::OnlyWith("path")));
    }
    let [iopoll, sqpoll, fixed_buffers] = given.map(Option::unwrap_or_default);
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
