/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Lowers the MSS a TCP SYN or SYN-ACK offers, so that the other side's segments fit the tunnel. */
#pragma once

#include <linux/tcp.h>

#include <meshwire/parse.h>
#include <meshwire/transport.h>

#define MW_TCP_OPTION_END 0
#define MW_TCP_OPTION_NOP 1
#define MW_TCP_OPTION_MSS 2
#define MW_TCP_MAX_OPTION_BYTES 40

struct mw_tcp_option {
	__u8 kind;
	__u8 length;
};

struct mw_tcp_flags {
	__u8 offset; /* of the data, in the upper four bits, in units of four bytes */
	__u8 flags;
};

static __always_inline bool has_tcp(const struct mw_packet *packet)
{
	return packet->protocol == IPPROTO_TCP && !packet->later_fragment && !packet->no_transport;
}

/* Bytes of the TCP header; 0 where it is cut off. */
static __always_inline __u32 tcp_header_length(struct __sk_buff *skb, const struct mw_packet *packet,
					       struct mw_tcp_flags *flags)
{
	if (bpf_skb_load_bytes(skb, packet->l4 + 12, flags, sizeof(*flags)))
		return 0;
	return (flags->offset >> 4) * 4;
}

/* True if the packet's MSS was lowered. Leaves anything odd alone: what then proves too big is answered
 * by ICMP. */
static __always_inline bool clamp_mss(struct __sk_buff *skb, const struct mw_packet *packet, __u16 mtu)
{
	const __u32 headers = (packet->family == MW_IPV6 ? sizeof(struct ipv6hdr) : sizeof(struct iphdr)) +
			      sizeof(struct tcphdr);
	struct mw_tcp_flags flags;
	__u32 at = packet->l4 + sizeof(struct tcphdr);
	__u32 end;
	int i;

	if (!has_tcp(packet) || mtu <= headers)
		return false;
	end = packet->l4 + tcp_header_length(skb, packet, &flags);
	if (end == packet->l4 || !(flags.flags & MW_TCP_SYN))
		return false;

	for (i = 0; i < MW_TCP_MAX_OPTION_BYTES; i++) {
		struct mw_tcp_option option;
		__be16 offered, lowered = bpf_htons(mtu - headers);

		if (at + sizeof(option) > end || bpf_skb_load_bytes(skb, at, &option, sizeof(option)))
			return false;
		if (option.kind == MW_TCP_OPTION_END)
			return false;
		if (option.kind == MW_TCP_OPTION_NOP) {
			at++;
			continue;
		}
		if (option.kind != MW_TCP_OPTION_MSS) {
			if (option.length < sizeof(option))
				return false;
			at += option.length;
			continue;
		}

		at += sizeof(option);
		if (option.length != sizeof(option) + sizeof(offered) || at + sizeof(offered) > end ||
		    bpf_skb_load_bytes(skb, at, &offered, sizeof(offered)))
			return false;
		if (bpf_ntohs(offered) <= mtu - headers)
			return false;
		if (bpf_skb_store_bytes(skb, at, &lowered, sizeof(lowered), 0))
			return false;
		/* The checksum sums 16-bit words from the header's start; across two words the bytes count swapped. */
		if ((at - packet->l4) & 1) {
			offered = bpf_htons(__builtin_bswap16(bpf_ntohs(offered)));
			lowered = bpf_htons(__builtin_bswap16(bpf_ntohs(lowered)));
		}
		/* Leaves a checksum that is still to be computed (CHECKSUM_PARTIAL) alone, as it must. */
		bpf_l4_csum_replace(skb, packet->l4 + offsetof(struct tcphdr, check), offered, lowered,
				    sizeof(lowered));
		return true;
	}
	return false;
}
