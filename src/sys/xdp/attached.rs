//! Whether an interface has an XDP program, and where: rtnetlink(7) tells anybody.

use std::io;

use super::Mode;
use crate::sys::netlink::{Netlink, attribute};

/// IFLA_XDP, and in it IFLA_XDP_ATTACHED.
const XDP: u16 = 43;
const ATTACHED: u16 = 2;

/// Where the program of interface number `index` runs; `None` when it has none.
pub(super) fn mode(index: u32) -> io::Result<Option<Mode>> {
    let attributes = Netlink::new(libc::NETLINK_ROUTE)?.interface(index)?;
    Ok(read(&attributes))
}

/// What the attributes of an interface say.
fn read(attributes: &[u8]) -> Option<Mode> {
    // XDP_ATTACHED_DRV, _SKB, _HW, and _MULTI: of several the driver's is the first.
    match attribute(attribute(attributes, XDP)?, ATTACHED)?.first()? {
        1 | 3 | 4 => Some(Mode::Native),
        2 => Some(Mode::Generic),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_of_any_bytes_are_read_to_their_end() {
        let nested = |attached: u8| {
            let mut bytes = vec![5, 0, 1, 0, 9, 0, 0, 0];
            bytes.extend([12, 0, 43, 0x80, 5, 0, 2, 0, attached, 0, 0, 0]);
            bytes
        };
        assert_eq!(read(&nested(0)), None);
        assert_eq!(read(&nested(1)), Some(Mode::Native));
        assert_eq!(read(&nested(2)), Some(Mode::Generic));
        let whole = nested(1);
        for end in 0..17 {
            assert_eq!(read(&whole[..end]), None, "{end}");
        }
        for length in [0, 1, 3, 255] {
            let mut bytes = whole.clone();
            bytes[0] = length;
            bytes[8] = length;
            assert_eq!(read(&bytes), None, "{length}");
        }
        assert_eq!(read(&[0xff; 64]), None);
    }
}
