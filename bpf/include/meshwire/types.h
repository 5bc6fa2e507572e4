/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The contract between the TC programs and user space. meshwire.bpf.layouts mirrors every struct and enum
 * here; tests/bpf compares the two by BTF. Multi-byte fields are in host byte order unless their type
 * says __be. */
#pragma once

#define MW_MAX_PREFIXES 131072
#define MW_MAX_NODES 16384
#define MW_SECOND 1000000000ULL /* of bpf_ktime_get_ns */
/* Room in `metrics`: a version with more reasons shares the map of one with fewer. */
#define MW_MAX_REASONS 256

enum mw_family {
	MW_IPV4 = 4,
	MW_IPV6 = 6,
};

/* Key of `ipcache` and `cidrs`. The family is part of the prefix, so the two families share one trie and
 * never match each other: prefixlen counts the 32 bits of the family word too (10.1.0.0/16 is 48). */
struct mw_prefix {
	__u32 prefixlen;
	__u8 family; /* enum mw_family */
	__u8 pad[3];
	__u8 addr[16]; /* network order; IPv4 in the first four bytes, the rest zero */
};

enum mw_address_flags {
	MW_ADDRESS_POD = 1 << 0, /* pods live here */
	MW_ADDRESS_HOST = 1 << 1, /* an address of a node itself */
	MW_ADDRESS_CLUSTER = 1 << 2, /* inside a cluster CIDR, of no node known here: node is 0 */
};

struct mw_address {
	__u32 identity; /* 0 until policy gives addresses identities */
	__u16 node; /* index into `nodes`; 0: unknown */
	__u16 flags; /* enum mw_address_flags */
};

/* As wg_ifindex: this node or that one is quarantined. No device has such a number. */
#define MW_QUARANTINED 0xffffffff

/* Value of `nodes`. ifindex 0: no tunnel to that node is proven (or it is this node). */
struct mw_node {
	__u32 wg_ifindex;
};

enum mw_settings_flags {
	MW_STRICT = 1 << 0, /* drop plaintext between pods of different nodes, both directions */
	MW_ENFORCING = 1 << 1, /* encryption is in force: plaintext between pods counts as leaked, dropped or not */
	MW_PASS_OVERSIZED = 1 << 2, /* cutting over: an oversized DF packet is answered and still goes through */
};

/* The one value of `settings`. */
struct mw_settings {
	__u32 flags; /* enum mw_settings_flags */
	__u16 local_node;
	__u16 tunnel_mtu; /* largest IP packet a tunnel carries; 0: no limit is enforced */
};

enum mw_direction {
	MW_EGRESS = 0,
	MW_INGRESS = 1,
	MW_DIRECTIONS,
};

/* Numbered once, never renumbered; also the index into `metrics` (reason * MW_DIRECTIONS + direction).
 * From 128 on the packet was dropped. */
enum mw_reason {
	MW_NOT_OURS = 0, /* not IP, or not between addresses Meshwire knows: left alone */
	MW_ENCRYPTED = 1, /* redirected into a tunnel */
	MW_DECRYPTED = 2, /* arrived through a tunnel */
	MW_CLEAR_ALLOWED = 3, /* pod traffic in clear while encryption is not in force (off, enabling, disabling) */
	MW_CLEAR_LEAKED = 4, /* pod traffic in clear although encryption is in force (Permissive) */
	MW_CLEAR_HOST = 5, /* between a pod and another node's own address, in clear: no tunnel yet */
	MW_TOO_BIG_ANSWERED = 6, /* an ICMP error was sent for an oversized packet */
	MW_MSS_CLAMPED = 7,
	MW_DROP_NO_TUNNEL = 128, /* strict: destination's node has no proven tunnel */
	MW_DROP_UNKNOWN_NODE = 129, /* strict: destination in a cluster CIDR, of no known node */
	MW_DROP_CLEAR_ARRIVED = 130, /* strict: came in clear and should have come through a tunnel */
	MW_DROP_BAD_SOURCE = 131, /* ingress: came through a tunnel with a source that is no other node's;
				   * egress, strict: from a pod address of another node to a third one's */
	MW_DROP_TOO_BIG = 132, /* does not fit the tunnel, DF set: answered with an ICMP error */
	MW_DROP_MALFORMED = 133, /* truncated or impossible IP header on a path where it cannot be judged */
	MW_DROP_ENCAPSULATED = 134, /* strict: pod traffic inside VXLAN, Geneve or IPIP on its way out in clear */
	MW_DROP_BAD_DESTINATION = 135, /* came through a tunnel for an address that is not this node's */
	MW_DROP_NO_SUCH_POD = 136, /* strict: for a pod address of this node that no pod has, on its way back to
				    * the wire */
	MW_CLEAR_ARRIVED = 8, /* Permissive: came in clear although encryption is in force */
	/* By the policy programs, in `policy_metrics`; these count no others but NOT_OURS and MALFORMED. */
	MW_POLICY_ALLOWED = 9, /* by a rule */
	MW_POLICY_REPLY = 10, /* of a flow that was let through, or an ICMP error about one */
	MW_POLICY_NONE = 11, /* no rule says anything, and nothing is denied by default */
	MW_POLICY_WOULD_DENY = 12, /* let through, and dropped if policies in mode Audit were enforced */
	MW_POLICY_DEFERRED = 13, /* to a service address: judged again where the real destination is known */
	MW_DROP_POLICY_INGRESS = 137,
	MW_DROP_POLICY_EGRESS = 138,
	MW_DROP_SPOOFED_SOURCE = 139, /* by a pod, from an address that is not its own */
	MW_DROP_WRONG_POD = 140, /* to a pod, for an address that is not its own */
	MW_DROP_FRAGMENT_UNKNOWN = 141, /* a later fragment whose first one was not seen, or not let through */
	MW_DROP_UNKNOWN_POD = 142, /* to or from an address of this node's pods that none is known to have (yet) */
	MW_DROP_PORTS_IN_USE = 143, /* a service leads a new connection to where the pod has one with these very ports */
	MW_DROP_QUARANTINED = 144, /* between a pod and a node that is quarantined, or its pods, whatever the mode */
	MW_REASONS = 145,
};

/* Value of `metrics` and `policy_metrics`, one per CPU. */
struct mw_counter {
	__u64 packets;
	__u64 bytes;
};
