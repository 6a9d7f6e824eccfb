//! A histogram of latencies: fixed size, constant time, no allocation after it is made.

/// Values below this have a bucket of their own; above, every power of two is cut into half as
/// many, so that a bucket is at most 1/64 of its values wide.
const EXACT: usize = 128;
const EXACT_BITS: u32 = EXACT.trailing_zeros();
const STEPS: usize = EXACT / 2;
const BUCKETS: usize = EXACT + (64 - EXACT_BITS as usize) * STEPS;

/// The percentiles shown: name in JSON, name in the table, value in thousandths.
pub(super) const PERCENTILES: [(&str, &str, u64); 4] = [
    ("p50", "p50", 500),
    ("p90", "p90", 900),
    ("p99", "p99", 990),
    ("p99_9", "p99.9", 999),
];

/// Counts of values over the whole range of `u64`, each known to 1/64 of itself.
#[derive(Debug, Clone)]
pub struct Histogram {
    counts: Box<[u64]>,
    samples: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Histogram {
        Histogram {
            counts: vec![0; BUCKETS].into(),
            samples: 0,
            max: 0,
        }
    }
}

impl Histogram {
    /// Counts `value`.
    #[inline]
    pub fn record(&mut self, value: u64) {
        self.counts[bucket_of(value)] += 1;
        self.samples += 1;
        self.max = self.max.max(value);
    }

    /// Counts what another counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (to, from) in self.counts.iter_mut().zip(&other.counts) {
            *to += from;
        }
        self.samples += other.samples;
        self.max = self.max.max(other.max);
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.counts.fill(0);
        (self.samples, self.max) = (0, 0);
    }

    /// Values counted.
    #[must_use]
    pub fn samples(&self) -> u64 {
        self.samples
    }

    /// The greatest value, exactly; 0 when there is none.
    #[must_use]
    pub fn max(&self) -> u64 {
        self.max
    }

    /// The value that `per_mille` of 1000 values do not exceed: the upper end of its bucket, but
    /// never more than the greatest value. 0 when there is none.
    #[must_use]
    pub fn percentile(&self, per_mille: u64) -> u64 {
        let wanted = u128::from(self.samples) * u128::from(per_mille.min(1000));
        // The rank of the value, counted from 1.
        let rank = wanted.div_ceil(1000).max(1);
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank {
                return upper_end(bucket).min(self.max);
            }
        }
        0
    }
}

#[inline]
#[expect(clippy::cast_possible_truncation, reason = "below BUCKETS")]
fn bucket_of(value: u64) -> usize {
    if value < EXACT as u64 {
        return value as usize;
    }
    // What is left of the leading bits after this shift lies in EXACT / 2..EXACT.
    let shift = u64::BITS - value.leading_zeros() - EXACT_BITS;
    shift as usize * STEPS + (value >> shift) as usize
}

/// The greatest value of a bucket.
fn upper_end(bucket: usize) -> u64 {
    let Some(above) = bucket.checked_sub(EXACT) else {
        return bucket as u64;
    };
    let shift = above / STEPS + 1;
    let lead = (above % STEPS + STEPS) as u64;
    (lead << shift) | ((1 << shift) - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(values: impl IntoIterator<Item = u64>) -> Histogram {
        let mut histogram = Histogram::default();
        values.into_iter().for_each(|value| histogram.record(value));
        histogram
    }

    #[test]
    fn nothing_counted_is_zero_everywhere() {
        let mut histogram = of([3, 4]);
        histogram.clear();
        for empty in [histogram, Histogram::default()] {
            assert_eq!((empty.samples(), empty.max()), (0, 0));
            assert_eq!(empty.percentile(500), 0);
        }
    }

    #[test]
    fn small_values_are_exact() {
        let histogram = of(1..=100);
        assert_eq!(histogram.samples(), 100);
        assert_eq!(histogram.max(), 100);
        for (per_mille, value) in [(0, 1), (10, 1), (500, 50), (900, 90), (990, 99), (999, 100)] {
            assert_eq!(histogram.percentile(per_mille), value, "{per_mille}");
        }
        assert_eq!(histogram.percentile(1000), 100);
    }

    #[test]
    fn one_slow_frame_in_a_thousand_shows_at_the_right_place() {
        let histogram = of((0..998).map(|_| 5000).chain([1_000_000, 2_000_000]));
        assert!(histogram.percentile(990) < 5100);
        assert!((1_000_000..1_020_000).contains(&histogram.percentile(999)));
        assert_eq!(histogram.percentile(1000), 2_000_000);
    }

    #[test]
    fn two_merged_are_as_one() {
        let (mut low, high) = (of(1..=50), of(51..=100));
        low.merge(&high);
        let one = of(1..=100);
        assert_eq!((low.samples(), low.max()), (100, 100));
        for per_mille in [10, 500, 510, 999] {
            assert_eq!(low.percentile(per_mille), one.percentile(per_mille));
        }
    }

    #[test]
    fn buckets_follow_on_each_other_without_gap() {
        for bucket in 0..BUCKETS - 1 {
            let end = upper_end(bucket);
            assert_eq!(bucket_of(end), bucket);
            assert_eq!(bucket_of(end + 1), bucket + 1);
        }
        assert_eq!(upper_end(BUCKETS - 1), u64::MAX);
        assert_eq!(bucket_of(u64::MAX), BUCKETS - 1);
    }

    proptest! {
        #[test]
        fn a_percentile_is_the_ranked_value_to_a_64th(
            mut values in proptest::collection::vec(0u64..1 << 40, 1..200),
            per_mille in 0u64..=1000,
        ) {
            let found = of(values.iter().copied()).percentile(per_mille);
            values.sort_unstable();
            let rank = usize::try_from((values.len() as u64 * per_mille).div_ceil(1000)).unwrap();
            let exact = values[rank.max(1) - 1];
            prop_assert!(found >= exact && found <= exact + exact / 64);
        }
    }
}
