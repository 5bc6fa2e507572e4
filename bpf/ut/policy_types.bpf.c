/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Never loaded: describes every type in policy_types.h, as types.bpf.c does for types.h. */
#include <linux/types.h>

#include <meshwire/policy_types.h>

struct mw_ip ip;
struct mw_identity identity;
struct mw_cidr cidr;
enum mw_cidr_flags cidr_flags;
enum mw_endpoint_flags endpoint_flags;
struct mw_endpoint endpoint;
struct mw_service service;
struct mw_policy_key policy_key;
struct mw_policy_value policy_value;
struct mw_flow_key flow_key;
struct mw_flow flow;
enum mw_flow_flags flow_flags;
struct mw_policy_state policy_state;
enum mw_policy_state_flags policy_state_flags;
enum mw_hook hook;
enum mw_verdict_flows verdict_flows;
struct mw_verdict_key verdict_key;
struct mw_verdict verdict;
struct mw_pod_link pod_link;
struct mw_fragment_key fragment_key;
struct mw_fragment fragment;
struct mw_event event;
struct mw_event_budget event_budget;
