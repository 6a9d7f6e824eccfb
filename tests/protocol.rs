//! vhost-user as a front-end sees it: sessions over a socket pair, with a stand-in for the engine.
//!
//! Every message, in its order and out of it, twice, truncated, from front-ends that negotiate
//! little, and connections that end at any point. Rings and devices are tested elsewhere; here it
//! matters what the engine is asked for and what the front-end is answered.

mod support;

#[cfg(test)]
#[allow(unreachable_pub, reason = "helpers of the modules beside them")]
#[path = "protocol"]
mod protocol {
    mod fake;
    mod front_end;
    mod message;

    mod broken;
    mod life;
    mod memory;
    mod negotiation;
    mod resume;
    mod vrings;
}
