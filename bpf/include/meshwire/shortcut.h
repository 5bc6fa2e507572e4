/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Two ways for packets between pods to cost less than a judgement and the host's stack: verdicts that are
 * remembered, and pods of one node to whom packets are handed directly. */
#pragma once

#include <linux/if_packet.h>

#include <meshwire/policy.h>

#define MW_REMEMBERED MW_SECOND /* the flow's own entry hears of its packets at least this often */

#define MW_NOT_REMEMBERED (-2) /* no TC action */

#define MW_IPV4_PLAIN 0x45 /* version 4, no options */
#define MW_TCP_FLAGS 13 /* offset in the header */

static __always_inline __u16 type_of(__u8 first)
{
	return first >> 4 == 6 ? ETH_P_IPV6 : ETH_P_IP;
}

/* The key of a TCP or UDP packet with nothing unusual about its headers, and the TCP flags that say where in its
 * connection it is: 0 in the middle. Negative for any other packet. */
static __always_inline int read_plain(struct __sk_buff *skb, enum mw_hook hook, bool ethernet,
				      struct mw_verdict_key *key)
{
	const __u8 *data = (const __u8 *)(long)skb->data;
	const __u8 *end = (const __u8 *)(long)skb->data_end;
	const __u32 l2 = ethernet ? ETH_HLEN : 0;
	const struct iphdr *ip = (const struct iphdr *)(data + l2);
	const struct ipv6hdr *ip6 = (const struct ipv6hdr *)(data + l2);
	const __u8 *transport;
	__be16 type;
	int flags = 0;

	__builtin_memset(key, 0, sizeof(*key));
	if (skb->vlan_present)
		return MW_UNREADABLE;
	if (data + l2 + sizeof(*ip) > end)
		return MW_UNREADABLE;
	type = ethernet ? ((const struct ethhdr *)data)->h_proto : bpf_htons(type_of(*(const __u8 *)ip));
	if (type == bpf_htons(ETH_P_IP)) {
		if (*(const __u8 *)ip != MW_IPV4_PLAIN || ip->frag_off & bpf_htons(MW_IPV4_MORE | MW_IPV4_OFFSET))
			return MW_UNREADABLE;
		key->family = MW_IPV4;
		key->protocol = ip->protocol;
		__builtin_memcpy(key->src, &ip->saddr, sizeof(ip->saddr));
		__builtin_memcpy(key->dst, &ip->daddr, sizeof(ip->daddr));
		transport = (const __u8 *)(ip + 1);
	} else if (type == bpf_htons(ETH_P_IPV6)) {
		if (data + l2 + sizeof(*ip6) > end || *(const __u8 *)ip6 >> 4 != 6)
			return MW_UNREADABLE;
		key->family = MW_IPV6;
		key->protocol = ip6->nexthdr;
		__builtin_memcpy(key->src, &ip6->saddr, sizeof(key->src));
		__builtin_memcpy(key->dst, &ip6->daddr, sizeof(key->dst));
		transport = (const __u8 *)(ip6 + 1);
	} else {
		return MW_UNREADABLE;
	}

	if (key->protocol == IPPROTO_TCP) {
		if (transport + MW_TCP_FLAGS + 1 > end)
			return MW_UNREADABLE;
		flags = transport[MW_TCP_FLAGS] & (MW_TCP_SYN | MW_TCP_FIN | MW_TCP_RST);
	} else if (key->protocol != IPPROTO_UDP || transport + 4 > end) {
		return MW_UNREADABLE;
	}
	__builtin_memcpy(&key->sport, transport, sizeof(key->sport) + sizeof(key->dport));
	key->ifindex = skb->ifindex;
	key->hook = hook;
	return flags;
}

/* For a device with this MTU. Segments of one that is still to be cut up have been told their size. */
static __always_inline bool is_too_big(const struct __sk_buff *skb, __u32 mtu)
{
	return !skb->gso_size && skb->len > mtu + ETH_HLEN;
}

/* Hands the packet to the pod behind the device `target`; the TC action. `addresses` are destination and source
 * for its frame, all zero: those it has. Its time to live stays as it is:
 * nobody has routed it. */
static __always_inline int hand_over(struct __sk_buff *skb, __u32 target, const __u8 *addresses)
{
	const __u32 *macs = (const __u32 *)addresses;

	if (macs[0] | macs[1] | macs[2]) {
		if (bpf_skb_store_bytes(skb, 0, addresses, 2 * ETH_ALEN, 0))
			return TC_ACT_SHOT;
	} else if (skb->pkt_type != PACKET_HOST && bpf_skb_change_type(skb, PACKET_HOST)) {
		/* It was for a port of the same bridge, not for the device it came by. */
		return TC_ACT_SHOT;
	}
	return bpf_redirect_peer(target, 0);
}

