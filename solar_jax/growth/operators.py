"""Table of growth operators, and the typed layer map that they produce.

A layer map gives the source layer that every output layer copies. Layer ranges are half-open and 0-based, as in
`slices`, the notation known from merge tools.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable

from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """Placement of source layers in the grown model. All tuples have one entry per output layer."""

    operator: str  # name for display, e.g. "dus(m=8)"
    base_layers: int  # n
    source: tuple[int, ...]  # the source layer
    scale: tuple[float, ...] = ()  # factor on o_proj and down_proj; at 0 a layer passes its input through unchanged
    partner: tuple[int, ...] = ()  # second source layer of a mean; the source itself if there is none
    new: tuple[bool, ...] = ()  # True for an added copy, False for a layer that the base had there

    def __post_init__(self):
        object.__setattr__(self, "scale", self.scale or (1.0,) * len(self.source))
        object.__setattr__(self, "partner", self.partner or self.source)
        object.__setattr__(self, "new", self.new or _repeats(self.source))

    @property
    def layers(self) -> int:
        """Number of layers L of the grown model."""
        return len(self.source)

    @property
    def is_identity(self) -> bool:
        """True if the grown model is the base."""
        return self.source == tuple(range(self.base_layers)) and self.copies_only

    @property
    def copies_only(self) -> bool:
        """True if every output layer is bitwise equal to a source layer."""
        return self.partner == self.source and set(self.scale) <= {1.0}

    @property
    def distances(self) -> tuple[int, ...]:
        """Absolute differences of neighbours' source indices (paper section 2: 1 except at the seam), L - 1 of them."""
        return tuple(abs(b - a) for a, b in itertools.pairwise(self.source))

    @property
    def seams(self) -> tuple[int, ...]:
        """Output layers i whose successor i + 1 does not continue the source's order."""
        return tuple(i for i, (a, b) in enumerate(itertools.pairwise(self.source)) if b != a + 1)

    def runs(self) -> list[tuple[int, int]]:
        """Returns the half-open output ranges within which the source layers are consecutive."""
        cuts = [0, *(i + 1 for i in self.seams), self.layers]
        return list(itertools.pairwise(cuts))


def _repeats(source: tuple[int, ...]) -> tuple[bool, ...]:
    """Marks with True every source layer that occurred before."""
    return tuple(layer in source[:i] for i, layer in enumerate(source))


def _require(condition: bool, operator: str, n: int, what: str) -> None:
    if not condition:
        raise UserError(f"growth operator {operator} does not fit a base of {n} layers: {what}.")


def dus(n: int, g: GrowthConfig) -> LayerMap:
    """SOLAR's Depth Up-Scaling (arXiv 2312.15166, section 2): [0..n-m) + [m..n)."""
    name = f"dus(m={g.m})"
    _require(1 <= g.m < n / 2, name, n, f"m must be at least 1 and under {n}/2, or nothing grows, found m={g.m}")
    return LayerMap(name, n, (*range(n - g.m), *range(g.m, n)))


def naive(n: int, g: GrowthConfig) -> LayerMap:
    """Repeats the full stack `copies` times (G_stack)."""
    name = f"naive(copies={g.copies})"
    _require(g.copies >= 2, name, n, f"copies must be at least 2, found {g.copies}")
    return LayerMap(name, n, tuple(range(n)) * g.copies)


def interleave(n: int, g: GrowthConfig) -> LayerMap:
    """Repeats each layer `copies` times in a row: 0, 0, 1, 1, ..."""
    name = f"interleave(copies={g.copies})"
    _require(g.copies >= 2, name, n, f"copies must be at least 2, found {g.copies}")
    return LayerMap(name, n, tuple(i for i in range(n) for _ in range(g.copies)))


