from __future__ import annotations

from meshwire.cli.facts import Chain
from meshwire.cli.probes import has_mount, parse_ruleset, udp_inodes
from meshwire.cli.version import agent_versions

MOUNTINFO = """\
22 1 0:21 / /sys rw,nosuid shared:7 - sysfs sysfs rw
31 22 0:27 / /sys/fs/bpf rw,nosuid - bpf bpf rw,mode=700
32 22 0:28 / /sys/fs/cgroup rw shared:9 master:2 - cgroup2 cgroup2 rw
"""

UDP_COLUMNS = "07 00000000:00000000 00:00000000 00000000     0        0"
UDP6 = f"""\
  sl  local_address  remote_address  st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   7: {"0" * 32}:CA9F {"0" * 32}:0000 {UDP_COLUMNS} 4711 2 0 0
   8: {"0" * 32}:CAA0 {"0" * 32}:0000 {UDP_COLUMNS} 0 2 0 0
"""

RULESET = """\
table inet filter {
\tset nodes {
\t\ttype ipv4_addr
\t\telements = { 192.0.2.1 }
\t}

\tchain input {
\t\ttype filter hook input priority filter; policy drop;
\t\tudp dport { 51871, 51872 } accept
\t}

\tchain forward {
\t\ttype filter hook forward priority filter; policy accept;
\t}
}
table ip6 firewalld {
\tchain other {
\t\tmeta nfproto ipv6 fib saddr . mark . iif oif missing drop
\t}
}
"""


def test_a_mount_is_found_by_place_and_kind() -> None:
    assert has_mount(MOUNTINFO, "/sys/fs/bpf", "bpf")
    assert has_mount(MOUNTINFO, "/sys/fs/cgroup", "cgroup2")
    assert not has_mount(MOUNTINFO, "/sys/fs/bpf", "tmpfs")
    assert not has_mount(MOUNTINFO, "/sys/fs", "sysfs")


def test_sockets_are_found_by_port() -> None:
    assert udp_inodes(UDP6, 51871) == {4711}
    assert udp_inodes(UDP6, 51872) == {0}
    assert udp_inodes(UDP6, 51873) == set()
    assert udp_inodes("", 51871) == set()


def test_rules_and_base_chains_are_read() -> None:
    firewall = parse_ruleset(RULESET)
    assert firewall.readable
    assert firewall.chains == (
        Chain(where="inet filter input", hook="input", policy="drop"),
        Chain(where="inet filter forward", hook="forward", policy="accept"),
    )
    assert "udp dport { 51871, 51872 } accept" in firewall.texts
    assert "meta nfproto ipv6 fib saddr . mark . iif oif missing drop" in firewall.texts


def test_agents_are_counted_by_version() -> None:
    versions = [{"status": {"agentVersion": version}} for version in ("0.2.0", "0.1.0", "0.2.0")]
    assert agent_versions([*versions, {"metadata": {"name": "new"}}]) == {"0.1.0": 1, "0.2.0": 2}
