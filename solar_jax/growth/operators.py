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

# Keys of GrowthConfig that operators read, beside `slices`
OPERATOR_KEYS = ("m", "a", "b", "every", "copies", "blocks", "of", "beta", "alpha", "inner")
EXPERT_KEYS = ("experts", "top_k", "granularity", "routing", "redrawn", "jitter")  # and those of upcycling
INNER = ("copy", "mean", "normal")  # how `zeroed` makes the matrices that are not 0


@dataclasses.dataclass(frozen=True)
class Upcycling:
    """Experts made of each layer's MLP.

    An expert is the MLP, or with granularity G one of G experts of 1/G of its width, whose sum it is: a virtual group,
    whose router rows start equal (arXiv 2410.07524).
    """

    experts: int  # copies of the MLP
    top_k: int  # of them a token
    granularity: int = 1
    normalised: bool = True  # weights of a token's experts sum to 1
    redrawn: float = 0.0  # share of channels redrawn (arXiv 2502.19261)
    jitter: float = 0.0  # noise relative to each weight

    def __str__(self) -> str:
        parts = [f"{self.experts} experts, top {self.top_k}"]
        parts += [f"granularity {self.granularity}"] if self.granularity > 1 else []
        parts += ["softmax"] if not self.normalised else []
        parts += [f"redrawn {self.redrawn:g}"] if self.redrawn else []
        parts += [f"jitter {self.jitter:g}"] if self.jitter else []
        return ", ".join(parts)


@dataclasses.dataclass(frozen=True)
class LayerMap:
    """Placement of source layers in the grown model. All tuples have one entry per output layer."""

    operator: str  # name for display, e.g. "dus(m=8)"
    base_layers: int  # n
    source: tuple[int, ...]  # the source layer
    scale: tuple[float, ...] = ()  # factor on o_proj and down_proj; at 0 a layer passes its input through unchanged
    partner: tuple[int, ...] = ()  # second source layer of a mean; the source itself if there is none
    new: tuple[bool, ...] = ()  # True for an added copy, False for a layer that the base had there
    mix: str = "mean"  # of a layer and its partner: mean, or fit (by least squares, `growth.derived.fitted`)
    noise: tuple[bool, ...] = ()  # True where matrices are normal noise of the source's standard deviation
    tied: bool = False  # layers of one source share their weights in training
    experts: Upcycling | None = None  # what each layer's MLP becomes

    def __post_init__(self):
        object.__setattr__(self, "scale", self.scale or (1.0,) * len(self.source))
        object.__setattr__(self, "partner", self.partner or self.source)
        object.__setattr__(self, "new", self.new or _repeats(self.source))
        object.__setattr__(self, "noise", self.noise or (False,) * len(self.source))

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
        plain = self.partner == self.source and set(self.scale) <= {1.0} and not any(self.noise)
        return plain and self.experts is None

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
    return _one_block(name, n, g.a, g.b)


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
    """[0..n-m) + [m..n-m) twice with o_proj = down_proj = 0 + [n-m..n).

    The new layers' other matrices are copies, means with the next layer (OpT-DeUS averages neighbours), or noise.
    """
    name = f"zeroed(m={g.m})" if g.inner == "copy" else f"zeroed(m={g.m}, inner={g.inner})"
    _require(1 <= g.m < n / 2, name, n, f"m must be at least 1 and under {n}/2, found m={g.m}")
    _require(g.inner in INNER, name, n, f"inner must be one of {', '.join(INNER)}, found {g.inner!r}")
    block = tuple(range(g.m, n - g.m))
    source = (*range(n - g.m), *block, *block, *range(n - g.m, n))
    new = (False,) * (n - g.m) + (True,) * (2 * len(block)) + (False,) * g.m
    scale = tuple(0.0 if added else 1.0 for added in new)
    if g.inner == "mean":
        partner = tuple(i + added for i, added in zip(source, new, strict=True))
        return LayerMap(name, n, source, scale, partner, new)
    return LayerMap(name, n, source, scale, new=new, noise=new if g.inner == "normal" else ())


def average(n: int, g: GrowthConfig) -> LayerMap:
    """Adds a new layer (W_i + W_{i+1}) / 2 after every `every`-th layer i; none after the last."""
    return _between(f"average(every={g.every})", n, g.every, "mean")


