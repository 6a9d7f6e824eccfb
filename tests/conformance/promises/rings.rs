//! What is promised of virtqueues.

use super::Promise;

pub const UNDERSTOOD: &[Promise] = &[
    (
        "Split and packed rings with every set of INDIRECT_DESC (also a direct descriptor before a \
         table), EVENT_IDX, IN_ORDER, MRG_RXBUF, NOTIFICATION_DATA and VERSION_1, and with \
         ORDER_PLATFORM and ANY_LAYOUT, legacy drivers too",
        &[
            "tests/rings/features.rs: frames_move_with_every_set_of_features_on_split_rings \
             frames_move_with_every_set_of_features_on_packed_rings",
            "src/device/net/config.rs: only_what_is_configured_is_offered",
        ],
    ),
    (
        "INDIRECT_DESC, direct and indirect descriptors in one chain",
        &[
            "src/ring/tests.rs: indirect_and_direct_give_the_same_buffers \
             a_direct_descriptor_may_precede_an_indirect_one",
            "tests/rings/models.rs: a_split_ring_does_what_the_model_says \
             a_packed_ring_does_what_the_model_says",
        ],
    ),
    (
        "RING_RESET: one virtqueue stops and starts anew while the others run, with chains in \
         flight, in place and with another size, with every set of INDIRECT_DESC, EVENT_IDX, \
         IN_ORDER and MRG_RXBUF",
        &[
            "tests/reset.rs: a_virtqueue_is_reset_under_traffic_split \
             a_virtqueue_is_reset_under_traffic_packed",
            "tests/protocol/vrings.rs: one_vring_is_reset_to_another_size_while_the_other_runs",
        ],
    ),
    (
        "Legacy drivers, without VERSION_1: a header of 10 bytes, or of 12 with MRG_RXBUF",
        &[
            "src/device/net/tests/rx.rs: legacy_drivers_have_a_header_without_num_buffers",
            "tests/guest.rs: a_legacy_guest_works_with_the_short_header_and_the_long_one",
        ],
    ),
    (
        "Split rings of 2 to 32768 descriptors, packed rings of 1 to 32768, of any size",
        &[
            "src/ring/tests.rs: the_largest_ring_works a_ring_of_the_smallest_size_works",
            "src/ring/tests/faults.rs: impossible_sizes_and_bases_are_refused",
            "tests/protocol/vrings.rs: sizes_are_those_of_the_ring_format",
            "tests/bench_net.rs: rings_of_32768_descriptors_are_used_to_the_last \
             indirect_descriptors_and_rings_of_any_size_lose_nothing",
            "tests/testpmd.rs: packed_rings_of_odd_size_lose_no_frame",
        ],
    ),
    (
        "128 queue pairs",
        &["tests/bench_net.rs: all_128_queue_pairs_move_frames"],
    ),
    (
        "IN_ORDER: chains that were only read need one used element or descriptor for many, and in \
         both directions a burst is shown by one store (docs/decisions/0015)",
        &[
            "src/ring/tests/batches.rs: \
             a_batch_of_chains_that_were_only_read_is_one_used_element \
             a_batch_passes_the_event_index_wherever_in_it_that_is",
            "src/ring/tests/stores.rs: what_was_sent_is_one_element_and_the_index_on_a_split_ring \
             what_was_received_is_an_element_each_and_the_index_once_on_a_split_ring \
             what_was_sent_is_one_descriptor_for_32_on_a_packed_ring_the_first_last \
             what_was_received_is_a_descriptor_each_the_first_last_on_a_packed_ring",
            "src/ring/tests/in_order.rs: \
             a_run_of_chains_that_were_only_read_is_one_used_descriptor \
             a_chain_that_was_written_ends_the_run_and_has_a_descriptor_of_its_own \
             a_used_descriptor_says_whether_its_length_counts a_run_is_never_longer_than_the_ring",
            "src/bench/ring/tests.rs: in_order_the_ids_go_round \
             one_element_gives_back_all_buffers_up_to_its_own",
        ],
    ),
    (
        "The ten ring paths of DPDK's driver lose no frame and change no byte",
        &[
            "tests/testpmd.rs: echoes_64_and_1518_bytes_and_loses_none \
             brings_back_every_byte_in_order",
            "tests/plans.rs: restarts_of_port_front_end_and_daemon_lose_no_ring",
        ],
    ),
];

