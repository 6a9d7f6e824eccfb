//! A configuration file and flags as somebody wrote them.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    vringd::testing::fuzz::config(data);
});
