/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The contract between the policy programs and user space, as types.h is that of the encrypting ones.
 * meshwire.bpf.policylayouts mirrors it; tests/bpf compares the two by BTF. Multi-byte fields are in host
 * byte order unless their type or comment says otherwise. */
#pragma once

#include <meshwire/types.h>

#define MW_MAX_IDENTITIES 262144
#define MW_MAX_CIDRS 65536
#define MW_MAX_ENDPOINTS 8192
#define MW_MAX_SERVICES 65536
#define MW_MAX_POLICY 524288
#define MW_MAX_FLOWS 262144
#define MW_MAX_FRAGMENTS 8192
#define MW_MAX_VERDICTS 65536
#define MW_MAX_POD_LINKS 8192
#define MW_EVENT_BYTES (1 << 20)

/* Reserved identities, and the bits of the others: meshwire.policy.identity explains them. */
#define MW_ID_UNKNOWN 0
#define MW_ID_HOST 1
#define MW_ID_WORLD 2
#define MW_ID_REMOTE_NODE 6
#define MW_ID_APISERVER 7
#define MW_ID_APISERVER_NODE 8
#define MW_ID_APISERVER_HOST 9
#define MW_ID_CIDR (1 << 24)
#define MW_ID_CIDR_INSIDE (MW_ID_CIDR | 1 << 25)
#define MW_ID_ANY 0xffffffff

/* Key of `identities`, `endpoints` and `services`. */
struct mw_ip {
	__u8 addr[16]; /* network order; IPv4 in the first four bytes, the rest zero */
	__u8 family; /* enum mw_family */
	__u8 pad[3];
};

/* Value of `identities`: who has an address of the cluster. */
struct mw_identity {
	__u32 number;
};

/* Value of `cidrs` (LPM, key struct mw_prefix): blocks that policies name, and the cluster's own. */
struct mw_cidr {
	__u32 number; /* 1 to 2^24-1; 0: no policy names a block here */
	__u32 flags; /* enum mw_cidr_flags */
};

enum mw_cidr_flags {
	MW_CIDR_CLUSTER = 1 << 0, /* inside of the cluster: whoever is not in `identities` is unknown, not world */
	MW_CIDR_LOCAL = 1 << 1, /* of this node's pods: whoever is not in `endpoints` is not guarded yet */
};

enum mw_endpoint_flags {
	MW_INGRESS_ENFORCED = 1 << 0, /* default deny */
	MW_EGRESS_ENFORCED = 1 << 1,
	MW_INGRESS_AUDITED = 1 << 2, /* audit_set would deny by default */
	MW_EGRESS_AUDITED = 1 << 3,
	MW_INGRESS_CIDRS = 1 << 4, /* the sets have rules on CIDR blocks: worth a lookup */
	MW_EGRESS_CIDRS = 1 << 5,
};

/* Value of `endpoints`: a pod of this node, under each of its addresses. */
struct mw_endpoint {
	__u32 ifindex; /* the host's end of its veth */
	__u32 identity;
	__u32 set; /* its rules in `policy`; also present (deny rules) where nothing is denied by default */
	__u32 audit_set; /* what they would be with those in mode Audit; 0: the same */
	__u32 revision; /* of its rules: flows judged by another one are judged again */
	__u32 born; /* its revision when it was made: flows judged before are another pod's */
	__u32 flags; /* enum mw_endpoint_flags */
};

/* Value of `services`: an address whose packets somebody (kube-proxy) sends on to somewhere else. */
struct mw_service {
	__u32 flags; /* 0 */
};

/* Key of `policy` (LPM). The longest match decides; user space sees to it that it is the right one. */
struct mw_policy_key {
	__u32 prefixlen; /* MW_POLICY_BITS_*, plus 0 to 16 bits of the port where there is a protocol */
	__u32 set;
	__u32 identity;
	__u8 direction; /* enum mw_direction, seen from the pod */
	__u8 protocol; /* IPPROTO_*; one entry per protocol for ANY; every protocol by MW_POLICY_BITS_ALL */
	__be16 port; /* destination's, network order; of ICMP: the type in its first byte, the code in the second */
};

#define MW_POLICY_BITS_ALL 72 /* set, identity, direction */
#define MW_POLICY_BITS_PROTOCOL 80

struct mw_policy_value {
	__u32 rule; /* agent's number of the rule that decided */
	__u8 deny;
	__u8 pad[3];
};

/* Key of `flows`: a packet of the direction in which it began, and which end has been asked. */
struct mw_flow_key {
	__u8 src[16], dst[16]; /* network order, as in mw_ip */
	__be16 sport, dport; /* ICMP: the identifier of an echo, else 0; type and code as in mw_policy_key */
	__u8 family;
	__u8 protocol;
	__u8 direction; /* enum mw_direction: MW_EGRESS for the policy of src, MW_INGRESS for dst's */
	__u8 pad;
};

