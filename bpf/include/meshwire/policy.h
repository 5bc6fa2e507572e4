/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The decisions of the policy programs. tests/bpf has the same rules in slow, obvious Python and compares. */
#pragma once

#include <meshwire/flows.h>

/* A function of its own for the verifier; not every program needs all of them. */
#define MW_SUBPROGRAM static __noinline __attribute__((unused))

#define MW_NDP_HOP_LIMIT 255 /* nobody has forwarded it */
#define MW_NDP_MULTICAST_HOP_LIMIT 1 /* nobody will: MLD, IGMP */

/* Where a packet is asked about, as far as that says something about its way between two pods of this node. */
enum mw_where {
	MW_ON_ITS_WAY, /* it says nothing */
	MW_LEAVING, /* its pod, for a pod of this node that it could be handed to */
	MW_SKIPPING, /* for the other one directly */
	MW_THROUGH_STACK, /* for its pod, from another of this node */
};

/* A packet, and the pod whose policy is asked about it. */
struct mw_question {
	struct mw_flow_key key; /* the packet's; `direction`: whether the pod sends it or gets it */
	struct mw_flow_key quoted; /* in an ICMP error: the packet it is about. family 0: none */
	struct mw_endpoint pod;
	__u32 peer; /* identity of the other end */
	__u32 ifindex;
	__u32 length; /* of the IP packet */
	__u8 tcp_flags;
	__u8 direction; /* answer: whose policy decided; a reply is judged by that of its flow */
	bool translated; /* whoever translates service addresses has done so */
	bool would_deny; /* answer: under policies in mode Audit */
	__u8 where; /* enum mw_where */
	bool may_skip; /* there is all it takes to hand packets to the other pod directly */
	__u8 way; /* answer: MW_FLOW_DIRECT, MW_FLOW_STACK or 0, not known */
	__u8 sender_reason; /* answer: where the packet goes directly, by the policy of the pod that sends it */
	__u8 flows; /* answer: enum mw_verdict_flows */
	/* Answers, to be remembered; as in mw_verdict. Small: older kernels (6.1) add up what calls within calls
	 * have on the stack. */
	__u16 target_mtu;
	__u32 generation, upsets, target;
	__u8 macs[12];
};

enum mw_ruling {
	MW_RULING_NONE,
	MW_RULING_ALLOW,
	MW_RULING_DENY,
};

static __always_inline struct mw_ip ip_of(const __u8 *addr, __u8 family)
{
	struct mw_ip ip = { .family = family };

	__builtin_memcpy(ip.addr, addr, sizeof(ip.addr));
	return ip;
}

/* The narrowest block of `cidrs` that an address is in; all zero where there is none. */
static __always_inline struct mw_cidr cidr_lookup(const struct mw_ip *ip)
{
	struct mw_prefix prefix = {
		.prefixlen = 32 + (ip->family == MW_IPV6 ? 128 : 32),
		.family = ip->family,
	};
	const struct mw_cidr *found;

	__builtin_memcpy(prefix.addr, ip->addr, sizeof(prefix.addr));
	found = bpf_map_lookup_elem(&cidrs, &prefix);
	return found ? *found : (struct mw_cidr){};
}

MW_SUBPROGRAM __u32 identity_lookup(const struct mw_ip *ip)
{
	const struct mw_identity *found = bpf_map_lookup_elem(&identities, ip);

	if (found)
		return found->number;
	return cidr_lookup(ip).flags & MW_CIDR_CLUSTER ? MW_ID_UNKNOWN : MW_ID_WORLD;
}

static __always_inline __u32 identity_of(const __u8 *addr, __u8 family)
{
	struct mw_ip ip = ip_of(addr, family);

	return identity_lookup(&ip);
}

/* Tells user space about a packet: as `key` has it, in the direction in which its flow began. The pod and
 * the other end are those of the question. */
MW_SUBPROGRAM void emit_event(const struct mw_question *question, const struct mw_flow_key *key,
				  enum mw_reason reason, __u32 rule)
{
	__u64 now = bpf_ktime_get_ns();
	struct mw_event *event = take_event(now);

