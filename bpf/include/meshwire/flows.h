/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From a packet to the key of its flow, and how long flows live. */
#pragma once

#include <meshwire/parse.h>
#include <meshwire/policy_maps.h>
#include <meshwire/transport.h>

/* After the last packet. UDP and SCTP have no end that could be seen; SCTP's heartbeat is 30 s. */
#define MW_LIFETIME_TCP_NEW (60 * MW_SECOND)
/* Well above the two hours of a keepalive; kube-proxy has conntrack do the same. */
#define MW_LIFETIME_TCP (86400 * MW_SECOND)
#define MW_LIFETIME_TCP_CLOSING (10 * MW_SECOND)
#define MW_LIFETIME_DATAGRAM_NEW (60 * MW_SECOND)
#define MW_LIFETIME_DATAGRAM (180 * MW_SECOND)
#define MW_LIFETIME_OTHER (30 * MW_SECOND)

struct mw_icmp_head {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be16 identifier; /* of an echo */
};

/* `type` and `code` as the destination port of mw_policy_key and mw_flow_key. */
static __always_inline __be16 icmp_port(__u8 type, __u8 code)
{
	return bpf_htons(type << 8 | code);
}

static __always_inline bool is_icmp(const struct mw_flow_key *key)
{
	return key->protocol == (key->family == MW_IPV6 ? IPPROTO_ICMPV6 : IPPROTO_ICMP);
}

/* A packet that tells of another one. Redirects do so, too, but nobody has to believe them. */
static __always_inline bool is_icmp_error(const struct mw_flow_key *key)
{
	if (!is_icmp(key))
		return false;
	switch (bpf_ntohs(key->dport) >> 8) {
	case MW_ICMP6_UNREACHABLE:
	case MW_ICMP6_TOO_BIG:
		return key->family == MW_IPV6;
	case MW_ICMP4_UNREACHABLE: /* and MW_ICMP6_TIME_EXCEEDED */
	case MW_ICMP4_SOURCE_QUENCH: /* and MW_ICMP6_PARAMETER_PROBLEM */
		return true;
	case MW_ICMP4_TIME_EXCEEDED:
	case MW_ICMP4_PARAMETER_PROBLEM:
		return key->family == MW_IPV4;
	}
	return false;
}

/* Addresses, family and protocol of a packet whose extension headers were followed. */
static __always_inline void begin_key(const struct mw_packet *packet, struct mw_flow_key *key)
{
	__builtin_memset(key, 0, sizeof(*key));
	__builtin_memcpy(key->src, packet->src.addr, sizeof(key->src));
	__builtin_memcpy(key->dst, packet->dst.addr, sizeof(key->dst));
	key->family = packet->family;
	key->protocol = packet->protocol;
}

/* The ports of a packet that has a transport header. Of one that an ICMP error quotes, `tcp_flags` is
 * NULL: eight bytes of it are all that is promised. Negative where it is cut off. */
static __always_inline int read_ports(struct __sk_buff *skb, const struct mw_packet *packet,
				      struct mw_flow_key *key, __u8 *tcp_flags)
{
	struct mw_icmp_head icmp;

	if (is_icmp(key)) {
		__u8 request = key->family == MW_IPV6 ? MW_ICMP6_ECHO_REQUEST : MW_ICMP4_ECHO_REQUEST;
		__u8 reply = key->family == MW_IPV6 ? MW_ICMP6_ECHO_REPLY : MW_ICMP4_ECHO_REPLY;

		if (bpf_skb_load_bytes(skb, packet->l4, &icmp, sizeof(icmp)))
			return MW_UNREADABLE;
		key->dport = icmp_port(icmp.type, icmp.code);
		if (icmp.type == request || icmp.type == reply)
			key->sport = icmp.identifier;
		return 0;
	}
	switch (key->protocol) {
	case IPPROTO_TCP:
		if (tcp_flags && bpf_skb_load_bytes(skb, packet->l4 + 13, tcp_flags, sizeof(*tcp_flags)))
			return MW_UNREADABLE;
		break;
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		break;
	default:
		return 0;
	}
	return bpf_skb_load_bytes(skb, packet->l4, &key->sport, sizeof(key->sport) + sizeof(key->dport)) ?
		       MW_UNREADABLE :
		       0;
}

