"""Which devices exchange how much in a compiled program, for tests."""

import math
import re
from collections.abc import Callable

import numpy as np

from solar_jax.planning import hlo_cost


def crossing_bytes(hlo: str, slice_of: Callable[[int], int]) -> int:
    """Bytes of results of collectives between devices of several slices, each as often as the loops around it turn."""
    computations, entry = hlo_cost._computations(hlo)
    total = 0
    for line, times, *_ in hlo_cost._executed(computations, entry, 1):
        if not (found := hlo_cost._COLLECTIVE.search(line)):
            continue
        if any(len({slice_of(d) for d in group}) > 1 for group in device_groups(line)):
            total += times * sum(hlo_cost._bytes(found[1]))
    return total


def device_groups(line: str) -> list[list[int]]:
    """Device groups of a collective, in each of the four ways in which HLO writes them."""
    if found := re.search(r"mesh\[(.*?)\] \{(.*?)\}", line):  # mesh['slice'=2,'fsdp'=4] {'fsdp'}: devices in order
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        over = re.findall(r"'(\w+)'", found[2])
        ids = np.arange(math.prod(sizes.values())).reshape(*sizes.values())
        ids = np.moveaxis(ids, [list(sizes).index(name) for name in over], range(-len(over), 0))
        return ids.reshape(-1, math.prod(sizes[name] for name in over)).tolist()
    if found := re.search(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):  # [4,2]<=[2,4]T(1,0)
        ids = np.arange(np.prod(ints(found[2]))).reshape(ints(found[2]))
        return (ids.transpose(ints(found[3])) if found[3] else ids).reshape(ints(found[1])).tolist()
    found = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)  # {{0,1},{2,3}}
    assert found, line
    return [ints(group) for group in re.findall(r"\{([\d,]+)\}", found[1])]


def ints(text: str) -> list[int]:
    return [int(x) for x in text.split(",")]