pub const TOLD: &[Promise] = &[
    (
        "Kicks and calls by flags, by event index and by event areas, in both directions",
        &[
            "src/ring/tests.rs: calls_follow_the_event_index calls_follow_the_flags \
             kicks_are_off_while_polling_and_on_when_asked",
            "tests/rings/models.rs: a_split_ring_does_what_the_model_says \
             a_packed_ring_does_what_the_model_says",
        ],
    ),
    (
        "A worker that polls wants no kick, one that sleeps does",
        &[
            "tests/bench_net.rs: who_polls_is_not_kicked_and_who_sleeps_is",
            "src/engine/idle.rs: spin_never_parks_and_interrupt_parks_at_once",
            "tests/idle.rs: sixteen_idle_devices_use_under_one_percent_of_a_core \
             a_spinning_worker_never_blocks",
        ],
    ),
    (
        "Who takes a ring over calls its driver, which may have been told nothing",
        &["tests/rings/engine.rs: \
             who_takes_over_a_ring_calls_a_driver_that_may_have_been_told_nothing"],
    ),
    (
        "Calls are put off until so many buffers or so many microseconds, and none is lost",
        &["tests/rings/calls.rs: a_call_tells_of_so_many_buffers \
             buffers_nobody_asked_for_count_once_a_call_is_owed a_call_comes_when_its_time_is_up \
             a_call_is_made_before_sleep a_stop_makes_the_call_that_is_owed_and_no_other \
             a_disk_calls_before_sleep"],
    ),
    (
        "No kick, call, frame or message is lost between threads",
        &[
            "src/ring/loom_tests.rs: loom_split_publish_shows_buffers_and_elements \
             loom_packed_publish_shows_buffers_and_elements \
             loom_split_pop_sees_what_the_driver_wrote loom_packed_pop_sees_what_the_driver_wrote \
             loom_split_call_is_never_lost loom_packed_call_is_never_lost \
             loom_split_call_for_a_batch_is_never_lost loom_packed_call_for_a_run_is_never_lost \
             loom_split_kick_is_never_lost loom_packed_kick_is_never_lost",
            "src/engine/mailbox.rs: loom_a_message_never_waits_for_a_sleeping_worker",
            "src/sys/spsc.rs: loom_spsc_hands_every_item_over_once_and_in_order",
            "scripts/mutants",
        ],
    ),
    (
        "Memory on another node is warned of and counted; `placement = \"auto\"` avoids it",
        &[
            "tests/rings/nodes.rs: spread_uses_all_workers_and_counts_those_that_are_far \
             auto_takes_the_workers_of_the_memorys_node \
             auto_makes_do_with_the_cores_that_a_device_may_use \
             far_memory_is_warned_of_once_in_each_session",
            "src/engine/topology.rs: auto_has_a_group_for_each_node_and_spread_one_for_all",
        ],
    ),
];

pub const COMPARED: &[Promise] = &[
    (
        "Random sessions do what a model says, on both formats",
        &[
            "tests/rings/models.rs: a_split_ring_does_what_the_model_says \
             a_packed_ring_does_what_the_model_says",
            "scripts/soak rings",
        ],
    ),
    (
        "Split and packed rings give out the same chains",
        &["tests/rings/models.rs: split_and_packed_give_out_the_same_chains"],
    ),
    (
        "The split ring does what `virtio_queue::Queue` does",
        &["tests/rings/oracle.rs: the_split_ring_does_what_virtio_queue_does"],
    ),
    (
        "The windows of both event indexes, by brute force",
        &["src/ring/event.rs: split_window_agrees_with_stepping \
             packed_window_agrees_with_stepping"],
    ),
    (
        "A reference device on vhost-user-backend answers as ours does",
        &[
            "tests/blk/reference.rs: a_disk_in_memory_does_what_one_on_vhost_user_backend_does \
             a_file_does_what_one_on_vhost_user_backend_does",
            "tests/rings/disk.rs: the_disk_on_a_split_ring_does_what_the_reference_does \
             the_disk_on_a_packed_ring_does_what_the_reference_does",
        ],
    ),
    (
        "Drivers that others wrote work: Linux, DPDK, libblkio",
        &[
            "tests/guest.rs: a_network_card_works_on_split_rings \
             a_network_card_with_two_queue_pairs_works_on_packed_rings",
            "tests/testpmd.rs: brings_back_every_byte_in_order",
            "tests/driver.rs: random_io_is_byte_exact_when_polling \
             random_io_is_byte_exact_with_calls",
        ],
    ),
    (
        "Rings, sessions and configurations are fuzzed, from seeds for every fault of a ring",
        &[
            "tests/fuzz.rs: every_fault_has_a_seed_in_a_format_that_can_have_it \
             the_corpus_of_split_rings_holds the_corpus_of_packed_rings_holds \
             the_corpus_of_sessions_holds the_corpus_of_configurations_holds \
             split_rings_hold_by_chance packed_rings_hold_by_chance configurations_hold_by_chance",
            "scripts/fuzz split_ring",
            "scripts/fuzz packed_ring",
            "scripts/fuzz protocol",
            "scripts/fuzz config",
        ],
    ),
];

