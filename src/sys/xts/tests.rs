//! Against the standard's own vectors, and against XTS written out on a plain AES.

use std::sync::Arc;

use super::*;
use crate::memory::{Access, GuestRam, Segments, copy};
use crate::sys::xts::standard::reference;

/// IEEE 1619-2007, annex B, vectors 10 to 14.
const KEY: &str = "2718281828459045235360287471352662497757247093699959574966967627\
     3141592653589793238462643383279502884197169399375105820974944592";

/// Of each vector the number of the sector and its ciphertext; the plaintext is 0 to 255, twice.
/// Of 11 to 13 the first and the last 32 bytes.
const VECTORS: [(u64, &str); 5] = [
    (
        0xff,
        "\
         1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d\
         66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd5776926c49a3095eb108fd1098baec70\
         aaa66999a72a82f27d848b21d4a741b0c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf10\
         00020887891429ca2a3e7a7d7df7b10355165c8b9a6d0a7de8b062c4500dc4cd120c0f7418dae3d0\
         b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f93ec05c52e0493ef\
         31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec583e9645e07b8d9670655ba5bbcfecc6\
         dc3966380ad8fecb17b6ba02469a020a84e18e8f84252070c13e9f1f289be54fbc481457778f6160\
         15e1327a02b140f1505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae\
         9be69a2ffeceb1bec9de244fbe15992b11b77c040f12bd8f6a975a44a0f90c29a9abc3d4d8939272\
         84c58754cce294529f8614dcd2aba991925fedc4ae74ffac6e333b93eb4aff0479da9a410e4450e0\
         dd7ae4c6e2910900575da401fc07059f645e8b7e9bfdef33943054ff84011493c27b3429eaedb4ed\
         5376441a77ed43851ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa\
         773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151",
    ),
    (
        0xffff,
        "\
         77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e1154fbff89eeaeea79\
         1f4a7ab1f9868294a4f9e27b42af8100cb9d59cef9645803",
    ),
    (
        0xffffff,
        "\
         e387aaa58ba483afa7e8eb469778317ecf4cf573aa9d4eac23f2cdf914e4e200ed242c8900dd1fa9\
         65bc950dfce09b132263a1eef52dd6888c309f5a7d712826",
    ),
    (
        0xffffffff,
        "\
         bf53d2dade78e822a4d949a9bc6766b01b06a8ef70d26748c6a7fc36d80ae4c5f6516139420fcff3\
         b7361d86322c4bd84c82f335abb152c4a93411373aaa8220",
    ),
    (
        0xffffffffff,
        "\
         64497e5a831e4a932c09be3e5393376daa599548b816031d224bbf50a818ed2350eae7e96087c8a0\
         db51ad290bd00c1ac1620857635bf246c176ab463be30b808da548081ac847b158e1264be25bb091\
         0bbc92647108089415d45fab1b3d2604e8a8eff1ae4020cfa39936b66827b23f371b92200be90251\
         e6d73c5f86de5fd4a950781933d79a28272b782a2ec313efdfcc0628f43d744c2dc2ff3dcb66999b\
         50c7ca895b0c64791eeaa5f29499fb1c026f84ce5b5c72ba1083cddb5ce45434631665c333b60b11\
         593fb253c5179a2c8db813782a004856a1653011e93fb6d876c18366dd8683f53412c0c180f9c848\
         592d593f8609ca736317d356e13e2bff3a9f59cd9aeb19cd482593d8c46128bb32423b37a9adfb48\
         2b99453fbe25a41bf6feb4aa0bef5ed24bf73c762978025482c13115e4015aac992e5613a3b5c2f6\
         85b84795cb6e9b2656d8c88157e52c42f978d8634c43d06fea928f2822e465aa6576e9bf41938450\
         6cc3ce3c54ac1a6f67dc66f3b30191e698380bc999b05abce19dc0c6dcc2dd001ec535ba18deb2df\
         1a101023108318c75dc98611a09dc48a0acdec676fabdf222f07e026f059b672b56e5cbc8e1d21bb\
         d867dd927212054681d70ea737134cdfce93b6f82ae22423274e58a0821cc5502e2d0ab4585e94de\
         6975be5e0b4efce51cd3e70c25a1fbbbd609d273ad5b0d59631c531f6a0a57b9",
    ),
];

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> = hex.chars().map(|c| c.to_digit(16).unwrap() as u8).collect();
    digits.chunks(2).map(|two| (two[0] << 4) | two[1]).collect()
}

