//! Virtqueues against models: a driver of our own plays random sessions, and everything that comes
//! out of the ring is compared with what a plain list of chains says must come out.

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the modules beside them")]
#[path = "rings"]
mod rings {
    mod script;
    mod session;

    mod defects;
    mod disk;
    mod engine;
    mod hostile;
    mod models;
    mod oracle;
}
