"""Cloud TPU slices: names, chips, topologies, and device descriptions for compiling without a TPU."""

import dataclasses
import difflib
import math
import os
import re
from typing import Any

import jax

from solar_jax.errors import UserError
from solar_jax.hardware.chips import CHIPS, Chip

_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x4x12", "4x8x8", "4x4x20", "4x8x12", "8x8x8", "8x8x12",
    "8x8x16", "8x12x16", "8x16x16", "12x12x24", "16x16x16", "16x16x24",
)  # fmt: skip

# chip -> topologies of its slices. Among topologies with the same number of chips, only the most compact is listed.
TOPOLOGIES: dict[str, tuple[str, ...]] = {
    "v4": _CUBES[:-1],
    "v5e": _PLANE,
    "v5p": _CUBES,
    "v6e": _PLANE,
    "tpu7x": ("1x1x1", *_CUBES),
}
_OTHER_NAMES = {"v5litepod": "v5e", "v7x": "tpu7x"}  # aliases of chips in slice names


@dataclasses.dataclass(frozen=True)
class Slice:
    """One slice, or several of a kind that train together over DCN."""

    name: str  # e.g. "v5p-128" or "2xv5p-128"
    chip: str  # a key of CHIPS
    topology: str  # of one slice, in chips, e.g. "4x4x4"
    count: int = 1  # number of slices

    @property
    def facts(self) -> Chip:
        return CHIPS[self.chip]

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Torus dimensions of one slice, in chips."""
        return tuple(map(int, self.topology.split("x")))

    @property
    def chips(self) -> int:
        """Number of chips in all slices together."""
        return self.count * math.prod(self.dimensions)

    @property
    def devices(self) -> int:
        """Number of devices in all slices, as jax counts them."""
        return self.chips * self.facts.devices


MOST_SLICES = 256  # more than any run has had

# Slice name (chip and number of cores, as Google counts them) -> slice.
SLICES = {
    s.name: s
    for chip, topologies in TOPOLOGIES.items()
    for t in topologies
    for s in (Slice(f"{chip}-{math.prod(map(int, t.split('x'))) * CHIPS[chip].cores}", chip, t),)
}


def find_slice(name: str, flag: str = "--slice") -> Slice:
    """Looks up a slice by a name such as v5p-128, v5litepod-16 or 2xv6e-256; errors name `flag`.

    Raises:
      UserError: no slice has that name.
    """
    match = re.fullmatch(r"(?:(\d+)x)?([a-z]\w*)-(\d+)", name.strip().lower())
    if match:
        count, chip = int(match[1] or 1), _OTHER_NAMES.get(match[2], match[2])
        found = SLICES.get(f"{chip}-{match[3]}")
        if count > MOST_SLICES:
            raise UserError(f"{flag}: {name!r} names {count:,} slices; at most {MOST_SLICES} can be planned.")
        if found and count > 0:
            prefix = f"{count}x" if count > 1 else ""
            return dataclasses.replace(found, name=f"{prefix}{found.name}", count=count)
        if chip in CHIPS:
            sizes = ", ".join(s.name.partition("-")[2] for s in SLICES.values() if s.chip == chip)
            raise UserError(f"{flag}: there is no slice {name!r}; {chip} slices come in sizes {sizes}.")
    near = difflib.get_close_matches(name, SLICES, 1)
    hint = f"did you mean {near[0]}?" if near else f"chips are {', '.join(CHIPS)}, and slice names look like v5p-128."
    raise UserError(f"{flag}: there is no slice {name!r}; {hint}")


def described_devices(wanted: Slice) -> list[Any]:
    """Returns device descriptions of a slice to compile for, without having the slice.

    Raises:
      UserError: no TPU compiler (package libtpu) is installed.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not wait for a TPU VM metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling does not need exclusive use of a TPU
    from jax.experimental import topologies  # imported lazily: few runs need it

    more: dict[str, Any] = {"num_slices": wanted.count} if wanted.count > 1 else {}
    if wanted.chip == "v4":  # its two cores act as one device
        more["chip_config_name"] = "megacore"
    try:
        return topologies.get_topology_desc(f"{wanted.chip}:{wanted.topology}", "tpu", **more).devices
    except (RuntimeError, ImportError, jax.errors.JaxRuntimeError) as e:
        raise UserError(
            f"{wanted.name}: the TPU compiler does not start; it needs the package libtpu, from the extra `tpu` "
            f"({str(e).splitlines()[0]})."
        ) from e
