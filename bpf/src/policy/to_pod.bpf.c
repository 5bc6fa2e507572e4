/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the egress of the host's end of every pod's veth: what the pod gets. */
#include <meshwire/shortcut.h>

/* The first that applies:
 *
 *  1. What the link needs: not ours.
 *  2. To an address that is not this pod's: dropped, WRONG_POD.
 *  3. From another pod of this node, and dropped by its egress policy. A service address had hidden the
 *     destination from mwp_from_pod.
 *  4. As the pod's ingress policy says. */
static __always_inline enum mw_reason to_pod(struct __sk_buff *skb, const struct mw_packet *packet,
					     struct mw_question *question)
{
	enum mw_reason reason;

	if (is_control(skb, packet, false))
		return MW_NOT_OURS; /* 1 */
	if (!pod_lookup(&packet->dst, &question->pod) || question->pod.ifindex != skb->ifindex)
		return MW_DROP_WRONG_POD; /* 2 */
	reason = read_transport(skb, packet, question);
	if (reason != MW_NOT_OURS)
		return reason;
	if (pod_lookup(&packet->src, &question->pod)) {
		question->where = MW_THROUGH_STACK;
		question->may_skip = could_skip(skb, packet, question);
		question->translated = true;
		reason = ask(question, MW_EGRESS);
		if (is_drop(reason))
			return reason; /* 3 */
		question->sender_reason = reason;
		if (reason == MW_POLICY_WOULD_DENY)
			count_policy(skb, reason, question->direction);
		question->translated = false;
		if (!pod_lookup(&packet->dst, &question->pod))
			return MW_DROP_WRONG_POD; /* It has just gone. */
	}
	return ask(question, MW_INGRESS); /* 4 */
}

/* to-pod: tc egress of the host's end of a pod's veth */
SEC("tc")
int mwp_to_pod(struct __sk_buff *skb)
{
	struct mw_question question;
	enum mw_reason reason = MW_NOT_OURS;
	struct mw_packet packet = {};
	int action, parsed;

	action = recall(skb, MW_TO_POD, true);
	if (action != MW_NOT_REMEMBERED)
		return action;
	parsed = read_packet(skb, true, &packet, &question);
	begin_verdict(&question);
	question.direction = MW_INGRESS;
	if (parsed == MW_IP)
		reason = to_pod(skb, &packet, &question);
	else if (parsed == MW_UNREADABLE)
		reason = MW_DROP_MALFORMED;
	action = finish_policy(skb, &packet, &question, reason);
	remember(skb, &question, reason, MW_TO_POD, true);
	return action;
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