struct Rig {
    ram: Arc<GuestRam>,
    xts: Xts,
    key: [u8; 64],
}

impl Rig {
    fn new(key: [u8; 64], sector: u32) -> Rig {
        Rig {
            ram: GuestRam::for_test(&[(0, 1 << 20)]),
            xts: Xts::new(&DiskKey::for_test(&key), sector).unwrap(),
            key,
        }
    }

    fn segment(&self, at: u64, len: usize) -> Segment {
        let mut list = Segments::with_capacity(1);
        let len = u32::try_from(len).unwrap();
        self.ram
            .translate(at, len, Access::Write, &mut list)
            .unwrap();
        list.as_slice()[0]
    }

    /// From one place into another.
    fn run(&mut self, direction: Direction, offset: u64, data: &[u8]) -> Vec<u8> {
        let (from, to) = (
            self.segment(3, data.len()),
            self.segment(0x8_0001, data.len()),
        );
        copy::write(&[from], 0, data);
        assert_eq!(self.xts.run(direction, offset, from, to), data.len());
        let mut out = vec![0; data.len()];
        copy::read(&[to], 0, &mut out);
        out
    }
}

#[test]
fn the_vectors_of_ieee_1619_come_out() {
    let mut rig = Rig::new(bytes(KEY).try_into().unwrap(), 512);
    let plain: Vec<u8> = (0..=255).chain(0..=255).collect();
    for (number, want) in VECTORS {
        let offset = number * 512;
        let got = rig.run(Direction::Encrypt, offset, &plain);
        let want = bytes(want);
        let half = want.len() / 2;
        assert_eq!(got[..half], want[..half], "sector {number:#x}");
        assert_eq!(got[512 - half..], want[half..], "sector {number:#x}");
        assert_eq!(rig.run(Direction::Decrypt, offset, &got), plain);
        assert!(reference(&rig.key, 512, offset, &plain, true) == got);
    }
}

#[test]
fn sectors_are_numbered_in_512_bytes_whatever_their_size() {
    let key: [u8; 64] = core::array::from_fn(|i| (i * 7 + 1) as u8);
    let plain: Vec<u8> = (0..5 * 4096u32).map(|i| ((i * i) >> 7) as u8).collect();
    for sector in [512, 4096] {
        let mut rig = Rig::new(key, sector);
        for offset in [0, 4096, 12288, (1 << 45) - 8192, u64::MAX - 0xf_ffff] {
            let got = rig.run(Direction::Encrypt, offset, &plain);
            let want = reference(&key, sector as usize, offset, &plain, true);
            assert!(got == want, "{sector} at {offset}");
            assert!(rig.run(Direction::Decrypt, offset, &got) == plain);
            assert!(reference(&key, sector as usize, offset, &got, false) == plain);
        }
    }
}

#[test]
fn sectors_change_in_place_and_what_is_no_whole_sector_stays() {
    let mut rig = Rig::new(core::array::from_fn(|i| i as u8), 512);
    let place = rig.segment(0, 1300);
    let plain = vec![0x5a; 1300];
    copy::write(&[place], 0, &plain);
    assert_eq!(rig.xts.run(Direction::Encrypt, 0, place, place), 1024);
    let mut out = vec![0; 1300];
    copy::read(&[place], 0, &mut out);
    assert!(out[..1024] == reference(&rig.key, 512, 0, &plain[..1024], true));
    assert_eq!(out[1024..], plain[1024..]);
    assert_eq!(
        rig.xts.run(Direction::Encrypt, 0, place, place.take(511)),
        0
    );
}

#[test]
fn equal_halves_are_refused_and_nothing_is_shown() {
    let equal = DiskKey::for_test(&[1; 64]);
    Xts::new(&equal, 512).unwrap_err();
    let xts = Rig::new(core::array::from_fn(|i| i as u8), 512).xts;
    assert_eq!(format!("{xts:?}"), "Xts { sector: 512, .. }");
}