pub const BROKEN: &[Promise] = &[
    (
        "Every fault of a ring is met by a test, and garbage stays in its ring",
        &[
            "tests/tidy.rs: every_ring_fault_is_met_by_a_test",
            "tests/rings/hostile.rs: garbage_in_a_split_ring_stays_in_its_ring \
             garbage_in_a_packed_ring_stays_in_its_ring",
        ],
    ),
    (
        "A buffer id beyond a packed ring",
        &["tests/rings/defects.rs: a_packed_buffer_id_beyond_the_ring_is_given_back_as_it_came"],
    ),
    (
        "A chain that never ends",
        &["tests/rings/defects.rs: a_chain_without_an_end_is_a_fault_soon"],
    ),
    (
        "A chain as long as the ring",
        &["tests/rings/defects.rs: a_chain_as_long_as_the_ring_is_legal"],
    ),
    (
        "A table in a table",
        &[
            "tests/rings/defects.rs: a_table_named_from_within_itself_is_a_fault",
            "src/ring/tests.rs: nested_indirect_is_a_fault",
        ],
    ),
    (
        "Headers cut into any number of descriptors",
        &[
            "src/device/net/tests/tx.rs: header_and_payload_survive_any_cut",
            "src/device/net/tests/rx.rs: frames_arrive_byte_exact_over_any_cuts_of_both_sides",
            "src/device/blk/tests.rs: any_framing_gives_the_same_bytes",
        ],
    ),
    (
        "Buffers without a byte, and huge ones",
        &[
            "tests/rings/defects.rs: a_chain_of_nothing_but_empty_buffers_is_legal \
             a_huge_length_is_a_fault",
            "src/ring/tests.rs: zero_length_buffers_are_legal a_chain_of_too_many_bytes_is_a_fault",
        ],
    ),
    (
        "Addresses and lengths whose sums wrap",
        &["tests/rings/defects.rs: sums_that_wrap_are_faults \
             sums_that_wrap_in_a_table_are_faults \
             a_table_at_the_end_of_the_address_space_is_a_fault"],
    ),
    (
        "A descriptor rewritten after it was checked",
        &["tests/rings/defects.rs: a_descriptor_rewritten_meanwhile_never_leaves_memory"],
    ),
    (
        "An available index that jumps by more than the ring",
        &[
            "tests/rings/defects.rs: an_avail_index_that_jumps_in_either_direction_is_a_fault \
             an_avail_index_that_moves_back_over_known_chains_gives_each_out_once",
        ],
    ),
    (
        "A memory table replaced while rings run",
        &[
            "tests/rings/engine.rs: the_memory_table_is_exchanged_under_load",
            "tests/rings/swaps.rs: on_a_wire on_echo \
             a_table_stays_until_the_last_frame_in_it_was_copied \
             a_receiver_goes_over_with_the_buffers_it_has \
             a_tap_goes_over_with_the_buffers_it_has",
            "tests/rings/defects.rs: what_is_staged_before_a_swap_is_shown_after_it",
            "tests/protocol/memory.rs: a_running_vring_goes_over_to_new_memory_without_a_stop",
        ],
    ),
    (
        "Writable buffers before readable ones",
        &[
            "tests/rings/defects.rs: writable_before_readable_in_a_table_is_a_fault",
            "src/ring/tests.rs: a_readable_after_a_writable_is_a_fault",
        ],
    ),
    (
        "A used ring in memory that can't be written, or beyond its end",
        &[
            "tests/protocol/memory.rs: \
             memory_that_can_not_be_written_is_refused_and_the_table_stays",
            "tests/rings/defects.rs: a_used_element_never_reaches_beyond_its_ring",
        ],
    ),
    (
        "Kicks too many, kicks for nothing, no kick fd, no call fd, a call fd that is full",
        &[
            "tests/rings/engine.rs: kicks_too_many_and_kicks_for_nothing_change_nothing \
             a_vring_without_a_kick_fd_is_polled \
             a_vring_without_a_call_fd_works_and_gets_one_later \
             a_call_fd_that_is_full_stops_nobody",
        ],
    ),
    (
        "A call or err fd that was made blocking again, and is full: the worker goes on, the \
         session ends, the next one waits",
        &[
            "tests/rings/engine.rs: a_call_fd_that_blocks_and_is_full_stops_nobody \
             an_err_fd_that_blocks_and_is_full_stops_nobody",
            "tests/protocol/life.rs: \
             a_front_end_that_held_a_worker_up_is_not_served_again_at_once",
            "src/sys/interrupt.rs: a_write_that_sleeps_ends_and_a_thread_that_does_not_goes_on",
        ],
    ),
    (
        "Guest memory that may have to be read from a disk is refused, unless it is wanted",
        &["tests/protocol/memory.rs: \
             memory_in_a_file_on_disk_is_refused_unless_the_operator_wants_it"],
    ),
    (
        "A log that nobody reads holds up no guest when a ring breaks",
        &[
            "tests/log.rs: a_log_that_nobody_reads_holds_up_no_guest_on_split_rings \
             a_log_that_nobody_reads_holds_up_no_guest_on_packed_rings",
        ],
    ),
    (
        "A ring that breaks takes nothing from its neighbours: payload, rate, turns",
        &[
            "tests/rings/neighbour.rs: one_broken_split_ring_disturbs_nobody \
             one_broken_packed_ring_disturbs_nobody \
             a_neighbour_keeps_its_rate_while_rings_break",
            "tests/rings/walks.rs: the_longest_chains_there_can_be_starve_nobody",
        ],
    ),
];