/* A connection's first packet. */
static __always_inline bool is_first_syn(const struct mw_flow_key *key, __u8 tcp_flags)
{
	return key->protocol == IPPROTO_TCP && (tcp_flags & (MW_TCP_SYN | MW_TCP_ACK)) == MW_TCP_SYN;
}

/* The flow that the packet would be a reply of, `direction` aside. False for packets that only ever begin
 * one: a connection's first SYN, an echo request, and other ICMP. */
static __always_inline bool reverse_key(const struct mw_flow_key *key, __u8 tcp_flags,
					struct mw_flow_key *reverse)
{
	*reverse = *key;
	__builtin_memcpy(reverse->src, key->dst, sizeof(reverse->src));
	__builtin_memcpy(reverse->dst, key->src, sizeof(reverse->dst));
	if (is_icmp(key)) {
		const bool v6 = key->family == MW_IPV6;

		reverse->dport = icmp_port(v6 ? MW_ICMP6_ECHO_REQUEST : MW_ICMP4_ECHO_REQUEST, 0);
		return key->dport == icmp_port(v6 ? MW_ICMP6_ECHO_REPLY : MW_ICMP4_ECHO_REPLY, 0);
	}
	reverse->sport = key->dport;
	reverse->dport = key->sport;
	return !is_first_syn(key, tcp_flags);
}

static __always_inline __u64 lifetime(__u8 protocol, __u8 flags)
{
	switch (protocol) {
	case IPPROTO_TCP:
		if (flags & MW_FLOW_CLOSING)
			return MW_LIFETIME_TCP_CLOSING;
		return flags & MW_FLOW_REPLIED ? MW_LIFETIME_TCP : MW_LIFETIME_TCP_NEW;
	case IPPROTO_UDP:
	case IPPROTO_SCTP:
		return flags & MW_FLOW_REPLIED ? MW_LIFETIME_DATAGRAM : MW_LIFETIME_DATAGRAM_NEW;
	default:
		return MW_LIFETIME_OTHER;
	}
}

/* What a flow's flags are after a packet of it, the way it takes aside. Ports that are used again begin anew. */
static __always_inline __u8 next_flags(__u8 flags, const struct mw_flow_key *key, __u8 tcp_flags, bool reply)
{
	if (reply)
		flags |= MW_FLOW_REPLIED;
	if (key->protocol != IPPROTO_TCP)
		return flags;
	if (!reply && is_first_syn(key, tcp_flags))
		return 0;
	if (tcp_flags & MW_TCP_FIN)
		flags |= reply ? MW_FLOW_FIN_REPLY : MW_FLOW_FIN;
	if (tcp_flags & MW_TCP_RST || (flags & MW_FLOW_FIN && flags & MW_FLOW_FIN_REPLY))
		flags |= MW_FLOW_CLOSING;
	return flags;
}

/* Notes a packet in its flow. Most packets move `expires` by less than a second, and write nothing. */
static __always_inline void touch_flow(struct mw_flow *flow, const struct mw_flow_key *key, __u8 tcp_flags,
				       bool reply, __u8 way, __u64 now)
{
	__u8 flags = next_flags(flow->flags & ~MW_FLOW_WAY, key, tcp_flags, reply) | way;
	__u64 expires = now + lifetime(key->protocol, flags);

	if (flags != flow->flags)
		flow->flags = flags;
	if (expires > flow->expires + MW_SECOND || expires + MW_SECOND < flow->expires)
		flow->expires = expires;
}

static __always_inline struct mw_fragment_key fragment_key(const struct mw_packet *packet)
{
	struct mw_fragment_key key = {
		.identification = packet->identification,
		.family = packet->family,
		.protocol = packet->protocol,
	};

	__builtin_memcpy(key.src, packet->src.addr, sizeof(key.src));
	__builtin_memcpy(key.dst, packet->dst.addr, sizeof(key.dst));
	return key;
}
