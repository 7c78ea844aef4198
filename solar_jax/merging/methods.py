"""Merge methods: a table of what each takes and computes. The arithmetic follows mergekit's to the last bit where sums
of many elements do not enter, and to their rounding elsewhere; papers are named with each method."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from solar_jax.errors import UserError
from solar_jax.merging import sparsify
from solar_jax.merging.parameters import Parameter, Values
from solar_jax.merging.sparsify import Sparse
from solar_jax.merging.tensors import Round, Stack, dot

Pieces = list[np.ndarray]  # one array [r, columns] float32 of each input
PARALLEL = 0.9995  # |cosine| above which slerp interpolates linearly
_TINY = 1e-8


@dataclasses.dataclass(frozen=True)
class Method:
    """A merge method.

    `prepare` looks at the full tensors, a block at a time, and returns what `combine` needs of them; None if each
    element is merged by itself. Both are given the tensor's name for what is random.
    """

    combine: Callable[[Stack, Pieces, slice, Values, Any], np.ndarray]
    parameters: Mapping[str, Parameter]
    prepare: Callable[[Stack, Values, str, int], Any] | None = None  # (inputs, parameters, tensor's name, seed)
    base: str = "ignored"  # "ignored", "optional" or "required"
    inputs: tuple[int, float] = (1, math.inf)  # least and most, with the base
    others: tuple[int, float] = (0, math.inf)  # least and most, without it
    check: Callable[[Values], None] = lambda values: None


# ---- Linear: weighted mean (Wortsman et al. 2022, model soups) -------------------------------------------------------
def _linear(stack: Stack, xs: Pieces, rows: slice, values: Values, _: Any) -> np.ndarray:
    weights = [np.float32(of["weight"]) for of in values.of_input]
    total = xs[0] * weights[0]
    for x, weight in zip(xs[1:], weights[1:], strict=True):
        # One rounding for product and sum, as the fused multiply-add that torch uses; the product is exact in float64.
        product = x.astype(np.float64)
        product *= np.float64(weight)
        product += total
        total = product.astype(np.float32)
    if values.shared["normalize"]:
        total /= _float32_sum(weights)
    return total


def _float32_sum(weights: Sequence[np.float32]) -> np.float32:
    """Adds up as torch does: four running sums, then those."""
    sums = [np.float32(0)] * 4
    full = len(weights) // 4 * 4
    for i, weight in enumerate(weights):
        sums[i % 4 if i < full else 0] += weight
    return ((sums[0] + sums[1]) + sums[2]) + sums[3]


def _nonzero_total(values: Values) -> None:
    weights = [of["weight"] for of in values.of_input if "weight" in of]
    if values.shared["normalize"] and abs(math.fsum(weights)) < _TINY:
        raise UserError(f"weights must not sum to 0 where they are normalised, found {weights}.")


# ---- Spherical interpolation -----------------------------------------------------------------------------------------
def _pair(stack: Stack) -> tuple[int, int]:
    """The indices of the inputs at t = 0 and t = 1."""
    assert stack.base is not None
    return stack.base, 1 - stack.base


def _slerp_prepare(stack: Stack, values: Values, name: str, seed: int) -> tuple[np.float32, np.float32]:
    """The factors of both inputs, from the angle between the flattened tensors."""
    a, b = _pair(stack)
    products = stack.reduce(lambda rows, xs: (dot(xs[a], xs[a]), dot(xs[b], xs[b]), dot(xs[a], xs[b])))
    norms = [math.sqrt(x) for x in products[:2]]
    cosine = products[2] / math.prod(x if x > _TINY else 1.0 for x in norms)
    cosine = np.float32(min(max(cosine, -1.0), 1.0))
    t = np.float32(values.shared["t"])
    if abs(cosine) > np.float32(PARALLEL):
        return np.float32(1) - t, t
    angle = np.arccos(cosine)
    return np.sin((np.float32(1) - t) * angle) / np.sin(angle), np.sin(t * angle) / np.sin(angle)


def _slerp(stack: Stack, xs: Pieces, rows: slice, values: Values, factors: tuple[np.float32, np.float32]) -> np.ndarray:
    a, b = _pair(stack)
    return factors[0] * xs[a] + factors[1] * xs[b]


@dataclasses.dataclass(frozen=True)
class _Angles:
    """Norms and cosines of a pair: numbers, or [columns]; None: each row has its own."""

    cosine: np.ndarray | None


def _nuslerp_axis(stack: Stack, values: Values) -> int | None:
    """The axis that angles are taken along; None for the flattened tensor."""
    if values.shared["nuslerp_flatten"] or len(stack.shape) == 1:
        return None
    return 0 if values.shared["nuslerp_row_wise"] else 1


def _nuslerp_inputs(stack: Stack, xs: Pieces) -> Pieces:
    pair = [xs[i] for i in stack.others]
    return pair if stack.base is None else [stack.round(x - xs[stack.base]) for x in pair]


def _sum(x: np.ndarray, axis: int | None) -> np.ndarray:
    return np.sum(x, axis=axis, dtype=np.float64, keepdims=True)


def _norm(squares: np.ndarray, r: Round) -> np.ndarray:
    return np.maximum(r(np.sqrt(squares).astype(np.float32)), np.float32(1e-7))


def _nuslerp_prepare(stack: Stack, values: Values, name: str, seed: int) -> _Angles:
    axis, r = _nuslerp_axis(stack, values), stack.round
    if axis == 1:
        return _Angles(None)

    def squares(rows: slice, xs: Pieces) -> list[np.ndarray]:
        return [_sum(np.square(x), axis) for x in _nuslerp_inputs(stack, xs)]

    norms = [_norm(x, r) for x in stack.reduce(squares)]

    def products(rows: slice, xs: Pieces) -> list[np.ndarray]:
        a, b = (r(x / norm) for x, norm in zip(_nuslerp_inputs(stack, xs), norms, strict=True))
        return [_sum(r(a * b), axis)]

    return _Angles(_cosine(stack.reduce(products)[0], r))


def _cosine(total: np.ndarray, r: Round) -> np.ndarray:
    return np.clip(r(total.astype(np.float32)), -1, 1)


def _nuslerp(stack: Stack, xs: Pieces, rows: slice, values: Values, angles: _Angles) -> np.ndarray:
    r = stack.round
    a, b = _nuslerp_inputs(stack, xs)
    cosine = angles.cosine
    if cosine is None:
        units = [r(x / _norm(_sum(np.square(x), 1), r)) for x in (a, b)]
        cosine = _cosine(_sum(r(units[0] * units[1]), 1), r)
    weights = [values.of_input[i]["weight"] for i in stack.others]
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    s, t = np.float32(1 - t), np.float32(t)
    parallel = r(np.float32(1) - r(np.square(cosine))) <= np.float32(_TINY**2)
    angle = r(np.arccos(np.where(parallel, np.float32(0), cosine)))
    spherical = r(r(r(np.sin(r(s * angle))) * a) + r(r(np.sin(r(t * angle))) * b))
    spherical = r(spherical / r(np.sin(angle)))
    result = np.where(parallel, r(r(s * a) + r(t * b)), spherical)
    return result if stack.base is None else xs[stack.base] + result


# ---- Differences from a base: task arithmetic (Ilharco 2022), TIES (Yadav 2023), DARE (Yu 2023) ---------------------
def _base(stack: Stack, xs: Pieces) -> np.ndarray:
    assert stack.base is not None
    return xs[stack.base]


def _differences(stack: Stack, xs: Pieces) -> Pieces:
    base = _base(stack, xs)
    return [stack.round(xs[i] - base) for i in stack.others]


def _sparse(stack: Stack, values: Values, keeps: list[sparsify.Keep | None]) -> list[Sparse]:
    if values.shared["rescale"]:
        return sparsify.rescaled(stack, keeps, lambda xs: _differences(stack, xs))
    return [Sparse(keep) for keep in keeps]


def _densities(stack: Stack, values: Values) -> list[float]:
    return [values.of_input[i]["density"] for i in stack.others]


def _ties_prepare(stack: Stack, values: Values, name: str, seed: int) -> list[Sparse]:
    keeps = sparsify.largest(stack, _densities(stack, values), lambda xs: _differences(stack, xs))
    return _sparse(stack, values, keeps)


def _dare_prepare(stack: Stack, values: Values, name: str, seed: int) -> list[Sparse]:
    keeps = [
        None if density >= 1 else sparsify.random_keep(density, seed, name, i, stack.columns)
        for i, density in zip(stack.others, _densities(stack, values), strict=True)
    ]
    return _sparse(stack, values, keeps)


def _arithmetic(elect: bool) -> Callable[[Stack, Pieces, slice, Values, Any], np.ndarray]:
    """Adds weighted differences to the base; with `elect`, only those of the sign that the sum of all has."""

    def combine(stack: Stack, xs: Pieces, rows: slice, values: Values, sparse: list[Sparse] | None) -> np.ndarray:
        r, base = stack.round, _base(stack, xs)
        found = _differences(stack, xs)
        if not found:
            return base
        if sparse:
            found = [one(stack, x, rows) for one, x in zip(sparse, found, strict=True)]
        weights = [r(np.array([values.of_input[i]["weight"]], np.float32))[0] for i in stack.others]
        found = [r(x * weight) for x, weight in zip(found, weights, strict=True)]
        total = _added(found)
        divisor: Any
        if elect:
            positive = r(total.copy()) >= 0
            masks = [np.where(positive, x > 0, x < 0) for x in found]
            total = r(_added([x * mask for x, mask in zip(found, masks, strict=True)]))
            divisor = r(_added([mask * weight for mask, weight in zip(masks, weights, strict=True)]))
            divisor[divisor == 0] = 1
        else:
            total = r(total)
            divisor = r(np.array([_float32_sum(weights)], np.float32))
        if values.shared["normalize"]:
            total = r(total / divisor)
        if values.shared["lambda"] != 1:
            total = r(total * np.float32(values.shared["lambda"]))
        return base + total

    return combine


def _added(xs: Pieces) -> np.ndarray:
    total = np.zeros(1, np.float32) + xs[0]
    for x in xs[1:]:
        total += x
    return total


# ---- Model stock (Jang et al. 2024) ----------------------------------------------------------------------------------
def _stock_sums(stack: Stack, xs: Pieces, axis: int | None) -> list[np.ndarray]:
    """Squares of each difference, then products of each pair."""
    found = _differences(stack, xs)
    pairs = [(i, j) for i in range(len(found)) for j in range(i + 1, len(found))]
    return [_sum(np.square(x), axis) for x in found] + [_sum(stack.round(found[i] * found[j]), axis) for i, j in pairs]


def _stock_ratio(stack: Stack, sums: Sequence[np.ndarray]) -> np.ndarray:
    r, n = stack.round, len(stack.others)
    norms = [r(np.sqrt(x).astype(np.float32)) for x in sums[:n]]
    pairs = [(i, j) for i in range(n) for j in range(i + 1, n)]
    cosines = [
        np.clip(r(r(x.astype(np.float32)) / np.maximum(r(norms[i] * norms[j]), np.float32(1e-6))), -1, 1)
        for (i, j), x in zip(pairs, sums[n:], strict=True)
    ]
    cosine = r(np.mean(cosines, axis=0, dtype=np.float32))
    below = r(np.float32(1) + r(np.float32(n - 1) * cosine))
    singular = np.abs(below) < np.float32(1e-6)
    return np.where(singular, np.float32(0), r(r(np.float32(n) * cosine) / np.where(singular, np.float32(1), below)))


def _stock_prepare(stack: Stack, values: Values, name: str, seed: int) -> np.ndarray | None:
    if values.shared["filter_wise"] and len(stack.shape) > 1:
        return None  # each row has its own
    return _stock_ratio(stack, stack.reduce(lambda rows, xs: _stock_sums(stack, xs, None)))


def _stock(stack: Stack, xs: Pieces, rows: slice, values: Values, ratio: np.ndarray | None) -> np.ndarray:
    r, base = stack.round, _base(stack, xs)
    if ratio is None:
        ratio = _stock_ratio(stack, _stock_sums(stack, xs, 1))
    mean = xs[stack.others[0]].copy()
    for i in stack.others[1:]:
        mean = r(mean + xs[i])
    mean = r(mean / np.float32(len(stack.others)))
    return r(ratio * mean) + r(r(np.float32(1) - ratio) * base)


def _passthrough(stack: Stack, xs: Pieces, rows: slice, values: Values, _: Any) -> np.ndarray:
    scale = values.of_input[0]["scale"]
    return xs[0] if scale is None else xs[0] * np.float32(scale)


_FLAG = Parameter(bool, "shared", False)
_WEIGHT = Parameter(float, "non_base")


def _task(elect: bool, prepare: Any, normalize: bool, rescale: bool) -> Method:
    return Method(
        _arithmetic(elect),
        {
            "weight": _WEIGHT,
            "density": Parameter(float, "non_base", 1.0, 0.0, 1.0),
            "normalize": Parameter(bool, "shared", normalize),
            "rescale": Parameter(bool, "shared", rescale),
            "lambda": Parameter(float, "shared", 1.0),
            "int8_mask": _FLAG,  # how mergekit stores its mask; no value depends on it
        },
        prepare,
        base="required",
        check=(lambda values: None) if elect else _nonzero_total,
    )


METHODS: dict[str, Method] = {
    "linear": Method(
        _linear,
        {"weight": Parameter(float, "input"), "normalize": Parameter(bool, "shared", True)},
        check=_nonzero_total,
    ),
    "slerp": Method(_slerp, {"t": Parameter(float, "shared")}, _slerp_prepare, base="required", inputs=(2, 2)),
    "nuslerp": Method(
        _nuslerp,
        {
            "weight": _WEIGHT,
            "nuslerp_row_wise": _FLAG,
            "nuslerp_flatten": Parameter(bool, "shared", True),
        },
        _nuslerp_prepare,
        base="optional",
        others=(2, 2),
    ),
    "task_arithmetic": _task(elect=False, prepare=None, normalize=False, rescale=False),
    "ties": _task(elect=True, prepare=_ties_prepare, normalize=True, rescale=False),
    "dare_linear": _task(elect=False, prepare=_dare_prepare, normalize=False, rescale=True),
    "dare_ties": _task(elect=True, prepare=_dare_prepare, normalize=False, rescale=True),
    "model_stock": Method(_stock, {"filter_wise": _FLAG}, _stock_prepare, base="required", inputs=(3, math.inf)),
    "passthrough": Method(_passthrough, {"scale": Parameter(float, "input", None)}, inputs=(1, 1)),
}
