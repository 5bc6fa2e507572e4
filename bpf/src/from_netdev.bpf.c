/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the ingress of every device through which pod traffic can reach the node: refuses, or
 * counts, what arrives in clear and should have come through a tunnel. */
#include <meshwire/encapsulation.h>
#include <meshwire/finish.h>
#include <meshwire/verdict.h>

static __always_inline int from_netdev(struct __sk_buff *skb, bool ethernet)
{
	const struct mw_settings *config = settings_lookup();
	struct mw_packet packet, inner;
	enum mw_reason reason = MW_NOT_OURS;
	int parsed;

	if (!config)
		return TC_ACT_UNSPEC;
	parsed = ethernet ? parse_frame(skb, 0, &packet) : parse_bare(skb, 0, &packet);
	if (parsed == MW_IP) {
		reason = ingress_verdict(config, &packet);
		if (reason == MW_NOT_OURS || reason == MW_CLEAR_HOST) {
			parsed = parse_encapsulated(skb, &packet, &inner);
			if (parsed == MW_IP) {
				enum mw_reason inside = ingress_verdict(config, &inner);

				if (inside != MW_NOT_OURS)
					reason = inside;
			}
		}
	}
	if (parsed == MW_UNREADABLE)
		reason = unreadable_verdict(config);
	return finish(skb, reason, MW_INGRESS);
}

/* from-netdev: tc ingress of a device with Ethernet headers */
SEC("tc")
int mw_from_netdev(struct __sk_buff *skb)
{
	return from_netdev(skb, true);
}

/* from-netdev: tc ingress of a device without L2 headers */
SEC("tc")
int mw_from_netdev_l3(struct __sk_buff *skb)
{
	return from_netdev(skb, false);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