	if (!event)
		return;
	__builtin_memset(event, 0, sizeof(*event));
	event->time = now;
	__builtin_memcpy(event->src, key->src, sizeof(event->src));
	__builtin_memcpy(event->dst, key->dst, sizeof(event->dst));
	event->src_identity = key->direction == MW_EGRESS ? question->pod.identity : question->peer;
	event->dst_identity = key->direction == MW_EGRESS ? question->peer : question->pod.identity;
	event->rule = rule;
	event->ifindex = question->ifindex;
	event->length = question->length;
	event->sport = key->sport;
	event->dport = key->dport;
	event->family = key->family;
	event->protocol = key->protocol;
	event->direction = key->direction;
	event->reason = reason;
	bpf_ringbuf_submit(event, 0);
}

/* What the rules of a set say of a flow whose other end is `peer`, in the numbered block `block` (0: in
 * none that matters). Any rule that denies, else any that allows; `rule` is the number of one that denies. */
MW_SUBPROGRAM enum mw_ruling ruling_of(__u32 set, const struct mw_flow_key *flow, __u32 peer,
					   __u32 block, __u32 *rule)
{
	struct mw_policy_key key = {
		.prefixlen = MW_POLICY_BITS_PROTOCOL + 16,
		.set = set,
		.identity = peer,
		.direction = flow->direction,
		.protocol = flow->protocol,
		.port = flow->dport,
	};
	enum mw_ruling ruling = MW_RULING_NONE;
	int i;

	for (i = 0; i < 3; i++) {
		const struct mw_policy_value *found;

		if (i == 1)
			key.identity = MW_ID_ANY;
		if (i == 2) {
			if (!block)
				break;
			key.identity = block;
		}
		found = bpf_map_lookup_elem(&policy, &key);
		if (!found)
			continue;
		if (found->deny) {
			*rule = found->rule;
			return MW_RULING_DENY;
		}
		ruling = MW_RULING_ALLOW;
	}
	return ruling;
}

/* The identity under which `policy` has the rules on the address's block; 0: it is in none. */
MW_SUBPROGRAM __u32 block_of(const __u8 *addr, __u8 family, __u32 identity)
{
	const struct mw_ip ip = ip_of(addr, family);
	__u32 number = cidr_lookup(&ip).number;

	if (!number)
		return 0;
	if (identity == MW_ID_WORLD || identity == MW_ID_APISERVER)
		return MW_ID_CIDR | number;
	return MW_ID_CIDR_INSIDE | number;
}

static __always_inline bool is_service(const __u8 *addr, __u8 family)
{
	struct mw_ip ip = ip_of(addr, family);

	return bpf_map_lookup_elem(&services, &ip);
}

/* An address of this node's pods that is in `endpoints` under no pod, nor the node's own: a pod that has just
 * come, which nothing guards yet, or nobody. */
MW_SUBPROGRAM bool is_unknown_pod(const __u8 *addr, __u8 family)
{
	const struct mw_ip ip = ip_of(addr, family);
	const struct mw_identity *found;

	if (bpf_map_lookup_elem(&endpoints, &ip))
		return false;
	found = bpf_map_lookup_elem(&identities, &ip);
	if (found && (found->number == MW_ID_HOST || found->number == MW_ID_APISERVER_HOST))
		return false;
	return cidr_lookup(&ip).flags & MW_CIDR_LOCAL;
}

/* A flow, by the policy of the pod at one end. The first that applies:
 *
 *  1. To the pod, from its own node: allowed. Kubelet's probes come from there.
 *  2. From the pod, to a service address that is still to be translated: DEFERRED.
 *  3. The other end may be a pod of this node whose own policy nobody would ask: dropped, UNKNOWN_POD.
 *  4. A rule denies: dropped.
 *  5. A rule allows: allowed.
 *  6. Denied by default: dropped.
 *  7. NONE.
 *
 * What passes by 5 to 7 is judged once more by the audit set, and `would_deny` says whether that drops it. */
