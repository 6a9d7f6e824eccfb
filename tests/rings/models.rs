//! Random sessions against the model, for each format alone and for both side by side.

use proptest::prelude::*;
use vringd::ring::VringBase;
use vringd::testing::driver::{PackedDriver, SplitDriver};
use vringd::testing::session::{Script, Session};

use super::script::script;
use crate::support::cases::cases;

const SPLIT: &[u16] = &[2, 4, 8, 256, 32768];
const PACKED: &[u16] = &[1, 2, 3, 7, 255, 1025, 32768];
const BOTH: &[u16] = &[2, 4, 8, 256, 32768];

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn a_split_ring_does_what_the_model_says(script in script(false, SPLIT)) {
        Session::<SplitDriver>::new(&script).play(&script.steps);
    }

    #[test]
    fn a_packed_ring_does_what_the_model_says(script in script(true, PACKED)) {
        Session::<PackedDriver>::new(&script).play(&script.steps);
    }
}

proptest! {
    #![proptest_config(cases(100))]

    #[test]
    fn split_and_packed_give_out_the_same_chains(script in script(false, BOTH)) {
        let split = Script { base: VringBase::fresh(false), ..script.clone() };
        let packed = Script { base: VringBase::fresh(true), ..script };
        let mut one = Session::<SplitDriver>::new(&split);
        let mut other = Session::<PackedDriver>::new(&packed);
        one.mark_buffers();
        other.mark_buffers();
        one.play(&split.steps);
        other.play(&packed.steps);
        prop_assert!(one.log == other.log);
    }
}
