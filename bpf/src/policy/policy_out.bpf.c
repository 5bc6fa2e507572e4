/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the egress of every device through which pod traffic can leave the node, the WireGuard
 * devices among them: the egress policy of flows whose destination a service address had hidden. */
#include <meshwire/shortcut.h>

/* The first that applies:
 *
 *  1. From an address of this node's pods that none is known to have: dropped, UNKNOWN_POD. Nothing has judged
 *     it yet.
 *  2. From no pod of this node: not ours. What is masqueraded has been judged, as far as its destination
 *     was known then.
 *  3. What the link needs: not ours.
 *  4. To a pod of this node: not ours. mwp_to_pod sees it, or nobody gets it.
 *  5. As the pod's egress policy says. */
static __always_inline enum mw_reason policy_out(struct __sk_buff *skb, const struct mw_packet *packet,
						 struct mw_question *question)
{
	enum mw_reason reason;

	if (!pod_lookup(&packet->src, &question->pod)) {
		if (is_unknown_pod(packet->src.addr, packet->family))
			return MW_DROP_UNKNOWN_POD; /* 1 */
		return MW_NOT_OURS; /* 2 */
	}
	if (is_control(skb, packet, true))
		return MW_NOT_OURS; /* 3 */
	if (is_own_pod(packet->dst.addr, packet->family))
		return MW_NOT_OURS; /* 4 */
	reason = read_transport(skb, packet, question);
	if (reason != MW_NOT_OURS)
		return reason;
	question->translated = true;
	return ask(question, MW_EGRESS); /* 5 */
}

static __always_inline int leave(struct __sk_buff *skb, bool ethernet)
{
	struct mw_question question;
	enum mw_reason reason = MW_NOT_OURS;
	struct mw_packet packet = {};
	int action;

	action = recall(skb, MW_POLICY_OUT, ethernet);
	if (action != MW_NOT_REMEMBERED)
		return action;
	/* What can't be read is no pod's: mwp_from_pod has dropped it. */
	if (read_packet(skb, ethernet, &packet, &question) == MW_IP) {
		begin_verdict(&question);
		reason = policy_out(skb, &packet, &question);
	}
	action = finish_policy(skb, &packet, &question, reason);
	remember(skb, &question, reason, MW_POLICY_OUT, ethernet);
	return action;
}

/* policy-out: tc egress of a device with Ethernet headers */
SEC("tc")
int mwp_policy_out(struct __sk_buff *skb)
{
	return leave(skb, true);
}

/* policy-out: tc egress of a device without L2 headers */
SEC("tc")
int mwp_policy_out_l3(struct __sk_buff *skb)
{
	return leave(skb, false);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
