//! A packed ring whose driver writes anything at any time.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    vringd::testing::fuzz::packed_ring(data);
});
