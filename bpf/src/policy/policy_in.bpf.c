/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the ingress of every device through which pod traffic can reach the node, the WireGuard devices
 * among them: what is for a pod that nothing guards yet. What is for any other is mwp_to_pod's. */
#include <meshwire/policy.h>

static __always_inline int arrive(struct __sk_buff *skb, bool ethernet)
{
	struct mw_question question;
	enum mw_reason reason = MW_NOT_OURS;
	struct mw_packet packet = {};

	/* What can't be read is for mwp_to_pod to drop. */
	if (read_packet(skb, ethernet, &packet, &question) == MW_IP &&
	    is_unknown_pod(packet.dst.addr, packet.family))
		reason = MW_DROP_UNKNOWN_POD;
	question.direction = MW_INGRESS;
	return finish_policy(skb, &packet, &question, reason);
}

/* policy-in: tc ingress of a device with Ethernet headers */
SEC("tc")
int mwp_policy_in(struct __sk_buff *skb)
{
	return arrive(skb, true);
}

/* policy-in: tc ingress of a device without L2 headers */
SEC("tc")
int mwp_policy_in_l3(struct __sk_buff *skb)
{
	return arrive(skb, false);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