def linear_lesa(n: int, g: GrowthConfig) -> LayerMap:
    """Adds a W_i + b W_{i+1} after every `every`-th layer i; none after the last.

    a and b of each tensor are those with which the base's own layers are best predicted from their neighbours,
    W_i = a W_{i-1} + b W_{i+1}: the linear form of LESA (arXiv 2502.13794).
    """
    name = f"linear_lesa(every={g.every})"
    _require(n >= 3, name, n, "a layer with two neighbours is needed")
    return _between(name, n, g.every, "fit")


def _between(name: str, n: int, every: int, mix: str) -> LayerMap:
    """New layers made of their two neighbours."""
    _require(1 <= every < n, name, n, f"every must lie between 1 and {n - 1}, found {every}")
    source, partner, new = [], [], []
    for i in range(n):
        source.append(i)
        partner.append(i)
        new.append(False)
        if (i + 1) % every == 0 and i + 1 < n:
            source.append(i)
            partner.append(i + 1)
            new.append(True)
    return LayerMap(name, n, tuple(source), partner=tuple(partner), new=tuple(new), mix=mix)


def repeated_blocks(n: int, g: GrowthConfig) -> LayerMap:
    """Visits disjoint blocks several times, written "2:20" (twice) or "2:8x3,9:12" (three times, twice)."""
    name = f"blocks({g.blocks})"
    source, end = [], 0
    for part in g.blocks.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*:\s*(\d+)\s*(?:x\s*(\d+)\s*)?", part)
        _require(match is not None, name, n, f"blocks are written START:STOP or START:STOPxVISITS, found {part!r}")
        assert match is not None
        start, stop, visits = int(match[1]), int(match[2]), int(match[3] or 2)
        _require(start < stop <= n, name, n, f"each block needs START < STOP <= {n}, found {start}:{stop}")
        _require(end <= start, name, n, f"blocks must be disjoint and in order, found {start}:{stop} after layer {end}")
        _require(visits >= 2, name, n, f"each block must be visited at least twice, found {visits}")
        source += [*range(end, start), *tuple(range(start, stop)) * visits]
        end = stop
    return LayerMap(name, n, (*source, *range(end, n)))


def _one_block(name: str, n: int, a: int, b: int) -> LayerMap:
    return LayerMap(name, n, (*range(b), *range(a, b), *range(b, n)))


