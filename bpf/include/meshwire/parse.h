/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* From bytes to a mw_packet. Everything is read through bpf_skb_load_bytes: it checks bounds, reaches
 * data outside of the linear part, and leaves no packet pointers that a helper could invalidate.
 * Functions return a negative number where the packet is too short or says the impossible. */
#pragma once

#include <stdbool.h>
#include <stddef.h>

#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ip.h>
#include <linux/ipv6.h>
#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include <meshwire/types.h>

#define MW_MAX_VLAN_TAGS 2
#define MW_MAX_EXTENSION_HEADERS 8

#define MW_IPV4_DF 0x4000
#define MW_IPV4_MORE 0x2000
#define MW_IPV4_OFFSET 0x1fff
#define MW_IPV6_OFFSET 0xfff8
#define MW_IPV6_MORE 0x0001

enum mw_parse_result {
	MW_NOT_IP = 0,
	MW_IP = 1,
	MW_UNREADABLE = -1,
};

struct mw_packet {
	struct mw_prefix src, dst; /* full-length, ready for a lookup */
	__u32 l3; /* offsets from skb->data */
	__u32 l4;
	__u8 family; /* enum mw_family */
	__u8 protocol; /* of l4 */
	bool tagged; /* there is a VLAN tag between the Ethernet and the IP header */
	bool df;
	bool later_fragment; /* not the first: there is no transport header */
	bool first_fragment;
	bool no_transport; /* the chain of IPv6 extension headers couldn't be followed to its end */
	__u32 identification; /* of a fragment, as it is in the header */
};

/* Any header of an extension chain but the fragment header; AH counts its length in other units. */
struct mw_extension_header {
	__u8 next;
	__u8 length;
};

struct mw_fragment_header {
	__u8 next;
	__u8 reserved;
	__be16 offset;
	__be32 identification;
};

static __always_inline int parse_ipv4(struct __sk_buff *skb, __u32 offset, struct mw_packet *packet)
{
	struct iphdr ip;
	__u16 fragment;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return MW_UNREADABLE;
	if (ip.version != 4 || ip.ihl < 5)
		return MW_UNREADABLE;
	fragment = bpf_ntohs(ip.frag_off);

	packet->family = MW_IPV4;
	packet->l3 = offset;
	packet->l4 = offset + ip.ihl * 4;
	packet->protocol = ip.protocol;
	packet->df = fragment & MW_IPV4_DF;
	packet->later_fragment = fragment & MW_IPV4_OFFSET;
	packet->first_fragment = !packet->later_fragment && fragment & MW_IPV4_MORE;
	packet->identification = ip.id;
	packet->no_transport = false;
	if (packet->l4 > skb->len)
		return MW_UNREADABLE;

	packet->src = (struct mw_prefix){ .prefixlen = 32 + 32, .family = MW_IPV4 };
	packet->dst = packet->src;
	__builtin_memcpy(packet->src.addr, &ip.saddr, sizeof(ip.saddr));
	__builtin_memcpy(packet->dst.addr, &ip.daddr, sizeof(ip.daddr));
	return MW_IP;
}

static __always_inline int parse_ipv6(struct __sk_buff *skb, __u32 offset, struct mw_packet *packet)
{
	struct ipv6hdr ip;

	if (bpf_skb_load_bytes(skb, offset, &ip, sizeof(ip)))
		return MW_UNREADABLE;
	if (ip.version != 6)
		return MW_UNREADABLE;

	packet->family = MW_IPV6;
	packet->l3 = offset;
	packet->l4 = offset + sizeof(ip);
	packet->protocol = ip.nexthdr;
	packet->identification = 0;
	packet->df = true; /* nobody but the sender fragments IPv6 */
	packet->later_fragment = false;
	packet->first_fragment = false;
	packet->no_transport = false;

	packet->src = (struct mw_prefix){ .prefixlen = 32 + 128, .family = MW_IPV6 };
	packet->dst = packet->src;
	__builtin_memcpy(packet->src.addr, &ip.saddr, sizeof(ip.saddr));
	__builtin_memcpy(packet->dst.addr, &ip.daddr, sizeof(ip.daddr));
	return MW_IP;
}

/* Moves l4 and protocol of an IPv6 packet past its extension headers. Only callers that need the
 * transport header pay for this; the decision hangs on addresses alone. */
static __always_inline void parse_extension_headers(struct __sk_buff *skb, struct mw_packet *packet)
{
	int i;

	if (packet->family != MW_IPV6)
		return;
	for (i = 0; i < MW_MAX_EXTENSION_HEADERS; i++) {
		struct mw_fragment_header fragment;
		struct mw_extension_header header;

		switch (packet->protocol) {
		case IPPROTO_HOPOPTS:
		case IPPROTO_ROUTING:
		case IPPROTO_DSTOPTS:
		case IPPROTO_MH:
			if (bpf_skb_load_bytes(skb, packet->l4, &header, sizeof(header)))
				goto lost;
			packet->protocol = header.next;
			packet->l4 += (header.length + 1) * 8;
			break;
		case IPPROTO_AH:
			if (bpf_skb_load_bytes(skb, packet->l4, &header, sizeof(header)))
				goto lost;
			packet->protocol = header.next;
			packet->l4 += (header.length + 2) * 4;
			break;
		case IPPROTO_FRAGMENT:
			if (bpf_skb_load_bytes(skb, packet->l4, &fragment, sizeof(fragment)))
				goto lost;
			packet->protocol = fragment.next;
			packet->l4 += sizeof(fragment);
			packet->identification = fragment.identification;
			packet->first_fragment = bpf_ntohs(fragment.offset) & MW_IPV6_MORE;
			if (bpf_ntohs(fragment.offset) & MW_IPV6_OFFSET) {
				packet->later_fragment = true;
				packet->first_fragment = false;
				return;
			}
			break;
		default:
			return;
		}
	}
lost:
	packet->no_transport = true;
}

/* The packet in an Ethernet frame at `offset`. A third VLAN tag is impossible as far as we are concerned. */
static __always_inline int parse_frame(struct __sk_buff *skb, __u32 offset, struct mw_packet *packet)
{
	__be16 type;
	int i;

	packet->tagged = false;
	offset += offsetof(struct ethhdr, h_proto);
	for (i = 0; i <= MW_MAX_VLAN_TAGS; i++) {
		if (bpf_skb_load_bytes(skb, offset, &type, sizeof(type)))
			return MW_UNREADABLE;
		switch (bpf_ntohs(type)) {
		case ETH_P_IP:
			return parse_ipv4(skb, offset + sizeof(type), packet);
		case ETH_P_IPV6:
			return parse_ipv6(skb, offset + sizeof(type), packet);
		case ETH_P_8021Q:
		case ETH_P_8021AD:
			packet->tagged = true;
			offset += 4;
			break;
		default:
			return MW_NOT_IP;
		}
	}
	return MW_UNREADABLE;
}

/* The packet that starts right at `offset`, as on devices without an L2 header. */
static __always_inline int parse_bare(struct __sk_buff *skb, __u32 offset, struct mw_packet *packet)
{
	__u8 first;

	packet->tagged = false;
	if (bpf_skb_load_bytes(skb, offset, &first, sizeof(first)))
		return MW_UNREADABLE;
	switch (first >> 4) {
	case 4:
		return parse_ipv4(skb, offset, packet);
	case 6:
		return parse_ipv6(skb, offset, packet);
	default:
		return MW_NOT_IP;
	}
}
