//! What a disk's file is: `format`, and what goes with it.

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{BlkBackend, EncryptConfig, ImageFormat};

/// How names of qcow2 images end, in small letters.
const ENDINGS: [&str; 2] = ["qcow2", "qcow"];

/// What the file of a disk with this backend is.
pub(super) fn check(
    table: &Table,
    given: Option<&str>,
    backend: &BlkBackend,
    encrypt: Option<&EncryptConfig>,
) -> Result<ImageFormat, ConfigError> {
    let BlkBackend::Path(path) = backend else {
        return match given {
            Some(_) => Err(table.key_error("format", Problem::OnlyWith("path"))),
            None => Ok(ImageFormat::Plain),
        };
    };
    let ending = path.extension().map(|ending| ending.to_ascii_lowercase());
    match given {
        Some("raw") => Ok(ImageFormat::Raw),
        Some("qcow2") if encrypt.is_some() => {
            Err(table.key_error("encrypt", Problem::OnlyWith("format = \"raw\"")))
        }
        Some("qcow2") => Ok(ImageFormat::Qcow2),
        Some(other) => {
            let problem = Problem::UnknownKind {
                what: "format",
                given: other.to_owned(),
                known: "raw, qcow2",
            };
            Err(table.key_error("format", problem))
        }
        None if ending.is_some_and(|it| ENDINGS.iter().any(|known| it == *known)) => {
            Err(table.key_error("path", Problem::SayFormat))
        }
        None => Ok(ImageFormat::Plain),
    }
}
