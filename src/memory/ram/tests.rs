//! Tables of memory and the translation of addresses, with regions that touch and regions apart.

use super::*;

const MIB: u64 = 1 << 20;

fn spec(gpa: u64, size: u64, file_bytes: u64, mmap_offset: u64) -> RegionSpec {
    let file = Arc::new(super::super::region::memfd(file_bytes).unwrap());
    RegionSpec {
        gpa,
        size,
        uva: gpa + (1 << 40),
        mmap_offset,
        file,
    }
}

#[test]
fn a_region_beyond_its_file_is_refused_before_it_is_mapped() {
    let error = GuestRam::map(vec![spec(0, 2 * MIB, MIB, 0)], None).unwrap_err();
    assert!(matches!(error, MemoryError::BeyondFile { .. }), "{error}");
    let error = GuestRam::map(vec![spec(0, MIB, MIB, 4096)], None).unwrap_err();
    assert!(matches!(error, MemoryError::BeyondFile { .. }), "{error}");
}

#[test]
fn zero_wrapping_and_overlapping_regions_are_refused() {
    for bad in [
        spec(0, 0, MIB, 0),
        spec(u64::MAX - 4096 - (1 << 40), MIB, MIB, 0),
    ] {
        let error = GuestRam::map(vec![bad], None).unwrap_err();
        assert!(matches!(error, MemoryError::Size { .. }), "{error}");
    }
    let overlap = vec![spec(MIB, MIB, MIB, 0), spec(0, MIB + 1, 2 * MIB, 0)];
    let error = GuestRam::map(overlap, None).unwrap_err();
    assert!(
        matches!(
            error,
            MemoryError::Overlap {
                first: 0,
                second: MIB
            }
        ),
        "{error}"
    );
}

#[test]
fn a_segment_lies_in_one_region_whole_and_has_a_byte() {
    let ram = GuestRam::for_test(&[(0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x1000)]);
    let mut find = ram.finder();
    let mut len = |addr, len| find(addr, len).map(|segment| segment.len());
    assert_eq!(len(0x1000, 0x1000), Some(0x1000));
    assert_eq!(len(0x1fff, 1), Some(1));
    assert_eq!(len(0x1fff, 2), None, "two regions are for `translate`");
    assert_eq!(len(0x8000, 0x1001), None, "past the end");
    assert_eq!(len(0x8fff, u32::MAX), None);
    assert_eq!(len(0x1000, 0), None);
    assert_eq!(len(0xfff, 1), None);
    assert_eq!(len(u64::MAX, 1), None);
    let segment = ram.finder()(0x2010, 8).expect("mapped");
    assert_eq!(ram.gpa_of(&segment), Some(0x2010));
}

#[test]
fn a_buffer_spans_two_adjacent_regions_and_faults_past_them() {
    let ram = GuestRam::for_test(&[(MIB, MIB), (0, MIB)]);
    let mut out = Segments::with_capacity(8);
    ram.translate(MIB - 10, 30, Access::Read, &mut out).unwrap();
    let lens: Vec<_> = out.as_slice().iter().map(Segment::len).collect();
    assert_eq!(lens, [10, 20]);
    assert_eq!(ram.gpa_of(&out.as_slice()[0]), Some(MIB - 10));
    assert_eq!(ram.gpa_of(&out.as_slice()[1]), Some(MIB));
    let past = ram.translate(2 * MIB - 1, 2, Access::Read, &mut out);
    assert_eq!(past, Err(Translate::Unmapped));
    let wrap = ram.translate(u64::MAX, 2, Access::Write, &mut out);
    assert_eq!(wrap, Err(Translate::Unmapped));
}

#[test]
fn many_regions_translate_like_few() {
    let regions: Vec<_> = (0..100).map(|i| (i * 8192, 4096)).collect();
    let ram = GuestRam::for_test(&regions);
    let mut out = Segments::with_capacity(1);
    for i in 0..100 {
        out.clear();
        ram.translate(i * 8192 + 4095, 1, Access::Read, &mut out)
            .unwrap();
        assert_eq!(ram.gpa_of(&out.as_slice()[0]), Some(i * 8192 + 4095));
        out.clear();
        let hole = ram.translate(i * 8192 + 4096, 1, Access::Read, &mut out);
        assert_eq!(hole, Err(Translate::Unmapped));
    }
}

