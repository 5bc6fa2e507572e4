/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Attached to the egress of every device through which pod traffic can leave the node: sends it into the
 * tunnel of its destination's node, and refuses, or counts, what would leave in clear. */
#include <linux/udp.h>

#include <meshwire/encapsulation.h>
#include <meshwire/finish.h>
#include <meshwire/icmp.h>
#include <meshwire/mss.h>
#include <meshwire/verdict.h>

/* The largest IP packet that the wire would see of this: of a batch of segments (GSO) one. A tunnel
 * inside of the batch is not accounted for; WireGuard's own packets would be fragmented then. */
static __always_inline __u32 largest_packet(struct __sk_buff *skb, const struct mw_packet *packet)
{
	__u32 headers = packet->l4 - packet->l3;
	struct mw_tcp_flags flags;

	if (!skb->gso_size)
		return skb->len - packet->l3;
	if (has_tcp(packet))
		headers += tcp_header_length(skb, packet, &flags);
	else if (packet->protocol == IPPROTO_UDP)
		headers += sizeof(struct udphdr);
	return headers + skb->gso_size;
}

/* Redirects into the tunnel. The packet may not fit it:
 *  - IPv4 that may be fragmented goes in as it is, and WireGuard's own packet is fragmented;
 *  - anything else is answered with an ICMP error, and dropped. While the cluster is cutting over
 *    (MW_PASS_OVERSIZED) it goes in as well: the connection began when the larger packets fitted, and
 *    must lose none. */
static __always_inline int send_by_tunnel(struct __sk_buff *skb, struct mw_packet *packet,
					  const struct mw_settings *config, __u32 tunnel)
{
	const __u16 mtu = config->tunnel_mtu;
	bool answer;

	/* A tag the device was to add stays with the packet, and a tunnel would add it in the middle of nowhere. */
	if (skb->vlan_present && bpf_skb_vlan_pop(skb))
		return finish(skb, MW_DROP_NO_TUNNEL, MW_EGRESS);
	if (!mtu)
		goto redirect;
	parse_extension_headers(skb, packet);
	if (clamp_mss(skb, packet, mtu))
		count(skb, MW_MSS_CLAMPED, MW_EGRESS);
	if (!packet->df || largest_packet(skb, packet) <= mtu)
		goto redirect;

	answer = is_answerable(skb, packet) && take_icmp_budget();
	if (config->flags & MW_PASS_OVERSIZED) {
		if (!answer)
			goto redirect;
		count(skb, MW_ENCRYPTED, MW_EGRESS);
		bpf_clone_redirect(skb, tunnel, 0);
	} else {
		count(skb, MW_DROP_TOO_BIG, MW_EGRESS);
		if (!answer)
			return TC_ACT_SHOT;
	}
	if (answer_too_big(skb, packet, mtu))
		return TC_ACT_SHOT;
	count(skb, MW_TOO_BIG_ANSWERED, MW_EGRESS);
	/* As if the far end had sent it: the stack finds the sender, undoing NAT, and no source check objects. */
	return bpf_redirect(tunnel, BPF_F_INGRESS);

redirect:
	count(skb, MW_ENCRYPTED, MW_EGRESS);
	return bpf_redirect(tunnel, 0);
}

static __always_inline int to_netdev(struct __sk_buff *skb, bool ethernet)
{
	const struct mw_settings *config = settings_lookup();
	struct mw_packet packet, inner;
	enum mw_reason reason = MW_NOT_OURS;
	__u32 tunnel = 0;
	int parsed;

	if (!config)
		return TC_ACT_UNSPEC;
	parsed = ethernet ? parse_frame(skb, 0, &packet) : parse_bare(skb, 0, &packet);
	if (parsed == MW_IP) {
		reason = egress_verdict(config, &packet, &tunnel);
		if (reason == MW_ENCRYPTED)
			return send_by_tunnel(skb, &packet, config, tunnel);
		if (reason == MW_NOT_OURS || reason == MW_CLEAR_HOST) {
			parsed = parse_encapsulated(skb, &packet, &inner);
			if (parsed == MW_IP) {
				enum mw_reason inside = encapsulated_egress_verdict(config, &inner);

				if (inside != MW_NOT_OURS)
					reason = inside;
			}
		}
	}
	if (parsed == MW_UNREADABLE)
		reason = unreadable_verdict(config);
	return finish(skb, reason, MW_EGRESS);
}

/* to-netdev: tc egress of a device with Ethernet headers */
SEC("tc")
int mw_to_netdev(struct __sk_buff *skb)
{
	return to_netdev(skb, true);
}

/* to-netdev: tc egress of a device without L2 headers */
SEC("tc")
int mw_to_netdev_l3(struct __sk_buff *skb)
{
	return to_netdev(skb, false);
}

char LICENSE[] SEC("license") = "Dual BSD/GPL";
