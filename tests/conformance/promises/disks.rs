//! What is promised of disks.

use super::Promise;

pub const ALL: &[Promise] = &[
    (
        "Files and block devices through io_uring, with and without O_DIRECT, `ram:`, `null:`",
        &[
            "tests/blk/matrix.rs: on_a_file_with_direct_io on_a_file_in_the_page_cache \
             on_a_file_in_blocks_of_4096 in_memory",
            "tests/guest.rs: a_disk_is_byte_exact_on_a_split_ring \
             a_disk_is_byte_exact_on_two_packed_rings \
             several_disks_of_all_kinds_live_in_one_daemon",
        ],
    ),
    (
        "What was flushed is there after a power cut",
        &[
            "tests/proof/power_cut.rs: after_a_power_cut_every_durable_write_is_there",
            "scripts/soak blk",
        ],
    ),
    (
        "`cache`, and the driver's choice while it runs; a flush that failed fails for ever",
        &[
            "tests/blk/durable.rs: the_cache_follows_the_driver_on_a_split_ring \
             the_cache_follows_the_driver_on_a_packed_ring",
            "tests/blk/flush.rs: a_flush_that_failed_fails_for_ever_on_a_split_ring \
             a_flush_that_failed_fails_for_ever_on_a_packed_ring \
             a_flush_fails_after_a_durable_write_was_told_of_a_loss_on_a_split_ring \
             a_flush_fails_after_a_durable_write_was_told_of_a_loss_on_a_packed_ring",
        ],
    ),
    (
        "`discard`: DISCARD and WRITE_ZEROES of many ranges",
        &[
            "tests/blk/discard.rs: a_block_device_gives_space_back_in_blocks_of_512 \
             a_block_device_gives_space_back_in_blocks_of_4096",
            "tests/blk/matrix.rs: published_limits_are_kept \
             space_is_given_back_only_where_that_is_allowed",
        ],
    ),
    (
        "`format = \"qcow2\"`, `backing_dir`",
        &[
            "tests/blk/qcow2.rs: an_empty_image_is_filled \
             a_backing_file_is_read_and_stays_as_it_is what_was_answered_survives_the_daemon \
             an_image_does_not_choose_which_files_are_read a_broken_image_breaks_nothing_else",
            "scripts/fuzz qcow2",
        ],
    ),
    (
        "`encrypt`: what the host's cryptsetup reads and writes too",
        &[
            "src/sys/xts/tests.rs: the_vectors_of_ieee_1619_come_out",
            "tests/blk/encrypted.rs: a_file_with_direct_io_has_ciphertext \
             a_key_of_another_size_is_refused_with_its_name_and_size",
            "tests/proof/plain.rs: cryptsetup_and_the_daemon_read_each_others_disks",
        ],
    ),
    (
        "`lock`: one writer or many readers, as QEMU locks",
        &[
            "tests/blk/locks.rs: a_second_writer_of_ours_is_refused_by_name \
             with_raw_images_we_are_what_a_guest_of_qemus_is",
        ],
    ),
    (
        "Limits of disks and of groups, changed while guests run",
        &[
            "tests/blk/limits.rs: requests_and_bytes_pass_at_their_rates_reads_and_writes_apart \
             a_group_is_shared_by_disks_of_two_workers \
             a_group_is_shared_and_rates_and_groups_change_while_guests_run",
        ],
    ),
    (
        "Disks grow while guests use them",
        &[
            "tests/resize.rs: a_guest_sees_its_disks_grow_and_uses_what_is_new",
            "tests/blk/resize.rs: a_file_that_grows_is_told_and_can_be_used_to_its_new_end \
             what_a_file_lost_can_not_be_reached_and_only_the_next_guest_is_told",
        ],
    ),
    (
        "`on_enospc`, `io_timeout`, `fault`",
        &[
            "tests/blk/hold.rs: writes_wait_for_space_and_all_else_goes_on \
             a_disk_that_is_full_for_a_while_loses_nothing \
             what_takes_too_long_is_told_of_once_and_counted",
            "tests/blk/faults.rs: the_matrix_holds_on_a_disk_that_is_short_late_and_interrupted \
             failures_are_told_and_change_nothing \
             what_a_disabled_queue_has_in_flight_is_answered",
        ],
    ),
    (
        "A device that stands still or fails harms nobody else, and is no hang",
        &["tests/proof/sick.rs: a_device_that_stands_still_or_fails_harms_nobody_else"],
    ),
    (
        "Large requests keep nobody else waiting",
        &[
            "src/device/blk/tests/large.rs: large_reads_and_writes_are_done_piece_by_piece \
             large_ranges_are_zeroed_a_few_in_a_turn",
        ],
    ),
    (
        "Queues go from one worker to another while guests use them",
        &[
            "tests/blk/workers.rs: queues_of_an_image_move_under_verified_load \
             queues_of_a_file_move_under_verified_load",
            "tests/rings/moves.rs: queues_move_with_requests_that_are_late_and_out_of_order",
        ],
    ),
    (
        "`iopoll`, `sqpoll`, `fixed_buffers`",
        &[
            "tests/blk/matrix.rs: with_a_thread_of_the_kernel with_registered_memory \
             with_a_device_that_is_polled_if_it_can_be",
            "tests/proof/polled.rs: an_nvme_disk_is_polled_and_all_blocks_are_right",
            "tests/guest.rs: a_disk_is_byte_exact_while_a_balloon_grows_and_shrinks",
        ],
    ),
    (
        "fio, ext4 and xfs in guests find what they wrote",
        &[
            "tests/proof/load.rs: fio_and_xfs_find_what_they_wrote_on_split_rings \
             fio_and_ext4_find_what_they_wrote_on_packed_rings",
        ],
    ),
    (
        "Requests per second beside qemu-storage-daemon and fio; `vringd bench blk --verify`",
        &[
            "scripts/bench blk",
            "benches/blk.rs",
            "tests/bench_blk.rs: what_is_written_to_memory_is_read_back a_flipped_byte_is_found \
             a_disk_that_forgets_is_found qemus_back_end_is_driven_as_well",
        ],
    ),
];
