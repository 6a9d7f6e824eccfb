//! A qcow2 image that somebody made, and a guest that uses it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    vringd::testing::fuzz::qcow2(data);
});