MW_SUBPROGRAM enum mw_reason judge(struct mw_question *question, const struct mw_flow_key *flow)
{
	const bool ingress = flow->direction == MW_INGRESS;
	const __u8 *other = ingress ? flow->src : flow->dst;
	const __u32 flags = question->pod.flags;
	enum mw_reason reason = MW_POLICY_NONE;
	enum mw_ruling ruling;
	__u32 block = 0, rule = 0;

	question->direction = flow->direction;
	if (ingress && (question->peer == MW_ID_HOST || question->peer == MW_ID_APISERVER_HOST))
		return MW_POLICY_ALLOWED; /* 1 */
	if (!ingress && !question->translated && is_service(other, flow->family))
		return MW_POLICY_DEFERRED; /* 2 */
	if (question->peer == MW_ID_UNKNOWN && is_unknown_pod(other, flow->family))
		return MW_DROP_UNKNOWN_POD; /* 3 */

	if (flags & (ingress ? MW_INGRESS_CIDRS : MW_EGRESS_CIDRS))
		block = block_of(other, flow->family, question->peer);
	ruling = ruling_of(question->pod.set, flow, question->peer, block, &rule);
	if (ruling == MW_RULING_ALLOW)
		reason = MW_POLICY_ALLOWED; /* 5 */
	else if (ruling == MW_RULING_DENY || flags & (ingress ? MW_INGRESS_ENFORCED : MW_EGRESS_ENFORCED))
		reason = ingress ? MW_DROP_POLICY_INGRESS : MW_DROP_POLICY_EGRESS; /* 4, 6 */

	if (is_drop(reason)) {
		emit_event(question, flow, reason, rule);
		return reason;
	}
	if (!question->pod.audit_set)
		return reason;
	rule = 0;
	ruling = ruling_of(question->pod.audit_set, flow, question->peer, block, &rule);
	if (ruling == MW_RULING_DENY ||
	    (ruling == MW_RULING_NONE && flags & (ingress ? MW_INGRESS_AUDITED : MW_EGRESS_AUDITED))) {
		question->would_deny = true;
		emit_event(question, flow, MW_POLICY_WOULD_DENY, rule);
	}
	return reason;
}

static __always_inline struct mw_policy_state *state_of(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&policy_state, &zero);
}

/* The way that a flow between two pods of this node takes, after a packet of it (or a reply to it). `way` is
 * the one it took so far, 0 where it begins; `known`: there was such a flow.
 *
 * What goes directly, conntrack doesn't see. So no packet may go that way which conntrack would translate:
 * neither what a service leads to the other pod, nor the answer to that. The first that applies:
 *
 *  1. Handed to the other pod: DIRECT, unless a service was seen to use the flow just now.
 *  2. Where it leaves its pod: as it was. A connection's first packet to a pod's own address is nothing
 *     that would be translated: DIRECT. Of any other packet, only where it comes out can tell.
 *  3. Out of the stack, TCP: STACK, unless it was DIRECT, and can't go that way for the moment.
 *  4. Out of the stack, of a flow that goes directly: STACK. A service led it here, and conntrack has to see
 *     both from now on, to keep them apart by their ports.
 *  5. Out of the stack as it went in (the sender's flow was not begun here): DIRECT. Nothing translates it,
 *     and so nothing does its answers. */
static __always_inline __u8 next_way(struct mw_question *question, const struct mw_flow_key *key, __u8 way,
				     bool known, bool reply)
{
	switch (question->where) {
	case MW_SKIPPING:
		return key->protocol == IPPROTO_UDP && way == MW_FLOW_STACK ? way : MW_FLOW_DIRECT; /* 1 */
	case MW_LEAVING:
		return !way && !reply && is_first_syn(key, question->tcp_flags) ? MW_FLOW_DIRECT : way; /* 2 */
	case MW_THROUGH_STACK:
		if (key->protocol != IPPROTO_UDP)
			return way ? way : MW_FLOW_STACK; /* 3 */
		if (way || reply || !question->may_skip)
			return MW_FLOW_STACK; /* 4 */
		/* 5. The receiver's flow is begun here, by what the sender's says. */
		if (key->direction == MW_EGRESS ? known : !known && question->way == MW_FLOW_DIRECT)
			return MW_FLOW_DIRECT;
		return MW_FLOW_STACK;
	default:
		return way;
	}
}

/* What is known of a flow, for a packet of it (or a reply to it); MW_NOT_OURS: nothing. The first that
 * applies:
 *
 *  1. There is none, it expired, or it is from before the pod was made: nothing.
 *  2. It goes directly, and a service leads the first packet of another connection to the same ports: dropped,
 *     PORTS_IN_USE. The pod at the other end would take it for one of the connection that is there. The
 *     sender's flow says so; that of the other end may be of a pod that had its address before.
 *  3. It was judged by these rules, with this peer, and let through: its judgement stands. So it does
 *     where it was deferred, until the real destination is known.
 *  4. Anything else is judged anew, as the packet that began it. What is dropped now stays known, and is
 *     judged each time: if it were forgotten, the next packet the other way could begin a flow that this
 *     one is a reply to. */
