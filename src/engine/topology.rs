//! Which memory is near to which core, and what follows for where vrings are served.

use std::sync::Arc;

use crate::memory::GuestRam;
use crate::sys::cpu;

/// Who knows the memory nodes: the machine, or a test.
#[derive(Debug, Clone, Copy)]
pub struct Topology {
    /// The node that a core is near to.
    pub of_core: fn(usize) -> Option<usize>,
    /// The node of the page at a front-end address.
    pub of_memory: fn(&Arc<GuestRam>, u64) -> Option<usize>,
}

impl Topology {
    /// As the kernel says.
    pub const MACHINE: Topology = Topology {
        of_core: cpu::numa_node,
        of_memory: GuestRam::node_of,
    };
}

/// How workers are chosen.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Placement {
    /// Queue pairs and disk queues go to one worker after the other.
    #[default]
    Spread,
    /// As `Spread` among the workers that are near to the guest's memory.
    Auto,
}

/// The workers among `workers` by the nodes of their cores, in the order of the nodes; those whose
/// node is not known are a group of their own. One group for `Spread`.
pub(super) fn groups(
    placement: Placement,
    workers: &[usize],
    node_of: impl Fn(usize) -> Option<usize>,
) -> Vec<(Option<usize>, Vec<usize>)> {
    if placement == Placement::Spread {
        return vec![(None, workers.to_vec())];
    }
    let mut groups: Vec<(Option<usize>, Vec<usize>)> = Vec::new();
    for &worker in workers {
        let node = node_of(worker);
        match groups.iter_mut().find(|(of, _)| *of == node) {
            Some((_, group)) => group.push(worker),
            None => groups.push((node, vec![worker])),
        }
    }
    groups.sort_by_key(|(node, _)| *node);
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_has_a_group_for_each_node_and_spread_one_for_all() {
        let node_of = |worker: usize| [Some(1), Some(0), Some(1), None].get(worker).copied()?;
        let all = [0, 1, 2, 3];
        assert_eq!(
            groups(Placement::Auto, &all, node_of),
            [(None, vec![3]), (Some(0), vec![1]), (Some(1), vec![0, 2])]
        );
        assert_eq!(
            groups(Placement::Spread, &all, node_of),
            [(None, all.to_vec())]
        );
    }
}
