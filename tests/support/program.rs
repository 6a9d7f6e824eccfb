//! A program that a test has started.

use std::process::Child;

/// Ended when dropped, however the test ends: what goes on holds its namespace.
pub struct Program(pub Child);

impl Program {
    /// Ends it.
    pub fn end(&mut self) {
        // Both fail when it has ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    /// Waits until it ends by itself.
    pub fn wait(&mut self) {
        self.0.wait().expect("our own child");
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.end();
    }
}