MW_SUBPROGRAM enum mw_reason follow(struct mw_question *question, const struct mw_flow_key *key,
					bool reply)
{
	struct mw_flow *flow = bpf_map_lookup_elem(&flows, key);
	const __u64 now = bpf_ktime_get_ns();
	struct mw_policy_state *state;
	enum mw_reason reason;
	__u8 before, way;

	if (!flow || flow->expires <= now || flow->revision < question->pod.born)
		return MW_NOT_OURS; /* 1 */
	before = way = flow->flags & MW_FLOW_WAY;
	if (!reply && is_first_syn(key, question->tcp_flags)) {
		if (flow->flags & MW_FLOW_CLOSING || question->where == MW_ON_ITS_WAY) {
			way = 0;
		} else if (way == MW_FLOW_DIRECT && question->where == MW_THROUGH_STACK) {
			if (key->direction == MW_EGRESS)
				return MW_DROP_PORTS_IN_USE; /* 2 */
			way = 0;
		}
	}
	way = next_way(question, key, way, true, reply);
	reason = flow->reason;
	if (flow->revision != question->pod.revision || flow->peer != question->peer || is_drop(reason) ||
	    (reason == MW_POLICY_DEFERRED && question->translated)) {
		reason = judge(question, key); /* 4 */
		flow->reason = reason;
		flow->peer = question->peer;
		flow->revision = question->pod.revision;
	}
	touch_flow(flow, key, question->tcp_flags, reply, way, now);
	question->way = way;
	if (before && before != way) {
		/* After the flow has it: who finds out from here on remembers the new way. */
		state = state_of();
		if (state)
			__sync_fetch_and_add(&state->upsets, 1);
	}
	return reply && !is_drop(reason) ? MW_POLICY_REPLY : reason;
}

/* Whether a flow that began in `direction` is known and was let through by these rules, whoever the other end
 * is by now. Answers with its way, too; changes nothing. */
MW_SUBPROGRAM bool is_let_through(struct mw_question *question, struct mw_flow_key *key,
				      enum mw_direction direction)
{
	const struct mw_flow *flow;

	key->direction = direction;
	flow = bpf_map_lookup_elem(&flows, key);
	if (!flow || flow->expires <= bpf_ktime_get_ns() || flow->revision < question->pod.born ||
	    flow->revision != question->pod.revision || is_drop(flow->reason))
		return false;
	question->way = flow->flags & MW_FLOW_WAY;
	return true;
}

static __always_inline bool is_same(const __u8 *one, const __u8 *other)
{
	__u64 a[2], b[2];

	__builtin_memcpy(a, one, sizeof(a));
	__builtin_memcpy(b, other, sizeof(b));
	return a[0] == b[0] && a[1] == b[1];
}

/* An ICMP error about a packet of a flow of the pod that was let through: one that it sent, where it gets
 * the error; one that it got, where it sends it. `key` is room on the stack. */
static __always_inline bool is_about_flow(struct mw_question *question, enum mw_direction direction,
					  struct mw_flow_key *key)
{
	const enum mw_direction opposite = direction == MW_EGRESS ? MW_INGRESS : MW_EGRESS;

	if (!question->quoted.family)
		return false;
	if (direction == MW_INGRESS ? !is_same(question->quoted.src, question->key.dst) :
				      !is_same(question->quoted.dst, question->key.src))
		return false;
	*key = question->quoted;
	if (is_let_through(question, key, opposite))
		return true;
	return reverse_key(&question->quoted, 0, key) && is_let_through(question, key, direction);
}

static __always_inline void record_flow(struct mw_question *question, const struct mw_flow_key *key,
					enum mw_reason reason)
{
	struct mw_flow flow = {
		.revision = question->pod.revision,
		.peer = question->peer,
		.reason = reason,
	};

	question->way = next_way(question, key, 0, false, false);
	flow.flags = next_flags(0, key, question->tcp_flags, false) | question->way;
	flow.expires = bpf_ktime_get_ns() + lifetime(key->protocol, flow.flags);
	bpf_map_update_elem(&flows, key, &flow, BPF_ANY);
}

/* May the packet pass, by the policy of the pod that sends (`direction` MW_EGRESS) or gets it? The first
 * that applies:
 *
 *  1. A reply to a flow that the other end began: as follow() says.
 *  2. An ICMP error about a flow of the pod: passes as a reply.
 *  3. Of a flow that is known: as follow() says.
 *  4. Judged, and known from now on where it passes. TCP in the middle of a connection is no exception.
 *
 * Not static, so that the verifier goes through it once, and not again for each way to read a packet. It
 * knows no more of a pointer then than its type, and older kernels (6.1) take no such pointer as the key of a
 * map: keys are copied to the stack. */
