//! Disks of the real daemon, with a front-end of our own that decides on every descriptor.
//!
//! `matrix` has every request in every shape, `broken` those that nobody can answer, `reference`
//! the same ones for a disk of another make, `durable` what must be on the disk when, `encrypted`
//! what is there in ciphertext, `discard` what is given back; `uring` has what a disk asks of
//! io_uring; in `faults` the disk is sick, in `flush` the kernel loses what was written, in `hold`
//! it is full or slow, in `resize` it grows and shrinks, in `qcow2` it is in an image, which is
//! given up in `given_up`, in `locks` somebody else uses it, in `torn` the front-end's memory goes
//! away, in `memory` the disk is there, in `limits` it may do so much in a second, in `workers` its
//! queues are served by two workers, in `queues` one of them waits.

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the modules beside them")]
#[path = "blk"]
mod blk {
    mod front_end;
    mod mounted;
    mod served;
    #[allow(dead_code, reason = "a part of it is for the power-cut proof")]
    #[path = "../proof/driver.rs"]
    mod two_queues;

    mod broken;
    mod discard;
    mod durable;
    mod encrypted;
    mod faults;
    mod flush;
    mod given_up;
    mod hold;
    mod limits;
    mod locks;
    mod matrix;
    mod memory;
    mod qcow2;
    mod queues;
    mod reference;
    mod resize;
    mod torn;
    mod uring;
    mod workers;
}
