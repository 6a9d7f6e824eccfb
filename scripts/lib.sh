# Shared by the scripts: what is installed, and how a guest is run. Sourced, never run.
# shellcheck shell=bash

# say TEXT...: a line for the reader.
say() { printf '%s\n' "== $*"; }

# die TEXT...: an error that ends the script.
die() { printf '%s\n' "error: $*" >&2; exit 1; }

need_root() { [ "$(id -u)" -eq 0 ] || die "run this as root: it makes taps, network namespaces and installs packages"; }

apt_updated=
apt_quiet() {
    local log
    log=$(mktemp)
    if ! DEBIAN_FRONTEND=noninteractive apt-get -qq -o Dpkg::Use-Pty=0 "$@" >"$log" 2>&1; then
        tail -n 20 "$log" >&2
        rm -f "$log"
        die "apt-get $* failed"
    fi
    rm -f "$log"
}

apt_update() {
    [ -z "$apt_updated" ] || return 0
    apt_quiet update
    apt_updated=yes
}

is_installed() { dpkg-query -W -f '${Status}' "$1" 2>/dev/null | grep -q '^install ok installed'; }

# need_packages NAME...: installs those that are missing.
need_packages() {
    local missing=() name
    for name in "$@"; do is_installed "$name" || missing+=("$name"); done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    apt_update
    apt_quiet install -y --no-install-recommends "${missing[@]}"
}

# The mirror that this machine uses for Debian, from either form of apt source.
debian_mirror() {
    cat /etc/apt/sources.list /etc/apt/sources.list.d/*.sources /etc/apt/sources.list.d/*.list \
        2>/dev/null | grep -v '^ *#' | grep -oE 'https?://[^ ]+/debian/?( |$)' | head -n 1 | tr -d ' '
}

# Open vSwitch with DPDK, for tests that run one of their own: the machine's is not started.
need_ovs() {
    is_installed openvswitch-switch-dpdk && return 0
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e "$policy" ]; then
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod +x "$policy"
        made=yes
    fi
    # In a subshell, so that a failure does not leave the policy behind.
    local status=0
    (need_packages openvswitch-switch-dpdk) || status=$?
    [ -z "$made" ] || rm -f "$policy"
    return $status
}

# QEMU of one suite can't be installed beside qemu-utils of another: take the suite of qemu-utils.
need_qemu() {
    command -v qemu-system-x86_64 >/dev/null && return 0
    local utils suite=bookworm-backports
    utils=$(dpkg-query -W -f '${Version}' qemu-utils 2>/dev/null || true)
    case "$utils" in
        *bpo12*)
            say "installing qemu-system-x86 from $suite, to go with qemu-utils $utils"
            local list=/etc/apt/sources.list.d/$suite.list
            if ! grep -rqs "$suite" /etc/apt/sources.list /etc/apt/sources.list.d; then
                echo "deb $(debian_mirror) $suite main" >"$list"
                apt_updated=
            fi
            apt_update
            apt_quiet install -y --no-install-recommends -t "$suite" qemu-system-x86
            ;;
        *) need_packages qemu-system-x86 ;;
    esac
}

# QEMU's own disk back-end. Comes before need_qemu, which goes with its suite.
need_storage_daemon() {
    command -v qemu-storage-daemon >/dev/null || need_packages qemu-utils
}

# cargo of at least the version in Cargo.toml: what is on PATH, else Debian's newest.
cargo_is_new_enough() {
    command -v cargo >/dev/null || return 1
    local minor
    minor=$(cargo --version | sed -n 's/^cargo 1\.\([0-9]*\).*/\1/p')
    [ "${minor:-0}" -ge 88 ]
}

need_rust() {
    need_packages gcc libc6-dev
    cargo_is_new_enough && return 0
    need_packages rustc-web cargo-web
    cargo_is_new_enough || die "no cargo of version 1.88 or newer can be found"
}

# Hugepages make DPDK's memory real; without them the tests that need them say so.
need_hugepages() {
    local wanted=$1 have
    have=$(cat /proc/sys/vm/nr_hugepages)
    [ "$have" -ge "$wanted" ] || echo "$wanted" >/proc/sys/vm/nr_hugepages || true
    [ "$(cat /proc/sys/vm/nr_hugepages)" -ge "$wanted" ] || say "only $(cat /proc/sys/vm/nr_hugepages) of $wanted hugepages could be reserved"
}

# guest_accel DIR: how to run the guest of DIR. KVM only if a guest really boots under it within
# 15 seconds (a /dev/kvm on which guests hang is common in nested clouds); the answer is kept.
guest_accel() {
    local dir=$1 answer=tcg,thread=multi
    if [ ! -s "$dir/accel" ]; then
        if [ -w /dev/kvm ] && timeout 15 qemu-system-x86_64 -accel kvm -cpu host -m 256 \
            -display none -no-reboot -nodefaults -serial file:/dev/null \
            -serial stdio -kernel "$dir/vmlinuz" -initrd "$dir/initrd.gz" \
            -append "console=ttyS0 quiet panic=1" </dev/null 2>/dev/null | grep -qm1 VRINGD-READY; then
            answer=kvm
        fi
        echo "$answer" >"$dir/accel"
    fi
    cat "$dir/accel"
}

# guest_vectors ACCEL COUNT: MSI-X vectors for a vhost-user network card. QEMU 7.2 without KVM
# crashes when such a card's vectors are unmasked (whatever the back-end): it gets none there.
guest_vectors() {
    local major
    major=$(qemu-system-x86_64 --version | sed -n 's/^QEMU emulator version \([0-9]*\).*/\1/p')
    if [ "$1" != kvm ] && [ "${major:-0}" -lt 8 ]; then echo 0; else echo "$2"; fi
}
