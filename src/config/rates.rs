//! How much may pass in a second: `100M`, `2500`.
//!
//! Suffixes of rates are decimal (k = 1000), as for links and disks everywhere.

use std::time::Duration;

use crate::host::limit::{BURST_DEFAULT, Rates};

use super::PortRates;
use super::error::{ConfigError, Problem};
use super::keyvalue::Table;
use super::size::{parse_digits, parse_duration};

const RATE: &str = "a rate in a second such as 2500, 100k, 100M or 10G";
/// Time that a burst may stand for.
const BURST: [Duration; 2] = [Duration::from_millis(1), Duration::from_secs(1)];
const BURST_RANGE: &str = "a duration from 1ms to 1s";

/// Parses digits with an optional k, M or G (either case); at least 1.
pub(super) fn parse_rate(text: &str) -> Result<u64, Problem> {
    let (digits, factor) = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 1_000),
        Some('M') => (&text[..text.len() - 1], 1_000_000),
        Some('G') => (&text[..text.len() - 1], 1_000_000_000),
        _ => (text, 1),
    };
    match parse_digits(digits, RATE)?.checked_mul(factor) {
        Some(0) => Err(Problem::Expected(RATE.to_owned())),
        Some(rate) => Ok(rate),
        None => Err(Problem::TooLarge),
    }
}

/// The rate under `key`, if there is one.
pub(super) fn rate(
    table: &Table,
    key: &'static str,
    text: Option<String>,
) -> Result<Option<u64>, ConfigError> {
    let parsed = text.map(|text| parse_rate(&text)).transpose();
    parsed.map_err(|problem| table.key_error(key, problem))
}

/// A duration within `range`, which is `expected`.
pub(super) fn burst(
    text: &str,
    range: [Duration; 2],
    expected: &'static str,
) -> Result<Duration, Problem> {
    let burst = parse_duration(text)?;
    if burst < range[0] || burst > range[1] {
        return Err(Problem::Expected(expected.to_owned()));
    }
    Ok(burst)
}

/// The keys of a port as they were written.
#[derive(Debug, Default)]
pub(super) struct RawPortRates {
    pub(super) ingress_bits: Option<String>,
    pub(super) ingress_frames: Option<String>,
    pub(super) egress_bits: Option<String>,
    pub(super) egress_frames: Option<String>,
    pub(super) rate_burst: Option<String>,
}

/// What a port may send and receive.
pub(super) fn port_rates(table: &Table, raw: RawPortRates) -> Result<PortRates, ConfigError> {
    let in_key = |problem| table.key_error("rate_burst", problem);
    let burst = match raw.rate_burst {
        None => BURST_DEFAULT,
        Some(text) => burst(&text, BURST, BURST_RANGE).map_err(in_key)?,
    };
    Ok(PortRates {
        ingress: Rates {
            count: rate(table, "ingress_frames", raw.ingress_frames)?,
            size: rate(table, "ingress_bits", raw.ingress_bits)?,
            burst,
        },
        egress: Rates {
            count: rate(table, "egress_frames", raw.egress_frames)?,
            size: rate(table, "egress_bits", raw.egress_bits)?,
            burst,
        },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_take_decimal_suffixes() {
        for (text, rate) in [
            ("1", 1),
            ("2500", 2500),
            ("100k", 100_000),
            ("100K", 100_000),
            ("10M", 10_000_000),
            ("400G", 400_000_000_000),
        ] {
            assert_eq!(parse_rate(text).ok(), Some(rate), "{text}");
        }
        for text in ["", "0", "0M", "k", "-1", "1.5G", "10 M", "99999999999G"] {
            assert!(parse_rate(text).is_err(), "{text}");
        }
    }
}
