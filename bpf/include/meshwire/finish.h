/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The one place where packets are counted and dropped. */
#pragma once

#include <linux/pkt_cls.h>

#include <meshwire/maps.h>

static __always_inline void count(struct __sk_buff *skb, enum mw_reason reason, enum mw_direction direction)
{
	__u32 key = reason * MW_DIRECTIONS + direction;
	struct mw_counter *counter = bpf_map_lookup_elem(&metrics, &key);

	if (counter) {
		counter->packets++;
		counter->bytes += skb->len;
	}
}

/* TC_ACT_UNSPEC passes the packet on to other people's filters, where TC_ACT_OK would end the matter. */
static __always_inline int finish(struct __sk_buff *skb, enum mw_reason reason, enum mw_direction direction)
{
	count(skb, reason, direction);
	return reason >= MW_DROP_NO_TUNNEL ? TC_ACT_SHOT : TC_ACT_UNSPEC;
}

static __always_inline const struct mw_settings *settings_lookup(void)
{
	__u32 zero = 0;

	return bpf_map_lookup_elem(&settings, &zero);
}
