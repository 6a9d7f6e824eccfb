//! What is done about a disk that is full or slow: `on_enospc`, `io_timeout`.

use std::time::Duration;

use super::SickConfig;
use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::size::parse_duration;
use super::validate::TextOrNumber;

/// What no healthy disk takes.
const TIMEOUT_DEFAULT: Duration = Duration::from_secs(30);
/// Below this, a busy machine is taken for a sick disk.
const TIMEOUT_MIN: Duration = Duration::from_millis(100);

/// The keys as they were written.
pub(super) fn check(
    table: &Table,
    on_enospc: Option<&str>,
    io_timeout: Option<TextOrNumber>,
) -> Result<SickConfig, ConfigError> {
    let hold = match on_enospc {
        None | Some("report") => false,
        Some("hold") => true,
        Some(other) => {
            let problem = Problem::UnknownKind {
                what: "on_enospc",
                given: other.to_owned(),
                known: "report, hold",
            };
            return Err(table.key_error("on_enospc", problem));
        }
    };
    let timeout = match io_timeout {
        None => Ok(Some(TIMEOUT_DEFAULT)),
        Some(TextOrNumber(text)) => parse_timeout(&text),
    };
    Ok(SickConfig {
        hold,
        io_timeout: timeout.map_err(|problem| table.key_error("io_timeout", problem))?,
    })
}

fn parse_timeout(text: &str) -> Result<Option<Duration>, Problem> {
    if text == "off" {
        return Ok(None);
    }
    match parse_duration(text)? {
        timeout if timeout < TIMEOUT_MIN => Err(Problem::Expected(format!(
            "\"off\" or a duration from {TIMEOUT_MIN:?}"
        ))),
        timeout => Ok(Some(timeout)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeout_is_off_or_long_enough() {
        assert_eq!(parse_timeout("off"), Ok(None));
        for (text, millis) in [("100ms", 100), ("5", 5000), ("30s", 30_000)] {
            let timeout = Duration::from_millis(millis);
            assert_eq!(parse_timeout(text), Ok(Some(timeout)), "{text}");
        }
        for text in ["", "0", "99ms", "on", "1.5s", "90000s"] {
            assert!(parse_timeout(text).is_err(), "{text}");
        }
    }
}
