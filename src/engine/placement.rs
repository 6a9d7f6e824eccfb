//! Which queue on which core: a pure function of the configuration.

/// The worker of unit `unit` (a queue pair of a port, a queue of a disk) of the device with this
/// number, among `workers`, the numbers of those that may serve it.
///
/// Consecutive units of a device go to consecutive workers, and each device begins one further than
/// the one before it, so that single-queue devices spread as well.
pub(super) fn worker_of(device: usize, unit: u16, workers: &[usize]) -> usize {
    workers[(device + usize::from(unit)) % workers.len()]
}

/// The numbers of the workers on `cores`, where there is one on each of `all`; all of them, when
/// none of `cores` has one.
pub(super) fn workers_of(cores: &[usize], all: &[usize]) -> Vec<usize> {
    let serves = |worker: &usize| cores.contains(&all[*worker]);
    let workers: Vec<_> = (0..all.len()).filter(serves).collect();
    if workers.is_empty() {
        return (0..all.len()).collect();
    }
    workers
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_and_devices_spread_over_all_workers() {
        assert_eq!(
            (0..4)
                .map(|unit| worker_of(0, unit, &[0, 1]))
                .collect::<Vec<_>>(),
            [0, 1, 0, 1]
        );
        assert_eq!(
            (0..4)
                .map(|device| worker_of(device, 0, &[0, 1, 2]))
                .collect::<Vec<_>>(),
            [0, 1, 2, 0]
        );
        assert_eq!(worker_of(7, 9, &[3]), 3);
    }

    #[test]
    fn cores_without_a_worker_are_left_out_and_none_is_all() {
        assert_eq!(workers_of(&[7, 3, 5], &[3, 4, 7]), [0, 2]);
        assert_eq!(workers_of(&[], &[3, 4]), [0, 1]);
        assert_eq!(workers_of(&[9], &[3, 4]), [0, 1]);
    }
}
