/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* What a CNI's overlay carries: the packet inside of VXLAN, Geneve, IPIP and its IPv6 relatives. One
 * level deep, and on the ports that CNIs use. */
#pragma once

#include <meshwire/parse.h>

#define MW_PORT_VXLAN 4789
#define MW_PORT_VXLAN_LINUX 8472 /* the kernel's default; flannel's */
#define MW_PORT_GENEVE 6081

#define MW_VXLAN_HAS_VNI 0x08
#define MW_GENEVE_OPTIONS 0x3f /* in units of four bytes */
#define MW_GENEVE_VERSION 0xc0

/* A UDP header and what Geneve and VXLAN have in common behind it. */
struct mw_udp_tunnel {
	__be16 source;
	__be16 dest;
	__be16 length;
	__be16 check;
	__u8 flags; /* VXLAN: flags. Geneve: version and length of options */
	__u8 reserved;
	__be16 type; /* of Geneve's payload */
	__be32 vni;
};

/* MW_NOT_IP where `outer` carries no other packet. Later fragments pass for that: without the first one,
 * whose headers are judged, nobody can put them together. */
static __always_inline int parse_encapsulated(struct __sk_buff *skb, struct mw_packet *outer,
					      struct mw_packet *inner)
{
	struct mw_udp_tunnel udp;

	parse_extension_headers(skb, outer);
	if (outer->later_fragment || outer->no_transport)
		return MW_NOT_IP;

	switch (outer->protocol) {
	case IPPROTO_IPIP:
		inner->tagged = false;
		return parse_ipv4(skb, outer->l4, inner);
	case IPPROTO_IPV6:
		inner->tagged = false;
		return parse_ipv6(skb, outer->l4, inner);
	case IPPROTO_UDP:
		break;
	default:
		return MW_NOT_IP;
	}

	/* The ports first: nearly all UDP is something else, and may be shorter. */
	if (bpf_skb_load_bytes(skb, outer->l4, &udp, offsetof(struct mw_udp_tunnel, length)))
		return MW_NOT_IP;
	switch (bpf_ntohs(udp.dest)) {
	case MW_PORT_VXLAN:
	case MW_PORT_VXLAN_LINUX:
		if (bpf_skb_load_bytes(skb, outer->l4, &udp, sizeof(udp)))
			return MW_UNREADABLE;
		if (!(udp.flags & MW_VXLAN_HAS_VNI))
			return MW_NOT_IP;
		return parse_frame(skb, outer->l4 + sizeof(udp), inner);
	case MW_PORT_GENEVE: {
		__u32 payload;

		if (bpf_skb_load_bytes(skb, outer->l4, &udp, sizeof(udp)))
			return MW_UNREADABLE;
		if (udp.flags & MW_GENEVE_VERSION)
			return MW_NOT_IP;
		payload = outer->l4 + sizeof(udp) + (udp.flags & MW_GENEVE_OPTIONS) * 4;
		switch (bpf_ntohs(udp.type)) {
		case ETH_P_TEB:
			return parse_frame(skb, payload, inner);
		case ETH_P_IP:
			inner->tagged = false;
			return parse_ipv4(skb, payload, inner);
		case ETH_P_IPV6:
			inner->tagged = false;
			return parse_ipv6(skb, payload, inner);
		}
		return MW_NOT_IP;
	}
	}
	return MW_NOT_IP;
}
