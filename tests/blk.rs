//! Disks of the real daemon, with a front-end of our own that decides on every descriptor.
//!
//! `matrix` has every request in every shape, `durable` what must be on the disk when, `encrypted`
//! what is there in ciphertext; `uring` has what a disk asks of io_uring; in `faults` the disk is
//! sick, in `locks` somebody else uses it.

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the modules beside them")]
#[path = "blk"]
mod blk {
    mod front_end;
    mod served;

    mod durable;
    mod encrypted;
    mod faults;
    mod locks;
    mod matrix;
    mod uring;
}
