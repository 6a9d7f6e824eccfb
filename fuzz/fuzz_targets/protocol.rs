//! A front-end that says anything, with any descriptors.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    vringd::testing::fuzz::protocol(data);
});