/* Tells the flow of the pod that sends (`direction` MW_EGRESS) or gets it of a connection's last packets. False
 * where it is no longer there. */
static __always_inline bool end_flow(const struct mw_verdict_key *packet, __u8 tcp_flags,
				     enum mw_direction direction, bool reply)
{
	const bool ingress = reply ? direction == MW_EGRESS : direction == MW_INGRESS;
	struct mw_flow_key key = {
		.sport = reply ? packet->dport : packet->sport,
		.dport = reply ? packet->sport : packet->dport,
		.family = packet->family,
		.protocol = packet->protocol,
		.direction = ingress ? MW_INGRESS : MW_EGRESS,
	};
	struct mw_flow *flow;

	__builtin_memcpy(key.src, reply ? packet->dst : packet->src, sizeof(key.src));
	__builtin_memcpy(key.dst, reply ? packet->src : packet->dst, sizeof(key.dst));
	flow = bpf_map_lookup_elem(&flows, &key);
	if (!flow)
		return false;
	touch_flow(flow, &key, tcp_flags, reply, flow->flags & MW_FLOW_WAY, bpf_ktime_get_ns());
	return true;
}

/* The same for all flows that a verdict is about. In a frame of its own: see mw_question. */
__noinline int end_flows(const struct mw_verdict_key *packet, __u8 tcp_flags, __u8 flows)
{
	if (!packet)
		return MW_NOT_REMEMBERED;
	if (flows & MW_SENDERS_FLOW && !end_flow(packet, tcp_flags, MW_EGRESS, flows & MW_SENDERS_REPLY))
		return MW_NOT_REMEMBERED;
	if (flows & MW_RECEIVERS_FLOW && !end_flow(packet, tcp_flags, MW_INGRESS, flows & MW_RECEIVERS_REPLY))
		return MW_NOT_REMEMBERED;
	return 0;
}

/* The TC action on the packet by what was found for those like it lately; it is counted, too. A connection's
 * first packets are never among them, and of its last ones its flows hear. MW_NOT_REMEMBERED: nothing that still
 * stands. */
__noinline int recall(struct __sk_buff *skb, enum mw_hook hook, bool ethernet)
{
	const struct mw_policy_state *state = state_of();
	const struct mw_verdict *found;
	struct mw_verdict_key key;
	struct mw_verdict verdict;
	int tcp_flags;

	if (!state)
		return MW_NOT_REMEMBERED;
	tcp_flags = read_plain(skb, hook, ethernet, &key);
	if (tcp_flags < 0 || tcp_flags & MW_TCP_SYN)
		return MW_NOT_REMEMBERED;
	found = bpf_map_lookup_elem(&verdicts, &key);
	if (!found)
		return MW_NOT_REMEMBERED;
	verdict = *found;
	if (verdict.generation != state->generation || verdict.upsets != state->upsets ||
	    verdict.until <= bpf_ktime_get_coarse_ns() || verdict.sport != key.sport || verdict.dport != key.dport)
		return MW_NOT_REMEMBERED;
	if (verdict.target && is_too_big(skb, verdict.target_mtu))
		return MW_NOT_REMEMBERED;
	if (tcp_flags && end_flows(&key, tcp_flags, verdict.flows))
		return MW_NOT_REMEMBERED;
	count_policy(skb, verdict.reason, hook == MW_TO_POD ? MW_INGRESS : MW_EGRESS);
	if (!verdict.target)
		return TC_ACT_UNSPEC;
	count_policy(skb, verdict.target_reason, MW_INGRESS);
	return hand_over(skb, verdict.target, verdict.macs);
}

/* Before anything is looked up for the packet. */
static __always_inline void begin_verdict(struct mw_question *question)
{
	const struct mw_policy_state *state = state_of();

	if (!state)
		return;
	question->generation = state->generation;
	question->upsets = state->upsets;
}

/* Keeps what was found for the packet where that says the same of those that follow: after a connection's last
 * packets another may begin. Of UDP between pods of this node it doesn't while its way is open, nor where it goes
 * directly and this came out of the stack. */
__noinline int remember(struct __sk_buff *skb, const struct mw_question *question, enum mw_reason reason,
			    enum mw_hook hook, bool ethernet)
{
	struct mw_verdict_key key;
	struct mw_verdict verdict;
	int tcp_flags;