def midas(n: int, g: GrowthConfig) -> LayerMap:
    """Repeats the middle one of the base's n/b blocks of b layers (arXiv 2409.19044)."""
    name, b = f"midas(b={g.b})", g.b
    _require(1 <= b <= n and n % b == 0, name, n, f"b must divide {n}, found b={b}")
    start = (-(-(n // b) // 2) - 1) * b
    return _one_block(name, n, start, start + b)


def lidas(n: int, g: GrowthConfig) -> LayerMap:
    """Repeats the b layers around the middle one, whatever their block (arXiv 2512.08819)."""
    name, b = f"lidas(b={g.b})", g.b
    _require(1 <= b <= n, name, n, f"b must lie between 1 and {n}, found b={b}")
    start = -(-n // 2) - -(-b // 2)
    return _one_block(name, n, start, start + b)


def stack_last(n: int, g: GrowthConfig) -> LayerMap:
    """Repeats the last b layers (gradual stacking)."""
    name, b = f"stack_last(b={g.b})", g.b
    _require(1 <= b <= n, name, n, f"b must lie between 1 and {n}, found b={b}")
    return _one_block(name, n, n - b, n)


def split_twins(n: int, g: GrowthConfig) -> LayerMap:
    """Makes twins of each layer of [a..b): i, i with scales alpha and 1 - alpha."""
    name = f"split(a={g.a}, b={g.b}, alpha={g.alpha:g})"
    _require(0 <= g.alpha <= 1, name, n, f"alpha must lie between 0 and 1, found {g.alpha:g}")
    return _twins(name, n, g, (g.alpha, 1 - g.alpha))


def split_sqrt_twins(n: int, g: GrowthConfig) -> LayerMap:
    """Makes twins of each layer of [a..b): i, i, both scaled by 2^-1/2."""
    return _twins(f"split_sqrt(a={g.a}, b={g.b})", n, g, (0.5**0.5, 0.5**0.5))


def _twins(name: str, n: int, g: GrowthConfig, scales: tuple[float, float]) -> LayerMap:
    _require(0 <= g.a < g.b <= n, name, n, f"0 <= a < b <= {n} must hold, found a={g.a} b={g.b}")
    doubled = range(g.a, g.b)
    source = [i for i in range(n) for _ in range(1 + (i in doubled))]
    scale = [s for i in range(n) for s in (scales if i in doubled else (1.0,))]
    return LayerMap(name, n, tuple(source), tuple(scale))


def gated(n: int, g: GrowthConfig) -> LayerMap:
    """Scales by `beta` what the new layers of another operator add: 0 keeps the base's outputs, 1 is the operator."""
    inner = _of("gated", n, g)
    name = f"gated({inner.operator}, beta={g.beta:g})"
    _require(0 <= g.beta <= 1, name, n, f"beta must lie between 0 and 1, found {g.beta:g}")
    scale = tuple(s * g.beta if new else s for s, new in zip(inner.scale, inner.new, strict=True))
    return dataclasses.replace(inner, operator=name, scale=scale)


def tied(n: int, g: GrowthConfig) -> LayerMap:
    """Shares weights between the layers of one source while they train: compute without parameters, a control."""
    inner = _of("tied", n, g)
    name = f"tied({inner.operator})"
    _require(inner.copies_only, name, n, "only plain copies can share weights")
    return dataclasses.replace(inner, operator=name, tied=True)


def _of(operator: str, n: int, g: GrowthConfig) -> LayerMap:
    """The layer map of the operator that another one changes."""
    known = [name for name in OPERATORS if name not in ("gated", "tied", "identity", "search")]
    if g.of not in known:
        raise UserError(f"growth.of of {operator} must be one of {', '.join(known)}, found {g.of!r}.")
    return OPERATORS[g.of](n, g)


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
    "blocks": repeated_blocks,
    "midas": midas,
    "lidas": lidas,
    "stack_last": stack_last,
    "split": split_twins,
    "split_sqrt": split_sqrt_twins,
    "linear_lesa": linear_lesa,
    "gated": gated,
    "tied": tied,
}


def beside_map(growth: GrowthConfig, base_layers: int) -> LayerMap | None:
    """The other cut that a run compares its growth with; None if there is none.

    Raises:
      UserError: blocks that do not fit the base.
    """
    return repeated_blocks(base_layers, GrowthConfig(blocks=growth.beside)) if growth.beside else None


def composed(first: LayerMap, second: LayerMap) -> LayerMap:
    """The layer map that equals growth by `first` and then by `second`.

    Raises:
      UserError: `second` grows what `first` made of two layers, or makes one of two that `first` scaled differently.
    """
    if second.is_identity and second.layers == first.layers:
        return first
    if first.is_identity:
        return second
    pairs = list(zip(second.source, second.partner, strict=True))
    if first.partner != first.source or any(first.scale[i] != first.scale[j] for i, j in pairs):
        raise UserError(f"growth by {first.operator} and then by {second.operator} is no single layer map.")
    return LayerMap(
        f"{first.operator}, then {second.operator}",
        first.base_layers,
        source=tuple(first.source[i] for i in second.source),
        scale=tuple(first.scale[i] * s for i, s in zip(second.source, second.scale, strict=True)),
        partner=tuple(first.source[i] for i in second.partner),
        new=tuple(first.new[i] or added for i, added in zip(second.source, second.new, strict=True)),
        mix=second.mix,
        noise=tuple(first.noise[i] or own for i, own in zip(second.source, second.noise, strict=True)),
    )


def operator_map(layers: int, growth: GrowthConfig) -> LayerMap:
    """Builds the layer map of one application of an operator to a model of `layers` layers.

    Raises:
      UserError: unknown operator, or its numbers do not fit the model.
    """
    if growth.operator == "search":
        raise UserError(
            "growth.operator=search is for train alone; elsewhere give operator slices, as the command search prints."
        )
    if growth.operator not in OPERATORS:
        raise UserError(f"growth.operator must be one of {', '.join(OPERATORS)}, found {growth.operator!r}.")
    return OPERATORS[growth.operator](layers, growth)


def make_layer_map(base_layers: int, growth: GrowthConfig) -> LayerMap:
    """Builds the layer map from a base of `base_layers` layers to what a run ends with, scheduled growth included.

    Raises:
      UserError: unknown operator, or its numbers do not fit the base.
    """
    total = operator_map(base_layers, growth)
    for _ in growth.schedule:
        total = composed(total, operator_map(total.layers, growth))
    if not growth.experts:
        return total
    growth.check_experts()
    g = growth
    made = Upcycling(g.experts, g.top_k, g.granularity, g.routing == "renormalised", g.redrawn, g.jitter)
    return dataclasses.replace(total, operator=f"{total.operator}, {made}", experts=made)
