/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* The maps, pinned by name so that all programs and every agent share one set. */
#pragma once

#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>

#include <meshwire/types.h>

struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(max_entries, MW_MAX_PREFIXES);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, struct mw_prefix);
	__type(value, struct mw_address);
} ipcache SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, MW_MAX_NODES);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_node);
} nodes SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_settings);
} settings SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, MW_MAX_REASONS * MW_DIRECTIONS);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_counter);
} metrics SEC(".maps");

/* How many ICMP errors this CPU has sent since `since` (bpf_ktime_get_ns). Pinned like the rest although
 * no agent reads it: a program loaded twice must use the same maps to be recognised as the same. */
struct mw_icmp_budget {
	__u64 since;
	__u64 sent;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__uint(pinning, LIBBPF_PIN_BY_NAME);
	__type(key, __u32);
	__type(value, struct mw_icmp_budget);
} icmp_budget SEC(".maps");
