/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the ingress of the host's end of every pod's veth: what the pod sends. */
#include <meshwire/policy.h>

/* The first that applies:
 *
 *  1. What the link needs, from a link-local address or none: not ours.
 *  2. From an address that is not this pod's: dropped, SPOOFED_SOURCE.
 *  3. What the link needs: not ours.
 *  4. As the pod's egress policy says. */
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
	return reason == MW_NOT_OURS ? ask(question, MW_EGRESS) : reason; /* 4 */
}

/* from-pod: tc ingress of the host's end of a pod's veth */
SEC("tc")
int mwp_from_pod(struct __sk_buff *skb)
{
	struct mw_question question;
	enum mw_reason reason = MW_NOT_OURS;
	struct mw_packet packet = {};
	int parsed = read_packet(skb, true, &packet, &question);

	question.direction = MW_EGRESS;
	if (parsed == MW_IP)
		reason = from_pod(skb, &packet, &question);
	else if (parsed == MW_UNREADABLE)
		reason = MW_DROP_MALFORMED;
	return finish_policy(skb, &packet, &question, reason);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
