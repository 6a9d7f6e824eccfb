//! What is promised of network ports.

use super::Promise;

pub const ALL: &[Promise] = &[
    (
        "`tap:NAME`, created or existing, one queue per queue pair; `netns`; `tap:fd=N`",
        &[
            "src/sys/tap/tests.rs: a_created_tap_is_up_has_its_mtu_and_goes_with_its_last_queue \
             an_existing_tap_is_attached_with_its_own_flags_and_left",
            "src/sys/tap/tests/place.rs: a_tap_is_made_in_the_namespace_that_was_named \
             queues_that_were_passed_are_taken_over_once",
            "tests/taps.rs: a_daemon_outside_makes_and_removes_a_tap_in_a_namespace \
             answers_come_to_the_senders_pair_split answers_come_to_the_senders_pair_packed \
             frames_cross_a_tap_of_one_descriptor_split \
             frames_cross_a_tap_of_one_descriptor_packed \
             frames_cross_a_tap_of_two_descriptors_split \
             frames_cross_a_tap_of_two_descriptors_packed",
            "tests/guest.rs: a_network_card_works_on_split_rings \
             a_network_card_with_two_queue_pairs_works_on_packed_rings",
        ],
    ),
    (
        "`persist`: a tap that outlives the daemon",
        &[
            "src/sys/tap/tests.rs: an_existing_tap_stays_as_persistent_as_it_was \
             a_tap_that_is_made_to_stay_stays_and_is_used_again",
        ],
    ),
    (
        "Queue pairs are switched on and off under load (`ethtool -L`)",
        &[
            "tests/guest.rs: queue_pairs_are_changed_under_load",
            "tests/rings/disabled.rs: it_is_given_back_and_counted_on_one_worker \
             it_is_given_back_and_counted_on_two_workers \
             a_worker_that_sleeps_gives_it_back_split \
             a_worker_that_sleeps_gives_it_back_packed",
            "tests/taps.rs: flows_come_to_the_pairs_that_are_enabled_split \
             flows_come_to_the_pairs_that_are_enabled_packed \
             what_waits_for_a_pair_that_is_left_is_counted",
        ],
    ),
    (
        "No loss that no counter tells: what the kernel drops at a tap, too",
        &[
            "tests/taps.rs: what_the_kernel_drops_for_want_of_buffers_is_counted",
            "src/sys/tap/tests/place.rs: what_the_kernel_drops_is_counted_from_the_start",
        ],
    ),
    (
        "`macvtap:NAME`",
        &[
            "tests/taps.rs: a_macvtap_is_opened_by_name_or_by_the_shell \
             frames_cross_a_macvtap_split frames_cross_a_macvtap_packed",
            "src/host/tap/tests.rs: a_macvtap_takes_and_gives_frames_like_a_tap",
        ],
    ),
    (
        "`xdp:IFACE`, native or generic, several queues, frames of 9000 bytes; nothing is left at \
         the interface",
        &[
            "tests/xdp.rs: frames_go_both_ways_and_nothing_outlives_the_daemon_with_split_rings \
             frames_go_both_ways_and_nothing_outlives_the_daemon_with_packed_rings \
             frames_of_9000_bytes_go_both_ways each_queue_pair_has_a_queue_of_the_interface",
            "src/host/xdp/tests.rs: frames_go_both_ways_in_generic_mode",
            "tests/guest.rs: a_guest_reaches_an_interface_through_af_xdp",
        ],
    ),
    (
        "`busy_poll`",
        &["src/host/xdp/tests.rs: frames_go_both_ways_through_a_socket_that_is_polled_busily"],
    ),
    (
        "`tx_csum`: checksums that a guest leaves undone are made, or left to the interface",
        &[
            "src/host/xdp/tests/csum.rs: \
             checksums_are_made_here_where_the_driver_does_not_announce_them \
             a_checksum_that_is_left_to_the_kernel_is_made_where_the_frame_leaves_it \
             segments_are_cut_here_and_their_checksums_left_to_the_kernel",
            "src/sys/xdp/tests.rs: checksums_are_left_to_who_makes_them",
            "tests/xdp/csum.rs: checksums_are_made_by_the_daemon_or_left_to_the_interface \
             a_daemon_without_capabilities_leaves_checksums_to_the_interface",
        ],
    ),
    (
        "`xdp:IFACE:fd=N:map=N`, `fdname=`, a daemon without capabilities",
        &[
            "tests/xdp/passed.rs: a_daemon_without_capabilities_moves_frames_both_ways \
             a_daemon_without_capabilities_moves_frames_on_two_queues \
             a_daemon_finds_descriptors_by_the_names_that_its_service_manager_tells",
        ],
    ),
    (
        "`wire:PORT`: two guests on a cable, on one worker or two",
        &[
            "tests/lan.rs: two_guests_talk_over_a_wire \
             two_guests_talk_over_a_wire_between_two_workers",
            "tests/rings/wire.rs: frames_cross a_full_receiver an_absent_receiver uneven_pairs \
             a_stop_under_way",
            "tests/rings/sizes.rs: a_wire_takes_what_a_frame_can_be_on_every_ring_and_worker",
            "scripts/bench net",
        ],
    ),
    (
        "`switch:NAME`: learns, floods, ages, isolates, filters",
        &[
            "src/host/switch/tests.rs: it_floods_learns_and_forgets \
             isolated_ports_reach_only_the_others floods_have_a_limit_and_known_stations_none \
             who_claims_another_address_is_not_heard",
            "src/host/switch/tests/undone.rs: \
             no_checksum_is_written_into_what_was_looked_at_or_behind_the_frame",
            "src/host/switch/filter/tests.rs: \
             no_checksum_makes_an_allowed_packet_one_that_is_not",
            "tests/rings/switch.rs: everybody_reaches_everybody \
             one_port_without_buffers_stalls_nobody vlans_with_queues",
            "tests/lan.rs: two_guests_talk_through_a_switch",
            "tests/ports.rs: every_port_has_what_was_chosen_for_it",
        ],
    ),
    (
        "`allow_ip`: a guest tells others of no address but its own",
        &["src/host/switch/filter/tests.rs: only_own_addresses_pass \
             arp_tells_own_addresses_and_nothing_else \
             neighbours_tell_own_addresses_and_nothing_else \
             neighbours_are_not_believed_behind_other_headers \
             who_has_no_address_may_ask_for_one_and_say_nothing_else"],
    ),
    (
        "No guest makes a switch or a worker forget the others",
        &[
            "src/host/switch/tests.rs: \
             what_is_for_a_station_stays_private_whoever_sends_from_many_addresses",
            "src/host/xdp/tests/csum.rs: tiny_segments_are_cut_in_turns",
            "tests/xdp/csum.rs: a_guest_that_wants_tiny_segments_has_them_in_turns",
        ],
    ),
    (
        "MTU from 68 to 65535",
        &[
            "tests/rings/sizes.rs: a_wire_takes_what_a_frame_can_be_on_every_ring_and_worker \
             a_switch_port_is_given_what_its_mtu_allows_on_every_ring",
            "tests/guest/mtu.rs: the_mtu_is_as_short_and_as_long_as_may_be",
            "tests/cli.rs: a_refused_setting_is_one_line_on_stderr_and_status_2",
        ],
    ),
    (
        "No frame leaves its VLAN",
        &[
            "src/host/switch/vlan.rs: every_tag_at_every_kind_of_port",
            "tests/vlan.rs: no_frame_leaves_its_vlan_on_packed_rings \
             no_frame_leaves_its_vlan_on_split_rings \
             no_frame_leaves_its_vlan_between_split_and_packed_rings",
        ],
    ),
    (
        "Uplinks: an interface of the host at a switch",
        &[
            "tests/uplink.rs: frames_find_their_port_split frames_find_their_port_packed \
             what_a_guest_leaves_undone_is_done_for_a_cable an_uplink_has_a_vlan_and_a_rate",
        ],
    ),
    (
        "Every frame that is lost is counted with the reason: those that wait when a port goes \
         away, and floods that a port may not send or is not given",
        &[
            "tests/rings/waiting.rs: a_receiver_goes a_sender_goes \
             frames_that_wait_on_both_workers_of_a_receiver_are_counted",
            "tests/rings/drops.rs: bad_frames_anywhere drops_behind_a_frame_that_waits",
            "tests/rings/losses.rs: frames_for_a_broken_ring_are_counted_on_a_wire \
             what_a_port_of_a_switch_is_not_given_is_counted_there",
            "tests/taps.rs: what_waits_when_a_guest_goes_is_counted_split \
             what_waits_when_a_guest_goes_is_counted_packed",
            "tests/xdp.rs: what_waits_when_a_guest_goes_is_counted_split \
             what_waits_when_a_guest_goes_is_counted_packed",
            "tests/uplink.rs: floods_that_an_uplink_is_not_given_are_counted_there_split \
             floods_that_an_uplink_is_not_given_are_counted_there_packed \
             floods_of_an_uplink_are_capped what_nobody_takes_is_counted_where_it_is_lost \
             what_the_kernel_drops_at_an_uplink_is_shown",
        ],
    ),
    (
        "Offloads that a receiver did not negotiate are done for it",
        &[
            "src/device/net/tests/offload.rs: every_offload_of_a_sender_meets_every_receiver \
             any_packet_is_cut_as_the_model_does_over_any_cuts_of_both_sides \
             whatever_a_sender_writes_is_delivered_or_dropped",
            "src/host/tap/tests.rs: the_kernel_cuts_frames_as_the_model_says",
            "tests/taps/offloads.rs: datagrams_are_cut_by_who_gets_them_split \
             datagrams_are_cut_by_who_gets_them_packed congestion_is_told_once_split \
             congestion_is_told_once_packed",
            "tests/uplink.rs: what_the_host_leaves_undone_is_done_for_who_wants_it_split \
             what_the_host_leaves_undone_is_done_for_who_wants_it_packed",
        ],
    ),
    (
        "Rates of what a guest sends and is given, changed while it runs",
        &[
            "tests/rings/limits.rs: as_much_passes_as_was_chosen_split \
             as_much_passes_as_was_chosen_packed ten_seconds_are_exact_split_and_packed",
            "tests/bench_net.rs: a_limit_is_changed_by_reading_the_settings_again",
            "tests/ovs/rates.rs: what_ovs_sends_and_is_given_is_policed",
        ],
    ),
    (
        "A guest switches its offloads while frames go both ways",
        &["tests/guest.rs: a_network_card_works_on_split_rings \
             a_network_card_with_two_queue_pairs_works_on_packed_rings"],
    ),
    (
        "Jumbo frames of a guest; the MTU of a switch's port",
        &[
            "tests/ovs.rs: a_guest_on_packed_rings_and_ovs_are_on_one_wire \
             a_guest_at_an_access_port_reaches_a_vlan_of_ovs",
        ],
    ),
    (
        "A driver that sleeps is called",
        &["tests/interrupt.rs: calls_wake_a_driver_that_sleeps_split \
             calls_wake_a_driver_that_sleeps_packed \
             calls_of_each_of_two_queues_wake_a_driver_that_sleeps_split \
             calls_of_each_of_two_queues_wake_a_driver_that_sleeps_packed"],
    ),
    (
        "`mode = \"client\"`",
        &[
            "tests/client.rs: it_comes_and_comes_again_within_a_tenth_of_a_second",
            "tests/testpmd.rs: as_a_client_the_daemon_connects_and_connects_again",
            "tests/ovs.rs: ports_that_connect_come_and_go ports_that_listen_come_and_go",
            "tests/guest.rs: a_front_end_that_listens_works_on_split_rings_and_outlives_daemons \
             a_front_end_that_listens_works_on_packed_rings_and_outlives_daemons",
        ],
    ),
    (
        "`link_follows`, `speed`, `duplex`",
        &[
            "tests/link.rs: a_session_ends_with_the_link_of_its_tap_and_begins_again \
             config_space_tells_of_the_link_and_every_change_is_announced \
             a_guest_of_qemu_sees_the_link_go_and_come",
        ],
    ),
    (
        "Interop 1: Open vSwitch with DPDK at both ends of a wire and of a switch, on one and two \
         queue pairs; a trunk; restarts of either side",
        &[
            "tests/ovs.rs: over_a_wire_split over_a_wire_split_two_pairs over_a_wire_packed \
             over_a_wire_packed_two_pairs through_a_switch_split through_a_switch_split_two_pairs \
             through_a_switch_packed through_a_switch_packed_two_pairs \
             a_trunk_carries_its_vlans_and_no_other traffic_outlives_restarts_of_either_side_split \
             traffic_outlives_restarts_of_either_side_packed \
             a_daemon_that_listens_gets_its_front_ends_back",
            "scripts/interop",
        ],
    ),
    (
        "Interop 2: the vhost-user cases of Open vSwitch's own tests, with the roles changed",
        &[
            "tests/ovs.rs: ports_that_connect_come_and_go ports_that_listen_come_and_go \
             a_port_goes_under_traffic_and_comes_back_split \
             a_port_goes_under_traffic_and_comes_back_packed the_mtu_goes_up_and_down_split \
             the_mtu_goes_up_and_down_packed guests_made_of_testpmd_and_taps_ping_each_other \
             guests_that_listen_with_two_pairs_ping_each_other",
            "tests/guest/mtu.rs: the_mtu_is_as_short_and_as_long_as_may_be",
        ],
    ),
    (
        "Interop 3: DPDK's test plans for vhost: restarts, several queues, front-end to front-end, \
         frames queued before the start, pages of 4 KiB, counters",
        &[
            "tests/plans.rs: restarts_of_port_front_end_and_daemon_lose_no_ring \
             every_byte_goes_from_one_front_end_to_the_other path_05_split_mergeable \
             path_06_split path_07_split_vector_rx path_08_split_in_order_mergeable \
             path_09_split_in_order",
            "tests/testpmd.rs: echoes_64_and_1518_bytes_and_loses_none \
             brings_back_every_byte_in_order every_one_of_eight_queues_moves_frames \
             packed_rings_of_odd_size_lose_no_frame packed_rings_of_odd_size_bring_back_every_byte \
             guest_memory_in_4_kib_pages_works_as_well",
            "tests/rings/wire.rs: who_comes_first_waits",
        ],
    ),
    (
        "Interop 4: a guest of QEMU on one port, Open vSwitch on the other",
        &[
            "tests/ovs.rs: a_guest_on_packed_rings_and_ovs_are_on_one_wire \
             a_guest_at_an_access_port_reaches_a_vlan_of_ovs",
        ],
    ),
    (
        "Interop 5: every VLAN at every port, by the frames that are seen",
        &[
            "tests/vlan.rs: no_frame_leaves_its_vlan_on_packed_rings \
             no_frame_leaves_its_vlan_on_split_rings",
            "tests/vlan/known.rs: no_frame_for_a_known_station_leaves_its_vlan_split \
             no_frame_for_a_known_station_leaves_its_vlan_packed",
        ],
    ),
    (
        "Counters under the names of DPDK's xstats",
        &[
            "tests/testpmd.rs: packed_queues_are_counted_as_the_driver_does \
             split_queues_are_counted_as_the_driver_does",
        ],
    ),
];
