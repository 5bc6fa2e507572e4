/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Turns a packet that is too big for the tunnel into the ICMP error that tells its sender. */
#pragma once

#include <meshwire/maps.h>
#include <meshwire/parse.h>
#include <meshwire/transport.h>

/* How much of the packet the error quotes, IP header included: enough for 60 bytes of IPv4 header or a
 * few of IPv6's extensions, and the transport header. A multiple of four, for the checksum. */
#define MW_ICMP_QUOTE 128
/* Room made in front of the error, see answer_too_big. */
#define MW_ICMP_SHIFT 512
#define MW_ICMP_HOP_LIMIT 64
#define MW_ICMP_TOS 0xc0 /* network control, as the kernel's own errors */

#define MW_ICMP_PER_SECOND 256 /* and CPU */

/* "Fragmentation needed" and "packet too big": for IPv4, the MTU is the lower half of the word. */
struct mw_icmp_too_big {
	__u8 type;
	__u8 code;
	__sum16 checksum;
	__be32 mtu;
};

struct mw_icmp4_error {
	struct iphdr ip;
	struct mw_icmp_too_big icmp;
	__u8 quote[MW_ICMP_QUOTE];
} __attribute__((packed, aligned(4)));

struct mw_icmp6_error {
	struct ipv6hdr ip;
	struct mw_icmp_too_big icmp;
	__u8 quote[MW_ICMP_QUOTE];
} __attribute__((packed, aligned(4)));

struct mw_pseudo_header {
	__u8 src[16];
	__u8 dst[16];
	__be32 length;
	__be32 protocol;
};

static __always_inline __u16 fold_checksum(__s64 sum)
{
	__u64 folded = sum & 0xffffffff;

	folded = (folded & 0xffff) + (folded >> 16);
	folded = (folded & 0xffff) + (folded >> 16);
	return ~folded;
}

/* Errors about errors could go on for ever; later fragments have nothing to find the sender's socket by. */
static __always_inline bool is_answerable(struct __sk_buff *skb, const struct mw_packet *packet)
{
	__u8 type;

	if (packet->later_fragment || packet->no_transport)
		return false;
	if (packet->protocol != IPPROTO_ICMP && packet->protocol != IPPROTO_ICMPV6)
		return true;
	if (bpf_skb_load_bytes(skb, packet->l4, &type, sizeof(type)))
		return false;
	if (packet->protocol == IPPROTO_ICMPV6)
		return type >= MW_ICMP6_NO_ERROR;
	switch (type) {
	case MW_ICMP4_UNREACHABLE:
	case MW_ICMP4_SOURCE_QUENCH:
	case MW_ICMP4_REDIRECT:
	case MW_ICMP4_TIME_EXCEEDED:
	case MW_ICMP4_PARAMETER_PROBLEM:
		return false;
	default:
		return true;
	}
}

static __always_inline bool take_icmp_budget(void)
{
	__u64 now = bpf_ktime_get_ns();
	__u32 zero = 0;
	struct mw_icmp_budget *budget = bpf_map_lookup_elem(&icmp_budget, &zero);

	if (!budget)
		return false;
	if (now - budget->since >= MW_SECOND) {
		budget->since = now;
		budget->sent = 0;
	}
	if (budget->sent >= MW_ICMP_PER_SECOND)
		return false;
	budget->sent++;
	return true;
}

static __always_inline int write_icmp4(struct __sk_buff *skb, const struct mw_packet *packet,
				       struct mw_icmp4_error *error, __u16 mtu)
{
	error->ip = (struct iphdr){
		.version = 4,
		.ihl = 5,
		.tos = MW_ICMP_TOS,
		.tot_len = bpf_htons(sizeof(*error)),
		.ttl = MW_ICMP_HOP_LIMIT,
		.protocol = IPPROTO_ICMP,
	};
	__builtin_memcpy(&error->ip.saddr, packet->dst.addr, sizeof(error->ip.saddr));
	__builtin_memcpy(&error->ip.daddr, packet->src.addr, sizeof(error->ip.daddr));
	error->ip.check = fold_checksum(bpf_csum_diff(NULL, 0, (void *)&error->ip, sizeof(error->ip), 0));

