/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The maps of the policy programs, pinned by name like those in maps.h and apart from them; and what is
 * told to user space through them. */
#pragma once

#include <stdbool.h>

#include <linux/bpf.h>
#include <linux/pkt_cls.h>
#include <bpf/bpf_helpers.h>

#include <meshwire/policy_types.h>

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MW_MAX_IDENTITIES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_ip);
	__type(value, struct mw_identity);
} identities SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MW_MAX_CIDRS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_prefix);
	__type(value, struct mw_cidr);
} cidrs SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MW_MAX_ENDPOINTS);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_ip);
	__type(value, struct mw_endpoint);
} endpoints SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, MW_MAX_SERVICES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_ip);
	__type(value, struct mw_service);
} services SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MW_MAX_POLICY);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_policy_key);
	__type(value, struct mw_policy_value);
} policy SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MW_MAX_FLOWS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_flow_key);
	__type(value, struct mw_flow);
} flows SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MW_MAX_FRAGMENTS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_fragment_key);
	__type(value, struct mw_fragment);
} fragments SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_policy_state);
} policy_state SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MW_MAX_VERDICTS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_verdict_key);
	__type(value, struct mw_verdict);
} verdicts SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, MW_MAX_POD_LINKS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_pod_link);
} pod_links SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MW_MAX_REASONS * MW_DIRECTIONS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_counter);
} policy_metrics SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, MW_EVENT_BYTES);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_event_budget);
} event_budget SEC(".maps");

static __always_inline bool is_drop(enum mw_reason reason)
{
	return reason >= MW_DROP_NO_TUNNEL;
}

static __always_inline void count_policy(struct __sk_buff *skb, enum mw_reason reason,
					 enum mw_direction direction)
{
	__u32 key = reason * MW_DIRECTIONS + direction;
	struct mw_counter *counter = bpf_map_lookup_elem(&policy_metrics, &key);

	if (counter) {
		counter->packets++;
		counter->bytes += skb->len;
	}
}

/* Room for one event; NULL where this second's events are spent, or user space is too slow to read them. */
static __always_inline struct mw_event *take_event(__u64 now)
{
	__u32 zero = 0;
	struct mw_event_budget *budget = bpf_map_lookup_elem(&event_budget, &zero);
	struct mw_event *event = NULL;

	if (!budget)
		return NULL;
	if (now - budget->since >= MW_SECOND) {
		budget->since = now;
		budget->sent = 0;
	}
	if (budget->sent < MW_EVENTS_PER_SECOND)
		event = bpf_ringbuf_reserve(&events, sizeof(*event), 0);
	if (event)
		budget->sent++;
	else
		budget->lost++;
	return event;
}
