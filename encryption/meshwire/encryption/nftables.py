"""Tables of nftables by name, through netlink: whether one is there, and away with it. By hand: pyroute2's
part for it would cost every agent memory for two messages."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import Final

# linux/netlink.h
_NETLINK_NETFILTER: Final = 12
_NLMSG: Final = struct.Struct("=IHHII")
_NLM_F_REQUEST: Final = 0x1
_NLM_F_ACK: Final = 0x4
_NLMSG_ERROR: Final = 2
# linux/netfilter/nfnetlink.h
_NFNL_SUBSYS_NFTABLES: Final = 10
_NFNL_MSG_BATCH_BEGIN: Final = 0x10
_NFNL_MSG_BATCH_END: Final = 0x11
# linux/netfilter/nf_tables.h
_NFT_MSG_GETTABLE: Final = 1
_NFT_MSG_DELTABLE: Final = 2
_NFTA_TABLE_NAME: Final = 1
_NFPROTO_UNSPEC: Final = 0
_NFPROTO_INET: Final = 1

_SECONDS: Final = 10.0
"""The kernel answers at once, unless somebody's large transaction is under way."""


def has_table(name: str) -> bool | None:
    """Of family inet, in the network namespace that the thread is in; None: the kernel has no nftables.
    Raises OSError."""
    try:
        error = _ask(_message(_table(_NFT_MSG_GETTABLE), _NLM_F_REQUEST, _NFPROTO_INET, 0, name))
    except OSError as problem:
        if problem.errno in (errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT):
            return None
        raise
    match error:
        case 0:
            return True
        case errno.ENOENT:
            return False
        case errno.EINVAL | errno.EOPNOTSUPP:
            # Nobody there for this kind of message.
            return None
    raise OSError(error, f"looking for nftables' table {name}: {os.strerror(error)}")


def delete_table(name: str) -> None:
    """One that is gone already is no error. Raises OSError."""
    batch = (_NFPROTO_UNSPEC, _NFNL_SUBSYS_NFTABLES, "")
    error = _ask(
        _message(_NFNL_MSG_BATCH_BEGIN, _NLM_F_REQUEST, *batch)
        + _message(_table(_NFT_MSG_DELTABLE), _NLM_F_REQUEST | _NLM_F_ACK, _NFPROTO_INET, 0, name)
        + _message(_NFNL_MSG_BATCH_END, _NLM_F_REQUEST, *batch)
    )
    if error not in (0, errno.ENOENT):
        raise OSError(error, f"deleting nftables' table {name}: {os.strerror(error)}")


def _table(message: int) -> int:
    return _NFNL_SUBSYS_NFTABLES << 8 | message


def _message(kind: int, flags: int, family: int, resource: int, table: str) -> bytes:
    # struct nfgenmsg: its last part is big-endian.
    body = struct.pack("=BB", family, 0) + struct.pack(">H", resource)
    if table:
        text = table.encode() + b"\0"
        body += struct.pack("=HH", 4 + len(text), _NFTA_TABLE_NAME) + text + bytes(-len(text) % 4)
    return _NLMSG.pack(_NLMSG.size + len(body), kind, flags, 1, 0) + body


def _ask(request: bytes) -> int:
    """Number of the error that the kernel answers with, 0 for none. Raises OSError."""
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
    ) as netlink:
        netlink.settimeout(_SECONDS)
        netlink.send(request)
        answer = netlink.recv(1 << 16)
    _, kind, _, _, _ = _NLMSG.unpack_from(answer)
    if kind != _NLMSG_ERROR:
        return 0
    return -int.from_bytes(answer[_NLMSG.size : _NLMSG.size + 4], sys.byteorder, signed=True)