	if (!question || is_drop(reason) || reason == MW_NOT_OURS || reason == MW_POLICY_WOULD_DENY ||
	    question->sender_reason == MW_POLICY_WOULD_DENY)
		return 0;
	tcp_flags = read_plain(skb, hook, ethernet, &key);
	if (tcp_flags < 0 || tcp_flags & (MW_TCP_FIN | MW_TCP_RST))
		return 0;
	if (key.protocol == IPPROTO_UDP && question->way != MW_FLOW_STACK && !question->target &&
	    is_own_pod(hook == MW_TO_POD ? key.src : key.dst, key.family))
		return 0;
	verdict = (struct mw_verdict){
		.until = bpf_ktime_get_coarse_ns() + MW_REMEMBERED,
		.generation = question->generation,
		.upsets = question->upsets,
		.target = question->target,
		.reason = reason,
		.target_mtu = question->target_mtu,
		.sport = key.sport,
		.dport = key.dport,
		.flows = question->flows,
	};
	if (verdict.target) {
		__builtin_memcpy(verdict.macs, question->macs, sizeof(verdict.macs));
		verdict.reason = question->sender_reason;
		verdict.target_reason = reason;
	}
	bpf_map_update_elem(&verdicts, &key, &verdict, BPF_ANY);
	return 0;
}

/* Without a branch: the verifier would follow each. */
static __always_inline bool is_same_mac(const __u8 *one, const __u8 *other)
{
	__u8 different = 0;
	int i;

	for (i = 0; i < ETH_ALEN; i++)
		different |= one[i] ^ other[i];
	return !different;
}

/* Notes the addresses of the pod's link by a frame that it sends. */
__noinline int learn_link(struct __sk_buff *skb)
{
	__u32 ifindex = skb->ifindex;
	const struct mw_pod_link *known = bpf_map_lookup_elem(&pod_links, &ifindex);
	struct mw_pod_link link = {};
	__u8 macs[12];

	if (bpf_skb_load_bytes(skb, 0, macs, sizeof(macs)))
		return 0;
	if (known)
		link = *known;
	__builtin_memcpy(link.pod, macs + 6, sizeof(link.pod));
	if (skb->pkt_type == PACKET_HOST)
		__builtin_memcpy(link.gateway, macs, sizeof(link.gateway));
	if (!known || !is_same_mac(known->pod, link.pod) || !is_same_mac(known->gateway, link.gateway))
		bpf_map_update_elem(&pod_links, &ifindex, &link, BPF_ANY);
	return 0;
}

static __always_inline bool is_set(const __u8 *mac)
{
	const __u8 none[ETH_ALEN] = {};

	return !is_same_mac(mac, none);
}

static __always_inline bool is_tracked(const struct __sk_buff *skb, const struct mw_packet *packet,
				       const struct mw_question *question)
{
	if (packet->first_fragment || packet->later_fragment || packet->tagged || skb->vlan_present)
		return false;
	return question->key.protocol == IPPROTO_TCP || question->key.protocol == IPPROTO_UDP ||
	       question->quoted.family;
}

/* Whether the packet could be handed to the pod of this node that it is for, and how: target and addresses are
 * filled in. */
MW_SUBPROGRAM bool find_target(struct __sk_buff *skb, const struct mw_packet *packet,
			       struct mw_question *question)
{
	const struct mw_policy_state *state = state_of();
	const struct mw_pod_link *link;
	struct mw_endpoint pod;
	__u32 mtu = 0;
	__u8 mac[6];

	if (!state || !(state->flags & MW_SKIP_STACK) || !is_tracked(skb, packet, question))
		return false;
	if (!pod_lookup(&packet->dst, &pod) || pod.ifindex == skb->ifindex)
		return false;
	link = bpf_map_lookup_elem(&pod_links, &pod.ifindex);
	if (!link || bpf_skb_load_bytes(skb, 0, mac, sizeof(mac)))
		return false;
	/* Where it doesn't fit, the stack has an answer. */
	if (bpf_check_mtu(skb, pod.ifindex, &mtu, 0, 0))
		return false;
	question->target_mtu = mtu;
	if (!is_same_mac(mac, link->pod)) {
		if (!is_set(link->gateway) || skb->pkt_type != PACKET_HOST)
			return false;
		__builtin_memcpy(question->macs, link->pod, sizeof(link->pod));
		__builtin_memcpy(question->macs + sizeof(link->pod), link->gateway, sizeof(link->gateway));
	}
	question->target = pod.ifindex;
	return true;
}

/* The same, where it comes out of the stack: whether those that follow could. */
static __always_inline bool could_skip(const struct __sk_buff *skb, const struct mw_packet *packet,
				       const struct mw_question *question)
{
	const struct mw_policy_state *state = state_of();
	const __u32 ifindex = skb->ifindex;

	return state && state->flags & MW_SKIP_STACK && is_tracked(skb, packet, question) &&
	       bpf_map_lookup_elem(&pod_links, &ifindex);
}