__noinline enum mw_reason ask(struct mw_question *question, enum mw_direction direction)
{
	const bool sender = direction == MW_EGRESS;
	enum mw_reason reason = MW_NOT_OURS;
	struct mw_flow_key key;

	if (!question)
		return MW_DROP_MALFORMED;
	question->key.direction = direction;
	question->direction = direction;
	question->would_deny = false;
	question->peer = identity_of(sender ? question->key.dst : question->key.src, question->key.family);

	if (reverse_key(&question->key, question->tcp_flags, &key)) {
		key.direction = sender ? MW_INGRESS : MW_EGRESS;
		reason = follow(question, &key, true); /* 1 */
	}
	question->flows |= sender ? MW_SENDERS_FLOW : MW_RECEIVERS_FLOW;
	if (reason != MW_NOT_OURS)
		question->flows |= sender ? MW_SENDERS_REPLY : MW_RECEIVERS_REPLY;
	else if (is_about_flow(question, direction, &key))
		return MW_POLICY_REPLY; /* 2 */
	key = question->key;
	if (reason == MW_NOT_OURS)
		reason = follow(question, &key, false); /* 3 */
	if (reason == MW_NOT_OURS) {
		reason = judge(question, &key); /* 4 */
		if (!is_drop(reason))
			record_flow(question, &key, reason);
	}
	return question->would_deny ? MW_POLICY_WOULD_DENY : reason;
}

/* The pod of this node that has an address. False where there is none. */
MW_SUBPROGRAM bool pod_lookup(const struct mw_prefix *address, struct mw_endpoint *pod)
{
	struct mw_ip ip = ip_of(address->addr, address->family);
	const struct mw_endpoint *found = bpf_map_lookup_elem(&endpoints, &ip);

	if (!found)
		return false;
	*pod = *found;
	return true;
}

/* Whether a pod of this node has an address. In a frame of its own: see mw_question. */
MW_SUBPROGRAM bool is_own_pod(const __u8 *addr, __u8 family)
{
	struct mw_ip ip = ip_of(addr, family);

	return bpf_map_lookup_elem(&endpoints, &ip);
}

static __always_inline bool is_link_local(const struct mw_prefix *address)
{
	return address->family == MW_IPV6 && address->addr[0] == 0xfe && (address->addr[1] & 0xc0) == 0x80;
}

static __always_inline bool is_unspecified(const struct mw_prefix *address)
{
	__u64 halves[2];

	__builtin_memcpy(halves, address->addr, sizeof(halves));
	return !(halves[0] | halves[1]);
}

static __always_inline bool is_multicast(const struct mw_prefix *address)
{
	if (address->family == MW_IPV6)
		return address->addr[0] == 0xff;
	return (address->addr[0] & 0xf0) == 0xe0;
}

/* What a link needs to work, which no policy is about: NDP, MLD and IGMP, on a link and not through it.
 * `from_pod`: of NDP only what hosts send. Routers' advertisements and redirects would turn the traffic of
 * whoever believes them to the pod. Unicast NDP to the world would be a way out. */
MW_SUBPROGRAM bool is_control(struct __sk_buff *skb, const struct mw_packet *packet, bool from_pod)
{
	__u8 hops, type;

	if (packet->later_fragment || packet->first_fragment || packet->no_transport)
		return false;
	if (packet->family == MW_IPV4) {
		if (packet->protocol != IPPROTO_IGMP || !is_multicast(&packet->dst))
			return false;
		return !bpf_skb_load_bytes(skb, packet->l3 + offsetof(struct iphdr, ttl), &hops, sizeof(hops)) &&
		       hops == MW_NDP_MULTICAST_HOP_LIMIT;
	}

	if (packet->protocol != IPPROTO_ICMPV6)
		return false;
	if (bpf_skb_load_bytes(skb, packet->l3 + offsetof(struct ipv6hdr, hop_limit), &hops, sizeof(hops)) ||
	    bpf_skb_load_bytes(skb, packet->l4, &type, sizeof(type)))
		return false;
	switch (type) {
	case MW_ICMP6_LISTENER_QUERY:
	case MW_ICMP6_LISTENER_REPORT:
	case MW_ICMP6_LISTENER_DONE:
	case MW_ICMP6_LISTENER_REPORT_V2:
		return hops == MW_NDP_MULTICAST_HOP_LIMIT && is_multicast(&packet->dst);
	case MW_ICMP6_ROUTER_ADVERTISEMENT:
	case MW_ICMP6_REDIRECT:
		return hops == MW_NDP_HOP_LIMIT && !from_pod;
	case MW_ICMP6_ROUTER_SOLICITATION:
	case MW_ICMP6_NEIGHBOUR_SOLICITATION:
	case MW_ICMP6_NEIGHBOUR_ADVERTISEMENT:
		if (hops != MW_NDP_HOP_LIMIT)
			return false;
		return !from_pod || is_multicast(&packet->dst) || is_link_local(&packet->dst) ||
		       identity_of(packet->dst.addr, packet->family) != MW_ID_WORLD;
	}
	return false;
}

