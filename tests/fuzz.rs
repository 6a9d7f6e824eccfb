//! What the fuzz targets run, without a fuzzer: the corpora, and a while of bytes by chance.
//!
//! `UPDATE_CORPUS=1` writes the seeds into fuzz/corpus.

#[cfg(test)]
#[allow(unreachable_pub, reason = "shared with other tests")]
#[path = "support/cases.rs"]
mod cases;

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::sync::PoisonError;

    use proptest::prelude::*;
    use proptest::strategy::ValueTree;
    use vringd::ring::RingFault;
    use vringd::testing::fuzz;

    use super::cases::cases;

    /// A session counts the sockets and eventfds of the process, and an image has one of its own.
    #[expect(clippy::disallowed_types, reason = "two tests take turns")]
    static DESCRIPTORS: std::sync::Mutex<()> = std::sync::Mutex::new(());

    fn corpus(target: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("fuzz/corpus")
            .join(target)
    }

    /// Plays every file of a corpus; the seeds must be among them as they are made now.
    fn replay(target: &str, seeds: &[(String, Vec<u8>)], play: impl Fn(&str, &[u8])) {
        let dir = corpus(target);
        if std::env::var_os("UPDATE_CORPUS").is_some() {
            fs::create_dir_all(&dir).unwrap();
            for (name, seed) in seeds {
                fs::write(dir.join(name), seed).unwrap();
            }
        }
        for (name, seed) in seeds {
            let there = fs::read(dir.join(name)).unwrap_or_default();
            assert!(
                there == *seed,
                "{target}/{name} is not what its maker makes"
            );
        }
        let mut count = 0;
        for entry in fs::read_dir(&dir).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            play(&name, &fs::read(entry.path()).unwrap());
            count += 1;
        }
        assert!(count >= seeds.len(), "{target}: {count} files");
    }

    /// A file named for a fault must lead to it.
    fn replay_ring(target: &str, packed: bool, play: fn(&[u8]) -> Option<RingFault>) {
        replay(target, &fuzz::ring_seeds(packed), |name, data| {
            let found = play(data);
            if let Some(wanted) = name.strip_prefix("fault-") {
                assert_eq!(format!("{found:?}"), format!("Some({wanted})"), "{name}");
            }
            if ["honest", "modelled"].contains(&name) {
                assert_eq!(found, None, "{target}: {name}");
            }
        });
        // The same model as that of the property tests, with steps by chance.
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let steps = prop::collection::vec(any::<u8>(), 1..800);
        let head = fuzz::RingInput {
            flags: 0x40,
            ..fuzz::RingInput::default()
        };
        for _ in 0..300 {
            let steps = steps.new_tree(&mut runner).unwrap().current();
            assert_eq!(play(&[head.encode(), steps].concat()), None);
        }
    }

    #[test]
    fn every_fault_has_a_seed_in_a_format_that_can_have_it() {
        let of_rings = |fault: &RingFault| *fault != RingFault::Unanswerable;
        for fault in RingFault::ALL.into_iter().filter(of_rings) {
            let seeds = [false, true].map(|packed| fuzz::seed_for(packed, fault).is_some());
            assert!(seeds.contains(&true), "{fault:?}");
        }
    }

    #[test]
    fn the_corpus_of_split_rings_holds() {
        replay_ring("split_ring", false, fuzz::split_ring);
    }

    #[test]
    fn the_corpus_of_packed_rings_holds() {
        replay_ring("packed_ring", true, fuzz::packed_ring);
    }

    #[test]
    fn the_corpus_of_sessions_holds() {
        let _alone = DESCRIPTORS.lock().unwrap_or_else(PoisonError::into_inner);
        replay("protocol", &fuzz::protocol_seeds(), |_, data| {
            fuzz::protocol(data);
        });
        // In this test and not in one beside it: both count open descriptors.
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let seeds = fuzz::protocol_seeds();
        let mutated = (0..seeds.len(), any::<prop::sample::Index>(), any::<u8>());
        for _ in 0..300 {
            let (seed, at, byte) = mutated.new_tree(&mut runner).unwrap().current();
            let mut data = seeds[seed].1.clone();
            let at = at.index(data.len());
            data[at] = byte;
            fuzz::protocol(&data);
        }
    }

    #[test]
    fn the_corpus_of_configurations_holds() {
        replay("config", &fuzz::config_seeds(), |name, data| {
            let taken = fuzz::config(data);
            let wanted = ["file", "flags", "wire"].contains(&name);
            if wanted || ["refused", "syntax"].contains(&name) {
                assert_eq!(taken, wanted, "{name}");
            }
        });
    }

    #[test]
    fn the_corpus_of_images_holds() {
        let _alone = DESCRIPTORS.lock().unwrap_or_else(PoisonError::into_inner);
        let seeds = fuzz::qcow2_seeds();
        replay("qcow2", &seeds, |name, data| {
            let outcome = fuzz::qcow2(data);
            let refused = outcome == fuzz::Qcow2Outcome::Refused;
            assert_eq!(refused, name.starts_with("refused"), "{name}: {outcome:?}");
            if ["whole", "old", "compressed", "shared"].contains(&name) {
                let well = fuzz::Qcow2Outcome::Served {
                    well: 13,
                    failed: 0,
                };
                assert_eq!(outcome, well, "{name}");
            }
        });
        let mut runner = proptest::test_runner::TestRunner::deterministic();
        let mutated = mutated(seeds);
        for _ in 0..300 {
            fuzz::qcow2(&mutated.new_tree(&mut runner).unwrap().current());
        }
    }

    /// A seed with a piece of it written over.
    fn mutated(seeds: Vec<(String, Vec<u8>)>) -> impl Strategy<Value = Vec<u8>> {
        let seeds: Vec<_> = seeds.into_iter().map(|(_, seed)| seed).collect();
        let pieces = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
        let tail = prop::collection::vec(any::<u8>(), 0..200);
        (prop::sample::select(seeds), pieces, tail).prop_map(|(mut data, pieces, tail)| {
            for (at, byte) in pieces {
                let at = at.index(data.len());
                data[at] = byte;
            }
            data.extend(tail);
            data
        })
    }

    proptest! {
        #![proptest_config(cases(3000))]

        #[test]
        fn split_rings_hold_by_chance(data in mutated(fuzz::ring_seeds(false))) {
            fuzz::split_ring(&data);
        }

        #[test]
        fn packed_rings_hold_by_chance(data in mutated(fuzz::ring_seeds(true))) {
            fuzz::packed_ring(&data);
        }

        #[test]
        fn configurations_hold_by_chance(data in mutated(fuzz::config_seeds())) {
            fuzz::config(&data);
        }
    }
}