struct mw_flow {
	__u64 expires; /* bpf_ktime_get_ns */
	__u32 revision; /* of the endpoint, when it was judged */
	__u32 peer; /* identity of the other end then */
	__u8 flags; /* enum mw_flow_flags */
	__u8 reason; /* enum mw_reason: the judgement. A flow that a new revision denies stays, as dropped */
	__u8 pad[6];
};

enum mw_flow_flags {
	MW_FLOW_REPLIED = 1 << 0,
	MW_FLOW_FIN = 1 << 1, /* of the side that began */
	MW_FLOW_FIN_REPLY = 1 << 2,
	MW_FLOW_CLOSING = 1 << 3, /* both have sent a FIN, or one a RST */
	/* Between two pods of this node, by which way; neither: not known yet. */
	MW_FLOW_DIRECT = 1 << 4, /* from pod to pod: nothing translates its addresses */
	MW_FLOW_STACK = 1 << 5, /* through the host's stack, which may translate them */
};
#define MW_FLOW_WAY (MW_FLOW_DIRECT | MW_FLOW_STACK)

/* The one value of `policy_state`. What was remembered in `verdicts` under another pair of numbers is void. */
struct mw_policy_state {
	__u32 generation; /* raised by user space after it has changed any of the other maps */
	__u32 upsets; /* raised by programs: a flow takes another way than it did */
	__u32 flags; /* enum mw_policy_state_flags */
};

enum mw_policy_state_flags {
	MW_SKIP_STACK = 1 << 0, /* flows between two pods of this node go directly, where they can */
};

/* Which program has seen a packet. */
enum mw_hook {
	MW_FROM_POD = 0,
	MW_TO_POD = 1,
	MW_POLICY_OUT = 2,
};

/* Key of `verdicts` (LRU): a packet in the middle of a TCP or UDP flow, where it is seen. */
struct mw_verdict_key {
	__u8 src[16], dst[16]; /* network order, as in mw_ip */
	__be16 sport, dport;
	__u32 ifindex;
	__u8 family;
	__u8 protocol;
	__u8 hook; /* enum mw_hook */
	__u8 pad;
};

/* What was found for such a packet, so that those of the next second need one lookup instead of a dozen. */
struct mw_verdict {
	__u64 until; /* bpf_ktime_get_coarse_ns */
	__u32 generation, upsets; /* of policy_state, before it was found */
	__u32 target; /* the pod's device it goes to directly; 0: on to the stack */
	__u8 macs[12]; /* destination and source for the target; all zero: those it has */
	__u8 reason; /* enum mw_reason, of the pod's policy */
	__u8 target_reason; /* of the target's, for what it gets */
	__u16 target_mtu; /* of IP packets */
	__be16 sport, dport; /* as in the key: the place of one that is evicted may be another's while it is read */
	__u8 flows; /* enum mw_verdict_flows */
	__u8 pad[7];
};

/* Which of the flows a packet belongs to hear of its end. */
enum mw_verdict_flows {
	MW_SENDERS_FLOW = 1 << 0, /* by the policy of the pod that sends it */
	MW_SENDERS_REPLY = 1 << 1, /* the other end began that one */
	MW_RECEIVERS_FLOW = 1 << 2,
	MW_RECEIVERS_REPLY = 1 << 3,
};

/* Value of `pod_links` (LRU, key: the ifindex of the host's end): the addresses of a pod's link, as the pod's
 * own frames tell. */
struct mw_pod_link {
	__u8 pod[6];
	__u8 gateway[6]; /* what it sends to; all zero where the host's end is a bridge's port */
};

/* Key and value of `fragments` (LRU): the ports of a datagram whose first fragment was let through. */
struct mw_fragment_key {
	__u8 src[16], dst[16];
	__u32 identification;
	__u8 family;
	__u8 protocol;
	__u8 pad[2];
};

struct mw_fragment {
	__be16 sport, dport;
};

/* A record of `events`. */
struct mw_event {
	__u64 time; /* bpf_ktime_get_ns */
	__u8 src[16], dst[16];
	__u32 src_identity, dst_identity;
	__u32 rule; /* 0: no rule, i.e. the default */
	__u32 ifindex;
	__u32 length; /* of the IP packet */
	__be16 sport, dport;
	__u8 family, protocol;
	__u8 direction; /* enum mw_direction: whose policy it was */
	__u8 reason; /* enum mw_reason */
};

/* Per CPU: events are limited to MW_EVENTS_PER_SECOND each second; the rest is counted as lost. */
#define MW_EVENTS_PER_SECOND 2000
struct mw_event_budget {
	__u64 since;
	__u64 sent;
	__u64 lost;
};
