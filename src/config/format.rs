//! What a disk's file is: `format`, and `backing_dir`, which goes with it.

use std::path::PathBuf;

use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::{BlkBackend, EncryptConfig, ImageFormat};

/// How names of qcow2 images end, in small letters.
const ENDINGS: [&str; 2] = ["qcow2", "qcow"];

/// What the file of a disk with this backend is.
pub(super) fn check(
    table: &Table,
    (given, backing_dir): (Option<&str>, Option<String>),
    backend: &BlkBackend,
    encrypt: Option<&EncryptConfig>,
) -> Result<ImageFormat, ConfigError> {
    match &backing_dir {
        Some(_) if given != Some("qcow2") => {
            let problem = Problem::OnlyWith("format = \"qcow2\"");
            return Err(table.key_error("backing_dir", problem));
        }
        Some(path) if path.is_empty() => {
            return Err(table.key_error("backing_dir", Problem::Empty));
        }
        _ => {}
    }
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
        Some("qcow2") => Ok(ImageFormat::Qcow2 {
            backing_dir: backing_dir.map(PathBuf::from),
        }),
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