pub const COSTS: &[Promise] = &[
    (
        "No allocation per burst",
        &[
            "tests/alloc.rs: the_hot_path_allocates_nothing_after_its_first_burst",
            "tests/alloc/daemon.rs: a_worker_allocates_nothing_for_a_frame_or_a_request",
            "tests/alloc/disk.rs: a_request_of_a_disk_allocates_nothing_after_the_first_burst",
        ],
    ),
    (
        "No lock and no atomic read-modify-write per burst",
        &["tests/tidy.rs: the_data_path_has_no_lock_and_no_read_modify_write"],
    ),
    (
        "Few cache lines are shared per frame",
        &[
            "src/ring/tests/lines.rs: a_burst_touches_few_lines_of_a_packed_ring",
            "src/ring/tests/lines.rs: a_burst_touches_few_lines_of_a_split_ring",
        ],
    ),
    (
        "`vringd bench net` loads any back-end: floods, ping-pong, progress, JSON, CPU per frame, \
         and it ends when a back-end stops",
        &[
            "tests/bench_net.rs: every_frame_comes_back_in_both_formats_and_modes \
             indirect_descriptors_and_rings_of_any_size_lose_nothing \
             frames_that_are_only_sent_count_when_they_are_taken \
             frames_go_there_and_back_between_two_ports without_json_there_is_a_table \
             who_looks_on_sees_the_rate_once_a_second_and_then_the_table \
             a_back_end_that_is_killed_ends_the_measurement \
             a_back_end_that_stops_answering_ends_the_measurement",
            "src/bench/net/pair/tests.rs: frames_are_cut_as_was_asked_on_rings_of_any_size",
            "tests/testpmd.rs: vhost_sends_every_frame_back",
        ],
    ),
    (
        "The ten ring paths at 64, 256 and 1518 bytes, few frames in flight, and a mix of sizes, \
         beside DPDK",
        &["scripts/bench rings", "benches/rings.rs"],
    ),
    (
        "1 to 64 devices on a worker, rings of 256 to 32768",
        &["scripts/bench scale", "benches/scale.rs"],
    ),
    (
        "What a chain costs, beside `virtio-queue` and vhost-user-backend",
        &["benches/chains.rs"],
    ),
];