/* Fills in what an ICMP error quotes. A quote that can't be read is none. */
MW_SUBPROGRAM void read_quoted(struct __sk_buff *skb, __u32 offset, struct mw_flow_key *quoted)
{
	struct mw_packet packet;

	if (parse_bare(skb, offset, &packet) != MW_IP)
		return;
	parse_extension_headers(skb, &packet);
	if (packet.later_fragment || packet.no_transport)
		return;
	begin_key(&packet, quoted);
	if (read_ports(skb, &packet, quoted, NULL))
		quoted->family = 0;
}

/* Completes the question by what the packet's transport header says, or for a later fragment that of the
 * first. MW_NOT_OURS, or why the packet is dropped. */
MW_SUBPROGRAM enum mw_reason read_transport(struct __sk_buff *skb, const struct mw_packet *packet,
						     struct mw_question *question)
{
	if (packet->no_transport)
		return MW_DROP_MALFORMED;
	if (packet->later_fragment) {
		struct mw_fragment_key key = fragment_key(packet);
		const struct mw_fragment *first = bpf_map_lookup_elem(&fragments, &key);

		if (!first)
			return MW_DROP_FRAGMENT_UNKNOWN;
		question->key.sport = first->sport;
		question->key.dport = first->dport;
		return MW_NOT_OURS;
	}
	if (read_ports(skb, packet, &question->key, &question->tcp_flags))
		return MW_DROP_MALFORMED;
	if (is_icmp_error(&question->key))
		read_quoted(skb, packet->l4 + 8, &question->quoted);
	return MW_NOT_OURS;
}

/* Fills in packet and question. MW_NOT_IP and MW_UNREADABLE as parse_frame. */
MW_SUBPROGRAM int read_packet(struct __sk_buff *skb, bool ethernet, struct mw_packet *packet,
				       struct mw_question *question)
{
	int parsed = ethernet ? parse_frame(skb, 0, packet) : parse_bare(skb, 0, packet);

	__builtin_memset(question, 0, sizeof(*question));
	question->ifindex = skb->ifindex;
	question->length = skb->len;
	if (parsed != MW_IP)
		return parsed;
	question->length -= packet->l3;
	parse_extension_headers(skb, packet);
	begin_key(packet, &question->key);
	return MW_IP;
}

/* The one place where packets are counted and dropped. A policy's drop has been told of by judge(). */
MW_SUBPROGRAM int finish_policy(struct __sk_buff *skb, const struct mw_packet *packet,
					 struct mw_question *question, enum mw_reason reason)
{
	count_policy(skb, reason, question->direction);
	if (!is_drop(reason)) {
		if (reason != MW_NOT_OURS && packet->first_fragment) {
			struct mw_fragment_key key = fragment_key(packet);
			struct mw_fragment ports = {
				.sport = question->key.sport,
				.dport = question->key.dport,
			};

			bpf_map_update_elem(&fragments, &key, &ports, BPF_ANY);
		}
		return TC_ACT_UNSPEC;
	}
	if (reason != MW_DROP_POLICY_INGRESS && reason != MW_DROP_POLICY_EGRESS) {
		const bool egress = question->direction == MW_EGRESS;
		struct mw_flow_key *key = &question->key;

		/* Not the pod at the device, where the packet only says that it is that one's. */
		key->direction = question->direction;
		question->pod.identity = identity_of(egress ? key->src : key->dst, key->family);
		question->peer = identity_of(egress ? key->dst : key->src, key->family);
		emit_event(question, key, reason, 0);
	}
	return TC_ACT_SHOT;
}
