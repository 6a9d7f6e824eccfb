//! The handlers over a scripted queue: byte-exact, and strict about the order of chains.

mod offload;
mod rx;
mod script;
mod tx;
mod window;
mod wire;
