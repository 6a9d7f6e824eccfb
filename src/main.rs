//! The `vringd` command.
fn main() {}
