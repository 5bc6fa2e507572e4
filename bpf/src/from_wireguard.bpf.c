/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the ingress of the WireGuard devices, which have no L2 header: what comes through a tunnel
 * is from a pod or address of another node, for one of this node. */
#include <meshwire/finish.h>
#include <meshwire/verdict.h>

/* from-wireguard: tc ingress of meshwire_wg0 and meshwire_wg1 */
SEC("tc")
int mw_from_wireguard(struct __sk_buff *skb)
{
	const struct mw_settings *config = settings_lookup();
	struct mw_packet packet;

	/* Nothing but IP comes out of WireGuard, so there is nothing to be lenient with. */
	if (!config || parse_bare(skb, 0, &packet) != MW_IP)
		return finish(skb, MW_DROP_MALFORMED, MW_INGRESS);
	return finish(skb, tunnel_verdict(config, &packet), MW_INGRESS);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
