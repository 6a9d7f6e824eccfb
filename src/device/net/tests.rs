//! The handlers over a scripted queue: byte-exact, and strict about the order of chains.
//! VIRTIO 1.3 §5.1.

mod offload;
mod rx;
mod script;
mod tx;
mod window;
mod wire;
