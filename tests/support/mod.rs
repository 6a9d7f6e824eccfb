//! What the integration tests share: the daemon under test, front-ends that drive it, and the
//! places they run in.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses its part")]

pub mod daemon;
pub mod deadline;
pub mod guest;
pub mod initrd;
pub mod loop_device;
pub mod netns;
pub mod ovs;
pub mod pcap;
pub mod reference;
#[path = "testpmd.rs"]
pub mod testpmd;
pub mod tmp;
pub mod virtio_blk;
pub mod xts;
