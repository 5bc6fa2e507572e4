/* SPDX-License-Identifier: GPL-2.0 OR BSD-2-Clause */
/* Never loaded: makes the compiler describe every type in types.h, which it leaves out where no code
 * refers to one. */
#include <linux/types.h>

#include <meshwire/types.h>

enum mw_family family;
struct mw_prefix prefix;
enum mw_address_flags address_flags;
struct mw_address address;
struct mw_node node;
enum mw_settings_flags settings_flags;
struct mw_settings settings;
enum mw_direction direction;
enum mw_reason reason;
struct mw_counter counter;