#[test]
fn a_full_list_is_told_from_an_unmapped_address() {
    let ram = GuestRam::for_test(&[(0, 4096), (4096, 4096)]);
    let mut out = Segments::with_capacity(1);
    assert_eq!(
        ram.translate(4000, 200, Access::Read, &mut out),
        Err(Translate::Full)
    );
}

#[test]
fn an_unaligned_file_offset_maps_the_right_bytes() {
    use std::os::unix::fs::FileExt;
    let mut odd = spec(0, 4096, 16384, 4196);
    odd.uva = 100;
    odd.file.write_all_at(b"here", 4196).unwrap();
    let ram = GuestRam::map(vec![odd], None).unwrap();
    let mut out = Segments::with_capacity(1);
    ram.translate(0, 4, Access::Read, &mut out).unwrap();
    let mut bytes = [0; 4];
    super::super::copy::read(out.as_slice(), 0, &mut bytes);
    assert_eq!(&bytes, b"here");
}

#[test]
fn an_unchanged_region_keeps_its_mapping_and_a_removed_one_is_gone() {
    let ram = GuestRam::for_test(&[(0, MIB), (MIB, MIB)]);
    let before = ram.regions[0].hva;
    let more = ram.with_region(spec(4 * MIB, MIB, MIB, 0)).unwrap();
    assert_eq!(more.regions[0].hva, before);
    assert_eq!(more.len(), 3);
    let less = more.without_region(MIB, MIB, MIB + (1 << 40)).unwrap();
    assert_eq!(less.regions[0].hva, before);
    assert_eq!(less.len(), 2);
    let error = less.without_region(MIB, MIB, MIB + (1 << 40)).unwrap_err();
    assert!(matches!(error, MemoryError::Unknown { .. }), "{error}");
}

/// VIRTIO 1.3 §2.7, §2.8.10.1.
#[test]
fn an_area_must_lie_in_one_region_and_be_aligned() {
    let ram = GuestRam::for_test(&[(0, MIB), (MIB, MIB)]);
    let base = 1 << 40;
    ram.area(base + 16, 4096, 16).unwrap();
    let error = ram.area(base + 8, 4096, 16).unwrap_err();
    assert!(matches!(error, MemoryError::Unaligned { .. }), "{error}");
    let error = ram.area(base + MIB - 16, 32, 16).unwrap_err();
    assert!(matches!(error, MemoryError::Unmapped { .. }), "{error}");
    let error = ram.area(16, 32, 16).unwrap_err();
    assert!(matches!(error, MemoryError::Unmapped { .. }), "{error}");
}

#[test]
fn an_entry_across_two_regions_is_read_whole() {
    let ram = GuestRam::for_test(&[(0, 4096), (4096, 4096)]);
    let mut out = Segments::with_capacity(2);
    ram.translate(4096 - 4, 16, Access::Write, &mut out)
        .unwrap();
    let bytes: [u8; 16] = core::array::from_fn(|i| u8::try_from(i).unwrap());
    super::super::copy::write(out.as_slice(), 0, &bytes);
    let words = ram.read_entry(4096 - 4).unwrap();
    assert_eq!(words[0].to_le_bytes(), bytes[..8]);
    assert_eq!(words[1].to_le_bytes(), bytes[8..]);
    assert_eq!(ram.read_entry(8192 - 8), None);
    // Over as many regions as it has bytes.
    let regions: Vec<_> = (0..16).map(|byte| (4096 + byte, 1)).collect();
    let ram = GuestRam::for_test(&regions);
    for byte in 0..16u8 {
        let mut segments = Segments::with_capacity(1);
        let at = 4096 + u64::from(byte);
        ram.translate(at, 1, Access::Write, &mut segments).unwrap();
        super::super::copy::write(segments.as_slice(), 0, &[byte]);
    }
    let words = ram.read_entry(4096).unwrap();
    let bytes: Vec<u8> = words.into_iter().flat_map(u64::to_le_bytes).collect();
    assert_eq!(bytes, (0..16).collect::<Vec<u8>>());
    for past in 1..16 {
        assert_eq!(ram.read_entry(4096 + past), None);
    }
}