	error->icmp = (struct mw_icmp_too_big){
		.type = MW_ICMP4_UNREACHABLE,
		.code = MW_ICMP4_FRAGMENTATION_NEEDED,
		.mtu = bpf_htonl(mtu),
	};
	error->icmp.checksum = fold_checksum(
		bpf_csum_diff(NULL, 0, (void *)&error->icmp, sizeof(error->icmp) + sizeof(error->quote), 0));
	return bpf_skb_store_bytes(skb, packet->l3, error, sizeof(*error), BPF_F_INVALIDATE_HASH);
}

static __always_inline int write_icmp6(struct __sk_buff *skb, const struct mw_packet *packet,
				       struct mw_icmp6_error *error, __u16 mtu)
{
	struct mw_pseudo_header pseudo = {
		.length = bpf_htonl(sizeof(error->icmp) + sizeof(error->quote)),
		.protocol = bpf_htonl(IPPROTO_ICMPV6),
	};
	__s64 sum;

	__builtin_memcpy(pseudo.src, packet->dst.addr, sizeof(pseudo.src));
	__builtin_memcpy(pseudo.dst, packet->src.addr, sizeof(pseudo.dst));
	error->ip = (struct ipv6hdr){
		.version = 6,
		.payload_len = bpf_htons(sizeof(error->icmp) + sizeof(error->quote)),
		.nexthdr = IPPROTO_ICMPV6,
		.hop_limit = MW_ICMP_HOP_LIMIT,
	};
	__builtin_memcpy(&error->ip.saddr, pseudo.src, sizeof(pseudo.src));
	__builtin_memcpy(&error->ip.daddr, pseudo.dst, sizeof(pseudo.dst));

	error->icmp = (struct mw_icmp_too_big){ .type = MW_ICMP6_TOO_BIG, .mtu = bpf_htonl(mtu) };
	sum = bpf_csum_diff(NULL, 0, (void *)&pseudo, sizeof(pseudo), 0);
	error->icmp.checksum = fold_checksum(
		bpf_csum_diff(NULL, 0, (void *)&error->icmp, sizeof(error->icmp) + sizeof(error->quote), sum));
	return bpf_skb_store_bytes(skb, packet->l3, error, sizeof(*error), BPF_F_INVALIDATE_HASH);
}

/* Makes the ICMP error out of the packet itself, from the packet's destination to its source. Negative
 * where that failed and the packet is damaged.
 *
 * change_tail cuts the packet and strips what it says of segmentation; adjust_room then takes
 * MW_ICMP_SHIFT bytes from its front. That moves skb->data past the place where a checksum was still to
 * be written (CHECKSUM_PARTIAL, as pods' packets have it), whereupon the kernel forgets it: otherwise
 * some device would write that checksum into the error. */
static __always_inline int answer_too_big(struct __sk_buff *skb, const struct mw_packet *packet, __u16 mtu)
{
	union {
		struct mw_icmp4_error v4;
		struct mw_icmp6_error v6;
	} error;
	const bool v6 = packet->family == MW_IPV6;
	const __u32 size = v6 ? sizeof(error.v6) : sizeof(error.v4);
	int result;

	if (v6)
		result = bpf_skb_load_bytes(skb, packet->l3, error.v6.quote, sizeof(error.v6.quote));
	else
		result = bpf_skb_load_bytes(skb, packet->l3, error.v4.quote, sizeof(error.v4.quote));
	if (result)
		return result;
	result = bpf_skb_change_tail(skb, packet->l3 + MW_ICMP_SHIFT + size, 0);
	if (result)
		return result;
	result = bpf_skb_adjust_room(skb, -MW_ICMP_SHIFT, BPF_ADJ_ROOM_MAC, 0);
	if (result)
		return result;
	/* A mark steers the original's way through other people's rules, not its sender's. */
	skb->mark = 0;
	return v6 ? write_icmp6(skb, packet, &error.v6, mtu) : write_icmp4(skb, packet, &error.v4, mtu);
}
