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
             answers_come_to_the_senders_pair_split answers_come_to_the_senders_pair_packed",
            "tests/guest.rs: a_network_card_works_on_split_rings \
             a_network_card_with_two_queue_pairs_works_on_packed_rings",
        ],
    ),
    (
        "`macvtap:NAME`",
        &[
            "tests/taps.rs: a_macvtap_is_opened_by_name_or_by_the_shell",
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
        ],
    ),
    (
        "`xdp:IFACE:fd=N:map=N`, a daemon without capabilities",
        &[
            "tests/xdp/passed.rs: a_daemon_without_capabilities_moves_frames_both_ways \
             a_daemon_without_capabilities_moves_frames_on_two_queues",
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
            "tests/rings/switch.rs: everybody_reaches_everybody \
             one_port_without_buffers_stalls_nobody vlans_with_queues",
            "tests/lan.rs: two_guests_talk_through_a_switch",
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
             an_uplink_has_a_vlan_and_a_rate",
        ],
    ),
    (
        "Offloads that a receiver did not negotiate are done for it",
        &[
            "src/device/net/tests/offload.rs: every_offload_of_a_sender_meets_every_receiver \
             any_packet_is_cut_as_the_model_does_over_any_cuts_of_both_sides \
             whatever_a_sender_writes_is_delivered_or_dropped",
            "src/host/tap/tests.rs: the_kernel_cuts_frames_as_the_model_says",
        ],
    ),
    (
        "Rates of what a guest sends and is given, changed while it runs",
        &[
            "tests/rings/limits.rs: as_much_passes_as_was_chosen_split \
             as_much_passes_as_was_chosen_packed ten_seconds_are_exact_split_and_packed",
            "tests/bench_net.rs: a_limit_is_changed_by_reading_the_settings_again",
        ],
    ),
    (
        "`mode = \"client\"`",
        &[
            "tests/client.rs: it_comes_and_comes_again_within_a_tenth_of_a_second",
            "tests/testpmd.rs: as_a_client_the_daemon_connects_and_connects_again",
            "tests/ovs.rs: ports_that_connect_come_and_go ports_that_listen_come_and_go",
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
        "Open vSwitch with DPDK at both ends, restarts of either side",
        &[
            "tests/ovs.rs: traffic_outlives_restarts_of_either_side_split \
             traffic_outlives_restarts_of_either_side_packed the_mtu_goes_up_and_down_split \
             the_mtu_goes_up_and_down_packed",
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
