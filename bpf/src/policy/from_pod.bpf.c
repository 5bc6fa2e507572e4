/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the ingress of the host's end of every pod's veth: what the pod sends. */
#include <meshwire/shortcut.h>

/* The first that applies:
 *
 *  1. What the link needs, from a link-local address or none: not ours.
 *  2. From an address that is not this pod's: dropped, SPOOFED_SOURCE.
 *  3. What the link needs: not ours.
 *  4. Dropped by the pod's egress policy.
 *  5. Of a flow that doesn't go directly to another pod of this node: as the pod's egress policy says.
 *  6. As the other pod's ingress policy says. */
static __always_inline enum mw_reason from_pod(struct __sk_buff *skb, const struct mw_packet *packet,
					       struct mw_question *question)
{
	const bool control = is_control(skb, packet, true);
	enum mw_reason reason;

	if (control && (is_link_local(&packet->src) || is_unspecified(&packet->src)))
		return MW_NOT_OURS; /* 1 */
	if (!pod_lookup(&packet->src, &question->pod) || question->pod.ifindex != skb->ifindex)
		return MW_DROP_SPOOFED_SOURCE; /* 2 */
	if (control)
		return MW_NOT_OURS; /* 3 */
	reason = read_transport(skb, packet, question);
	if (reason != MW_NOT_OURS)
		return reason;
	learn_link(skb);
	question->may_skip = find_target(skb, packet, question);
	question->where = question->may_skip ? MW_LEAVING : MW_ON_ITS_WAY;
	reason = ask(question, MW_EGRESS);
	if (is_drop(reason))
		return reason; /* 4 */
	if (!question->may_skip || question->way != MW_FLOW_DIRECT || reason == MW_POLICY_DEFERRED) {
		question->target = 0;
		return reason; /* 5 */
	}
	count_policy(skb, reason, question->direction);
	question->sender_reason = reason;
	if (!pod_lookup(&packet->dst, &question->pod))
		return MW_DROP_WRONG_POD; /* It has just gone. */
	question->where = MW_SKIPPING;
	return ask(question, MW_INGRESS); /* 6 */
}

/* from-pod: tc ingress of the host's end of a pod's veth */
SEC("tc")
int mwp_from_pod(struct __sk_buff *skb)
{
	struct mw_question question;
	enum mw_reason reason = MW_NOT_OURS;
	struct mw_packet packet = {};
	int action, parsed;

	action = recall(skb, MW_FROM_POD, true);
	if (action != MW_NOT_REMEMBERED)
		return action;
	parsed = read_packet(skb, true, &packet, &question);
	begin_verdict(&question);
	question.direction = MW_EGRESS;
	if (parsed == MW_IP)
		reason = from_pod(skb, &packet, &question);
	else if (parsed == MW_UNREADABLE)
		reason = MW_DROP_MALFORMED;
	else
		learn_link(skb);
	action = finish_policy(skb, &packet, &question, reason);
	if (action == TC_ACT_SHOT)
		return action;
	remember(skb, &question, reason, MW_FROM_POD, true);
	return question.target ? hand_over(skb, question.target, question.macs) : action;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
