/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The decisions: addresses and settings in, a reason out. Nothing here touches the packet. tests/bpf has
 * the same rules in slow, obvious Python and compares. */
#pragma once

#include <meshwire/maps.h>
#include <meshwire/parse.h>

/* Who lives at an address; all zero where nobody knows. */
static __always_inline struct mw_address address_lookup(const struct mw_prefix *prefix)
{
	const struct mw_address *found = bpf_map_lookup_elem(&ipcache, prefix);

	return found ? *found : (struct mw_address){};
}

static __always_inline bool is_local(const struct mw_settings *config, struct mw_address address)
{
	return address.node && address.node == config->local_node;
}

static __always_inline bool is_remote(const struct mw_settings *config, struct mw_address address)
{
	return address.node && address.node != config->local_node;
}

/* An address that pods have, whoever's: of a known node, or somewhere in a cluster CIDR. */
static __always_inline bool is_pod(struct mw_address address)
{
	return address.flags & (MW_ADDRESS_POD | MW_ADDRESS_CLUSTER);
}

static __always_inline bool is_host(struct mw_address address)
{
	return address.node && address.flags & MW_ADDRESS_HOST;
}

/* ifindex of the device that reaches the node; 0: none. MW_QUARANTINED: nothing goes there, or comes from
 * there. */
static __always_inline __u32 tunnel_lookup(struct mw_address address)
{
	__u32 number = address.node;
	const struct mw_node *node = bpf_map_lookup_elem(&nodes, &number);

	return node ? node->wg_ifindex : 0;
}

/* Pod traffic that is leaving in clear: `reason` where that is forbidden. */
static __always_inline enum mw_reason clear_verdict(const struct mw_settings *config, enum mw_reason reason)
{
	if (config->flags & MW_STRICT)
		return reason;
	return config->flags & MW_ENFORCING ? MW_CLEAR_LEAKED : MW_CLEAR_ALLOWED;
}

/* IP that can't be read can't be judged, so strict mode fails closed. No receiver takes such a packet. */
static __always_inline enum mw_reason unreadable_verdict(const struct mw_settings *config)
{
	return config->flags & MW_STRICT ? MW_DROP_MALFORMED : MW_NOT_OURS;
}

/* A packet on its way out of the node. The first that applies:
 *
 *  1. To an address nobody knows: not ours. To one of this node,
 *     a. from a pod address or a node's own, to a pod: in clear (strict: dropped, NO_SUCH_POD). Pods of
 *        this node are not reached by way of the wire, so no pod has that address, or not yet; the CNI
 *        has no route for it, and the default route would send what a tunnel has just brought back out,
 *        for all to read.
 *     b. anything else: not ours.
 *  2. To a pod of another node,
 *     a. from a pod of this node: by tunnel; there is none: in clear (strict: dropped, NO_TUNNEL).
 *     b. from this node's own address: by tunnel; there is none: in clear, CLEAR_HOST. Traffic of nodes
 *        is not promised, and dropping it could lock us out of the node.
 *     c. from another pod address: in clear (strict: dropped, BAD_SOURCE). Not ours to encrypt: the peer
 *        takes nothing from us but our own addresses.
 *     d. from another node's own address: CLEAR_HOST.
 *     Any of these, and the node is quarantined: dropped in every mode, QUARANTINED.
 *     e. from anywhere else, e.g. a client of a NodePort: not ours.
 *  3. To another node's own address,
 *     a. from a pod of this node: by tunnel; there is none: CLEAR_HOST.
 *     b. from another pod address: CLEAR_HOST.
 *     Either of these, and the node is quarantined: dropped in every mode, QUARANTINED.
 *     c. from anywhere else: not ours. WireGuard's own packets are here.
 *  4. To a cluster address of no known node,
 *     a. from a pod address, whoever's: in clear (strict: dropped, UNKNOWN_NODE).
 *     b. from anywhere else: not ours.
 *
 * In clear: CLEAR_LEAKED while encryption is in force, else CLEAR_ALLOWED. What ends as NOT_OURS or
 * CLEAR_HOST is also judged by what it carries: encapsulated_egress_verdict. So what leaves in clear by an
 * overlay counts there and once more at the uplink.
 *
 * A frame with a VLAN tag before its IP header has no tunnel (`redirectable` false): the kernel would
 * hand it over with the tag. On MW_ENCRYPTED, `tunnel` is the ifindex of the device. */
