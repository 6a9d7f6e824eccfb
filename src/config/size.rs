//! Sizes (`1G`) and durations (`500ms`) as an operator writes them.
//!
//! Pure functions from text to a number. Suffixes of sizes are binary (K = 1024), as in QEMU.
//! What a number may be for a given key is not decided here but in `validate`.

use std::time::Duration;

use super::error::Problem;

const SIZE: &str = "a size such as 512, 64K, 100M, 10G or 1T";
const DURATION: &str = "a duration such as 10s, 500ms or 10 (seconds)";

/// Longest duration that is taken: a deadline of a day can be added to any clock reading.
pub const DURATION_MAX: Duration = Duration::from_secs(24 * 60 * 60);

/// Parses digits with an optional K, M, G or T (either case) into bytes.
pub(super) fn parse_size(text: &str) -> Result<u64, Problem> {
    let (digits, shift) = match text.chars().last().map(|c| c.to_ascii_uppercase()) {
        Some('K') => (&text[..text.len() - 1], 10),
        Some('M') => (&text[..text.len() - 1], 20),
        Some('G') => (&text[..text.len() - 1], 30),
        Some('T') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    parse_digits(digits, SIZE)?
        .checked_mul(1 << shift)
        .ok_or(Problem::TooLarge)
}

/// Parses `10s`, `500ms` or plain seconds.
pub(super) fn parse_duration(text: &str) -> Result<Duration, Problem> {
    let duration = if let Some(digits) = text.strip_suffix("ms") {
        Duration::from_millis(parse_digits(digits, DURATION)?)
    } else {
        let digits = text.strip_suffix('s').unwrap_or(text);
        Duration::from_secs(parse_digits(digits, DURATION)?)
    };
    if duration > DURATION_MAX {
        Err(Problem::TooLong)
    } else {
        Ok(duration)
    }
}

/// Decimal digits only: no sign, no blank, no underscore, unlike `str::parse`, which takes `+1`.
pub(super) fn parse_digits(digits: &str, expected: &'static str) -> Result<u64, Problem> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(Problem::Expected(expected.to_owned()));
    }
    digits.parse().map_err(|_| Problem::TooLarge)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn sizes_take_binary_suffixes() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("4K", 4096),
            ("4k", 4096),
            ("100M", 100 << 20),
            ("1G", 1 << 30),
            ("2T", 2 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn malformed_sizes_are_refused() {
        for text in [
            "", "K", "1KB", "1.5G", "-1", "+1", " 1", "1 ", "1_000", "0x10", "1é", "é",
        ] {
            assert_eq!(
                parse_size(text),
                Err(Problem::Expected(SIZE.to_owned())),
                "{text}"
            );
        }
        for text in [
            "18446744073709551616",
            "16777216T",
            "99999999999999999999999G",
        ] {
            assert_eq!(parse_size(text), Err(Problem::TooLarge), "{text}");
        }
    }

    #[test]
    fn durations_take_seconds_and_milliseconds() {
        for (text, millis) in [("10s", 10_000), ("500ms", 500), ("3", 3_000), ("0", 0)] {
            assert_eq!(
                parse_duration(text),
                Ok(Duration::from_millis(millis)),
                "{text}"
            );
        }
    }

    #[test]
    fn malformed_and_endless_durations_are_refused() {
        for text in ["", "s", "ms", "10m", "1.5s", "-1s", "10 s", "s10"] {
            assert_eq!(
                parse_duration(text),
                Err(Problem::Expected(DURATION.to_owned())),
                "{text}"
            );
        }
        assert_eq!(parse_duration("86400"), Ok(DURATION_MAX));
        assert_eq!(parse_duration("86401"), Err(Problem::TooLong));
        assert_eq!(
            parse_duration("18446744073709551615"),
            Err(Problem::TooLong)
        );
        assert_eq!(
            parse_duration("18446744073709551616"),
            Err(Problem::TooLarge)
        );
    }

    proptest! {
        #[test]
        fn a_printed_size_reads_back(count in any::<u64>(), suffix in 0usize..5) {
            let text = format!("{count}{}", ["", "K", "M", "G", "T"][suffix]);
            let wide = u128::from(count) << (10 * suffix);
            let expected = u64::try_from(wide).map_err(|_| Problem::TooLarge);
            prop_assert_eq!(parse_size(&text), expected);
        }

        #[test]
        fn a_printed_duration_reads_back(millis in 0u64..86_400_000) {
            let expected = Ok(Duration::from_millis(millis));
            prop_assert_eq!(parse_duration(&format!("{millis}ms")), expected);
            let whole = Duration::from_secs(millis / 1000);
            prop_assert_eq!(parse_duration(&format!("{}s", millis / 1000)), Ok(whole));
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = parse_size(&text);
            let _ = parse_duration(&text);
        }
    }
}
