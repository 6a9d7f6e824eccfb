//! How many cases a property is tried with.

use proptest::test_runner::Config;

/// As many as PROPTEST_CASES says, which `scripts/soak` sets, or `usual`.
pub fn cases(usual: u32) -> Config {
    let told = std::env::var("PROPTEST_CASES").ok();
    Config {
        cases: told.and_then(|told| told.parse().ok()).unwrap_or(usual),
        failure_persistence: None,
        ..Config::default()
    }
}