static __always_inline enum mw_reason egress_verdict(const struct mw_settings *config,
						     const struct mw_packet *packet, __u32 *tunnel)
{
	const bool redirectable = !packet->tagged;
	struct mw_address dst = address_lookup(&packet->dst);
	struct mw_address src;
	__u32 way;

	if (!dst.flags)
		return MW_NOT_OURS; /* 1 */
	src = address_lookup(&packet->src);

	if (is_local(config, dst)) {
		if (is_pod(dst) && (is_pod(src) || is_host(src)))
			return clear_verdict(config, MW_DROP_NO_SUCH_POD); /* 1a */
		return MW_NOT_OURS; /* 1b */
	}
	way = tunnel_lookup(dst);
	if (way == MW_QUARANTINED && (is_pod(src) || (is_pod(dst) && is_host(src))))
		return MW_DROP_QUARANTINED; /* 2, 3 */
	if (way == MW_QUARANTINED || !redirectable)
		way = 0;
	if (is_remote(config, dst) && is_pod(dst)) {
		if (is_local(config, src)) {
			*tunnel = way;
			if (*tunnel)
				return MW_ENCRYPTED; /* 2a, 2b */
			if (is_pod(src))
				return clear_verdict(config, MW_DROP_NO_TUNNEL); /* 2a */
			return MW_CLEAR_HOST; /* 2b */
		}
		if (is_pod(src))
			return clear_verdict(config, MW_DROP_BAD_SOURCE); /* 2c */
		if (is_host(src))
			return MW_CLEAR_HOST; /* 2d */
		return MW_NOT_OURS; /* 2e */
	}

	if (is_remote(config, dst)) {
		if (!is_pod(src))
			return MW_NOT_OURS; /* 3c */
		if (is_local(config, src)) {
			*tunnel = way;
			if (*tunnel)
				return MW_ENCRYPTED; /* 3a */
		}
		return MW_CLEAR_HOST; /* 3a, 3b */
	}

	if (is_pod(dst) && is_pod(src))
		return clear_verdict(config, MW_DROP_UNKNOWN_NODE); /* 4a */
	return MW_NOT_OURS; /* 4b */
}

/* The packet that an overlay's packet carries out of the node; it should have been redirected at the
 * overlay's device. In clear (strict: dropped, ENCAPSULATED) where both ends are pod addresses and not of
 * one and the same node. */
static __always_inline enum mw_reason encapsulated_egress_verdict(const struct mw_settings *config,
								  const struct mw_packet *inner)
{
	struct mw_address dst = address_lookup(&inner->dst);
	struct mw_address src;

	if (!is_pod(dst))
		return MW_NOT_OURS;
	src = address_lookup(&inner->src);
	if (!is_pod(src) || (src.node && src.node == dst.node))
		return MW_NOT_OURS;
	return clear_verdict(config, MW_DROP_ENCAPSULATED);
}

/* A packet that came in by an uplink or overlay, or inside of an overlay's packet. The first that
 * applies:
 *
 *  0. Between a pod and a node that is quarantined, or its pods: dropped in every mode, QUARANTINED.
 *  1. From a pod of another node or a cluster address of no known node, to a pod of this node or a
 *     cluster address of no known node: it should have come through a tunnel. Strict: dropped,
 *     CLEAR_ARRIVED; else it counts as CLEAR_ARRIVED while encryption is in force, as CLEAR_ALLOWED
 *     otherwise.
 *  2. Between a pod and a node's own address, not both of one node: CLEAR_HOST.
 *  3. Anything else: not ours. */
static __always_inline enum mw_reason ingress_verdict(const struct mw_settings *config,
						      const struct mw_packet *packet)
{
	struct mw_address src = address_lookup(&packet->src);
	struct mw_address dst;

	if (!src.flags || is_local(config, src))
		return MW_NOT_OURS; /* 3 */
	dst = address_lookup(&packet->dst);
	if (!dst.flags || is_remote(config, dst))
		return MW_NOT_OURS; /* 3 */

	if ((is_pod(src) || is_pod(dst)) && tunnel_lookup(src) == MW_QUARANTINED)
		return MW_DROP_QUARANTINED; /* 0 */
	if (is_pod(src) && is_pod(dst)) { /* 1 */
		if (config->flags & MW_STRICT)
			return MW_DROP_CLEAR_ARRIVED;
		return config->flags & MW_ENFORCING ? MW_CLEAR_ARRIVED : MW_CLEAR_ALLOWED;
	}
	if (is_pod(src) || is_pod(dst))
		return MW_CLEAR_HOST; /* 2 */
	return MW_NOT_OURS; /* 3 */
}

/* A packet that came through a tunnel. WireGuard has checked that the sender is the peer whose AllowedIPs
 * hold the source; this holds even while the agent is changing those, or somebody else did:
 *
 *  1. The source is no address of another node: dropped, BAD_SOURCE.
 *  2. The destination is no address of this node: dropped, BAD_DESTINATION.
 *  3. Anything else passes. The ICMP errors that mw_to_netdev answers with take this way too, and count
 *     as DECRYPTED. */
static __always_inline enum mw_reason tunnel_verdict(const struct mw_settings *config,
						     const struct mw_packet *packet)
{
	if (!is_remote(config, address_lookup(&packet->src)))
		return MW_DROP_BAD_SOURCE;
	if (!is_local(config, address_lookup(&packet->dst)))
		return MW_DROP_BAD_DESTINATION;
	return MW_DECRYPTED;
}
