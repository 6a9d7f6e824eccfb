//! Virtqueues against models: a driver of our own plays random sessions, and everything that comes
//! out of the ring is compared with what a plain list of chains says must come out.
//!
//! `vringd::testing::session` is the model, `models` its tests; `oracle` plays the same bytes to
//! the split queue of the `virtio-queue` crate; in `hostile` the driver writes garbage; `defects`
//! has a test for each mistake that other back-ends were found to make; `engine` has a worker in
//! the middle, in `moves` there are two, in `calls` it puts calls off, in `swaps` memory tables are
//! replaced; in `neighbour` one ring breaks beside others; `wire` joins two ports, `switch`
//! several, `offload` guests with different features; in `drops` and `losses` not all that is sent
//! arrives, in `waiting` a port goes while frames wait, and in `disabled` it sends where it must
//! not; in `by_chance` front-ends have any features and rings, break them and begin again; `nodes`
//! has memory on two nodes; `disk` compares the disk with a reference.

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the modules beside them")]
#[path = "rings"]
mod rings {
    mod port;
    mod script;

    mod by_chance;
    mod calls;
    mod defects;
    mod disabled;
    mod disk;
    mod drops;
    mod engine;
    mod features;
    mod hostile;
    mod limits;
    mod losses;
    mod models;
    mod moves;
    mod neighbour;
    mod nodes;
    mod offload;
    mod oracle;
    mod sizes;
    mod swaps;
    mod switch;
    mod waiting;
    mod walks;
    mod wire;
}
