"""Numbers for the address blocks that rules name. Pure.

The datapath knows of an address only the smallest named block it is in (`cidrs`, a longest prefix match). As
every block and every exception of every rule is named, what a rule says about an address is the same for all
addresses with the same smallest block: a rule is a set of such numbers."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from meshwire.api.fields import Network
from meshwire.api.meshpolicy import CidrPeer
from meshwire.policy.identity import MAX_CIDRS

_Block = tuple[int, int, int]
"""IP version, first address, length of the prefix: quicker to compare than a Network."""


@dataclass(slots=True, eq=False)
class BlockUse:
    """A CidrPeer that some rule has. `numbers`: of the named blocks that it means, since `settle`."""

    peer: CidrPeer
    block: _Block
    holes: tuple[_Block, ...]
    users: set[str] = field(default_factory=set)
    numbers: set[int] = field(default_factory=set)

    @property
    def names(self) -> set[_Block]:
        return {self.block, *self.holes}

    def means(self, block: _Block) -> bool:
        return _is_inside(block, self.block) and not any(_is_inside(block, hole) for hole in self.holes)


class Blocks:
    """A named block has its number for as long as it is named. A number that becomes free is the last one to
    be given out again: nothing that still holds it meets another block under it."""

    def __init__(self) -> None:
        self._uses: dict[CidrPeer, BlockUse] = {}
        self._by_block: defaultdict[_Block, set[BlockUse]] = defaultdict(set)
        self._named: Counter[_Block] = Counter()
        self._networks: dict[_Block, Network] = {}
        self._numbers: dict[_Block, int] = {}
        self._given: set[int] = set()
        self._last = 0
        self._unsettled: set[_Block] = set()
        self._fresh: set[BlockUse] = set()
        self._cidrs: Mapping[Network, int] = {}

    @property
    def cidrs(self) -> Mapping[Network, int]:
        """Every named block with its number, as of the last `settle`."""
        return self._cidrs

    def use(self, peer: CidrPeer, user: str) -> BlockUse:
        use = self._uses.get(peer)
        if use is None:
            use = BlockUse(peer, _block(peer.cidr), tuple(_block(hole) for hole in peer.excepts))
            self._uses[peer] = use
            self._by_block[use.block].add(use)
            self._networks |= {_block(network): network for network in (peer.cidr, *peer.excepts)}
            self._named.update(use.names)
            self._unsettled |= use.names
            self._fresh.add(use)
        use.users.add(user)
        return use

    def drop(self, use: BlockUse, user: str) -> None:
        use.users.discard(user)
        if use.users:
            return
        del self._uses[use.peer]
        self._by_block[use.block].discard(use)
        if not self._by_block[use.block]:
            del self._by_block[use.block]
        self._named.subtract(use.names)
        self._unsettled |= use.names
        self._fresh.discard(use)

    def settle(self) -> list[tuple[int, BlockUse]]:
        """Gives numbers to blocks that are newly named and takes them from those that no longer are. Returns
        which numbers came to or went from which uses, those made since the last time aside.

        Raises OverflowError where there are more blocks than numbers."""
        changed: list[tuple[int, BlockUse]] = []
        unsettled = sorted(self._unsettled)
        if not unsettled:
            return changed
        gone = [block for block in unsettled if not self._named[block]]
        new = [block for block in unsettled if self._named[block] and block not in self._numbers]
        for block in gone:
            del self._named[block], self._networks[block]
            if (number := self._numbers.pop(block, 0)) == 0:
                continue
            self._given.discard(number)
            for use in self._around(block):
                if number in use.numbers:
                    use.numbers.discard(number)
                    changed.append((number, use))
        for block in new:
            number = self._numbers[block] = self._next()
            for use in self._around(block):
                if use not in self._fresh and use.means(block):
                    use.numbers.add(number)
                    changed.append((number, use))
        if self._fresh:
            ordered = sorted(self._numbers)
            for use in self._fresh:
                use.numbers = {
                    self._numbers[block] for block in _inside(use.block, ordered) if use.means(block)
                }
            self._fresh.clear()
        self._unsettled.clear()
        if gone or new:
            self._cidrs = {self._networks[block]: number for block, number in self._numbers.items()}
        return changed

    def _around(self, block: _Block) -> Iterator[BlockUse]:
        """The uses whose block holds this one."""
        version, first, length = block
        for shorter in range(length + 1):
            spare = _width(version) - shorter
            yield from self._by_block.get((version, first >> spare << spare, shorter), ())

    def _next(self) -> int:
        if len(self._given) >= MAX_CIDRS - 1:
            raise OverflowError(f"policies name more than {MAX_CIDRS - 1} blocks of addresses")
        while True:
            self._last = self._last % (MAX_CIDRS - 1) + 1
            if self._last not in self._given:
                self._given.add(self._last)
                return self._last


def _width(version: int) -> int:
    return 32 if version == 4 else 128


def _block(network: Network) -> _Block:
    return network.version, int(network.network_address), network.prefixlen


def _is_inside(inner: _Block, outer: _Block) -> bool:
    version, first, length = outer
    return (
        inner[0] == version and inner[2] >= length and (inner[1] ^ first) >> (_width(version) - length) == 0
    )


def _inside(block: _Block, ordered: list[_Block]) -> list[_Block]:
    """Those of sorted blocks whose first address is in `block`."""
    version, first, length = block
    start = bisect_left(ordered, (version, first, 0))
    end = bisect_left(ordered, (version, first + (1 << _width(version) - length), 0))
    return ordered[start:end]