def block_repeat(n: int, g: GrowthConfig) -> LayerMap:
    """[0..b) + [a..b) + [b..n); Yi-9B used a=12, b=28 of 32."""
    name = f"block_repeat(a={g.a}, b={g.b})"
    _require(0 <= g.a < g.b <= n, name, n, f"0 <= a < b <= {n} must hold, found a={g.a} b={g.b}")
    return LayerMap(name, n, (*range(g.b), *range(g.a, g.b), *range(g.b, n)))


def llama_pro(n: int, g: GrowthConfig) -> LayerMap:
    """Adds a copy with o_proj = down_proj = 0 after every `every`-th layer; outputs stay equal (arXiv 2401.02415)."""
    name = f"llama_pro(every={g.every})"
    _require(1 <= g.every <= n, name, n, f"every must lie between 1 and {n}, found {g.every}")
    source, scale = [], []
    for i in range(n):
        source.append(i)
        scale.append(1.0)
        if (i + 1) % g.every == 0:
            source.append(i)
            scale.append(0.0)
    return LayerMap(name, n, tuple(source), tuple(scale))


def zeroed(n: int, g: GrowthConfig) -> LayerMap:
    """[0..n-m) + [m..n-m) twice with o_proj = down_proj = 0 + [n-m..n)."""
    name = f"zeroed(m={g.m})"
    _require(1 <= g.m < n / 2, name, n, f"m must be at least 1 and under {n}/2, found m={g.m}")
    block = tuple(range(g.m, n - g.m))
    source = (*range(n - g.m), *block, *block, *range(n - g.m, n))
    scale = (1.0,) * (n - g.m) + (0.0,) * (2 * len(block)) + (1.0,) * g.m
    return LayerMap(name, n, source, scale)


def average(n: int, g: GrowthConfig) -> LayerMap:
    """Adds a new layer (W_i + W_{i+1}) / 2 after every `every`-th layer i; none after the last."""
    name = f"average(every={g.every})"
    _require(1 <= g.every < n, name, n, f"every must lie between 1 and {n - 1}, found {g.every}")
    source, partner, new = [], [], []
    for i in range(n):
        source.append(i)
        partner.append(i)
        new.append(False)
        if (i + 1) % g.every == 0 and i + 1 < n:
            source.append(i)
            partner.append(i + 1)
            new.append(True)
    return LayerMap(name, n, tuple(source), partner=tuple(partner), new=tuple(new))


def identity(n: int, g: GrowthConfig | None = None) -> LayerMap:
    """Returns the base unchanged."""
    del g
    return LayerMap("identity", n, tuple(range(n)))


def slices(n: int, g: GrowthConfig) -> LayerMap:
    """Concatenates any half-open source ranges, written "0:24,8:32"."""
    name = f"slices({g.slices})"
    source: list[int] = []
    for part in g.slices.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*", part)
        _require(match is not None, name, n, f"ranges are written START:STOP,START:STOP, found {part!r}")
        assert match is not None
        start, stop = int(match[1]), int(match[2])
        _require(start < stop <= n, name, n, f"each range needs START < STOP <= {n}, found {start}:{stop}")
        source.extend(range(start, stop))
    return LayerMap(name, n, tuple(source))


OPERATORS: dict[str, Callable[[int, GrowthConfig], LayerMap]] = {
    "dus": dus,
    "naive": naive,
    "interleave": interleave,
    "block_repeat": block_repeat,
    "llama_pro": llama_pro,
    "zeroed": zeroed,
    "average": average,
    "identity": identity,
    "slices": slices,
}


def make_layer_map(base_layers: int, growth: GrowthConfig) -> LayerMap:
    """Builds the layer map of `growth` for a base of `base_layers` layers.

    Raises:
      UserError: unknown operator, or its numbers do not fit the base.
    """
    if growth.operator not in OPERATORS:
        raise UserError(f"growth.operator must be one of {', '.join(OPERATORS)}, found {growth.operator!r}.")
    return OPERATORS[growth.operator](base_layers, growth)
