"""mergekit reads the same recipes: what each method writes, by bits or within a rounding."""

import pathlib
from typing import Any

import mergekit.sparsify
import numpy as np
import pytest
import torch
import yaml

from solar_jax.merging.recipe import recipe_of
from solar_jax.merging.sparsify import random_keep
from solar_jax.merging.view import merged
from tests.merging.oracle import Tensors, both, differing, tensors, write_models

pytestmark = pytest.mark.slow  # mergekit imports for ten seconds
DTYPES = ("bfloat16", "float32")
Models = dict[str, str]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Models]:
    root = tmp_path_factory.mktemp("models")
    return {dtype: write_models(root / dtype, dtype) for dtype in DTYPES}


def models(folders: Models, weights: dict[str, float], **more: Any) -> list[dict[str, Any]]:
    return [{"model": folders[name], "parameters": {"weight": w, **more}} for name, w in weights.items()]


def plain(folders: Models, names: str) -> list[dict[str, Any]]:
    return [{"model": folders[name]} for name in names]


def source(folders: Models, name: str, start: int, stop: int, **parameters: Any) -> dict[str, Any]:
    return {"sources": [{"model": folders[name], "layer_range": [start, stop], "parameters": parameters}]}


_SCALE = [{"filter": "o_proj", "value": 0.3}, {"filter": "down_proj", "value": 0.0}, {"value": 1.0}]
_GRADIENT = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]}, {"filter": "mlp", "value": [1, 0.5, 0.7, 0.3, 0]},
    {"value": 0.5},
]  # fmt: skip

# Recipes whose result is mergekit's to the last bit.
BITS = {
    "passthrough": lambda f: {
        "merge_method": "passthrough", "slices": [source(f, "a", 0, 3), source(f, "b", 1, 4, scale=_SCALE)],
    },
    "linear": lambda f: {"merge_method": "linear", "models": models(f, {"a": 0.4, "b": 0.6})},
    "linear of five": lambda f: {
        "merge_method": "linear", "models": models(f, {"a": 0.2, "b": 0.3, "c": 0.77, "u": -0.13, "base": 1.1}),
    },
    "linear, not normalised": lambda f: {
        "merge_method": "linear", "models": models(f, {"a": 1, "u": -1}), "parameters": {"normalize": False},
    },
    "slerp": lambda f: {
        "merge_method": "slerp", "base_model": f["b"], "models": plain(f, "ab"), "parameters": {"t": _GRADIENT},
    },
    "slerp of ranges": lambda f: {
        "merge_method": "slerp", "base_model": f["a"], "parameters": {"t": [0.1, "9e-1"]},
        "slices": [
            {"sources": [source(f, n, 0, 3)["sources"][0] for n in "ab"]},
            {"sources": [source(f, n, 2, 3)["sources"][0] for n in "ab"], "parameters": {"t": [0.3, 0.6]}},
        ],
    },
    "task_arithmetic": lambda f: {
        "merge_method": "task_arithmetic", "base_model": f["base"], "parameters": {"lambda": 0.7},
        "models": models(f, {"a": 0.7, "b": 0.5, "c": 0.33}),
    },
    "task_arithmetic, normalised": lambda f: {
        "merge_method": "task_arithmetic", "base_model": f["base"], "models": models(f, {"a": 0.7, "b": 0.5}),
        "parameters": {"normalize": True},
    },
    "ties at density 1": lambda f: {
        "merge_method": "ties", "base_model": f["base"], "models": models(f, {"a": 0.7, "b": 0.5, "u": -0.33}),
        "parameters": {"int8_mask": True},
    },
    "dare_ties at density 1": lambda f: {
        "merge_method": "dare_ties", "base_model": f["base"], "models": models(f, {"a": 0.7, "b": 0.5}),
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", BITS)
def test_every_bit_is_mergekits(folders, name, dtype, tmp_path):
    a, b = both(yaml.safe_dump(BITS[name](folders[dtype])), tmp_path)
    assert not differing(a, b)


@pytest.mark.parametrize("name", ["passthrough", "slerp", "ties at density 1"])
def test_every_bit_is_mergekits_where_the_head_is_the_embedding(name, tmp_path):
    f = write_models(tmp_path / "models", "bfloat16", tie_word_embeddings=True)
    a, b = both(yaml.safe_dump(BITS[name](f)), tmp_path)
    assert "lm_head.weight" not in a
    assert not differing(a, b)


@pytest.mark.parametrize("changed", [{"dtype": "float32"}, {"dtype": "float32", "out_dtype": "bfloat16"}])
def test_the_dtypes_of_arithmetic_and_result_are_the_recipes(folders, changed, tmp_path):
    recipe = BITS["task_arithmetic"](folders["bfloat16"]) | changed
    a, b = both(yaml.safe_dump(recipe), tmp_path)
    assert not differing(a, b)


def _ties(f: Models, weights: dict[str, float], density: float, **parameters: Any) -> str:
    return yaml.safe_dump(
        {
            "merge_method": "ties",
            "base_model": f["base"],
            "models": models(f, weights, density=density),
            "parameters": parameters,
        }
    )


@pytest.mark.parametrize("density", [0.01, 0.53, 0.9])
def test_ties_keeps_the_same_elements_where_magnitudes_are_distinct(folders, density, tmp_path):
    """float32 differences hardly ever have equal magnitudes."""
    a, b = both(_ties(folders["float32"], {"a": 0.7, "b": 0.5, "u": 0.33}, density), tmp_path)
    assert not differing(a, b)


def test_bfloat16_ties_keeps_as_many_and_differs_only_among_equal_magnitudes(folders, tmp_path):
    """With one model, weight 1 and no normalisation, what is kept of a difference is what the result adds."""
    f, density = folders["bfloat16"], 0.37
    a, b = both(_ties(f, {"a": 1.0}, density, normalize=False), tmp_path)
    base, other = (_read(f[name]) for name in ("base", "a"))
    apart = 0
    for name, x in base.items():
        delta = (other[name] - x).abs().float()
        threshold = delta.reshape(-1).sort(descending=True).values[max(1, int(density * x.numel())) - 1]
        different = a[name] != b[name]
        assert torch.all(delta[different] == threshold)
        # A difference may be too small to change the base; of those that change it as many are kept, ties apart.
        kept = [int((y[name] != x).sum()) for y in (a, b)]
        assert abs(kept[0] - kept[1]) <= int(((delta == threshold) & (other[name] == x)).sum())
        apart += int(different.sum())
    assert apart  # or nothing was seen of equal magnitudes


def _read(folder: str) -> Tensors:
    return tensors(pathlib.Path(folder))


NEAR = {
    "slerp of unrelated models": lambda f: {
        "merge_method": "slerp", "base_model": f["a"], "models": plain(f, "au"), "parameters": {"t": 0.3},
    },
    "nuslerp": lambda f: {"merge_method": "nuslerp", "models": models(f, {"a": 0.7, "u": 0.5})},
    "nuslerp of parallel models": lambda f: {"merge_method": "nuslerp", "models": models(f, {"a": 0.7, "b": 0.5})},
    "nuslerp from a base": lambda f: {
        "merge_method": "nuslerp", "base_model": f["base"], "models": models(f, {"a": 0.7, "b": 0.5}),
    },
    "nuslerp by row": lambda f: {
        "merge_method": "nuslerp", "models": models(f, {"a": 0.7, "u": 0.5}), "parameters": {"nuslerp_flatten": False},
    },
    "nuslerp by column": lambda f: {
        "merge_method": "nuslerp", "models": models(f, {"a": 0.7, "u": 0.5}),
        "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    },
    "model_stock": lambda f: {"merge_method": "model_stock", "base_model": f["base"], "models": plain(f, "abc")},
    "model_stock of unrelated models, by row": lambda f: {
        "merge_method": "model_stock", "base_model": f["base"], "models": plain(f, "abu"),
        "parameters": {"filter_wise": True},
    },
    "ties, rescaled": lambda f: {
        "merge_method": "ties", "base_model": f["base"], "models": models(f, {"a": 0.7, "u": 0.5}),
        "parameters": {"rescale": True},
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NEAR)
def test_sums_of_many_elements_cost_one_rounding_of_the_larger_input(folders, name, dtype, tmp_path):
    recipe = NEAR[name](folders[dtype])
    a, b = both(yaml.safe_dump(recipe), tmp_path)
    named = {one["model"] for one in recipe["models"]} | ({recipe["base_model"]} if "base_model" in recipe else set())
    inputs = [_read(folder) for folder in named]
    for key, x in a.items():
        larger = torch.stack([one[key].float().abs() for one in inputs]).amax(dim=0)
        step = torch.exp2(torch.floor(torch.log2(larger.clamp(min=1e-30))) - 7)
        if dtype == "float32":
            step = larger.amax() * 2.0**-20
        assert torch.all((x.float() - b[key].float()).abs() <= step), key


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_dare_is_mergekits_arithmetic_of_our_mask(folders, method, rescale, dtype, tmp_path, monkeypatch):
    """mergekit's random numbers are torch's; it is given ours, read back from a merge of one model."""
    f, density = folders[dtype], 0.6
    recipe = {
        "merge_method": method, "base_model": f["base"], "models": models(f, {"a": 0.7, "b": 0.5}, density=density),
        "parameters": {"rescale": rescale}, "random_seed": 7,
    }  # fmt: skip
    masks = _masks(recipe)
    real = mergekit.sparsify.bernoulli

    def by_delta(tensor: torch.Tensor, density: float, rescale_norm: Any = None) -> torch.Tensor:
        name, which = _whose(tensor, deltas)
        monkeypatch.setattr(torch, "bernoulli", lambda p, **_: masks[name][which].to(p.dtype))
        return real(tensor, density, rescale_norm)

    base = _read(f["base"])
    deltas = {(key, i): _read(f[n])[key] - base[key] for key in base for i, n in enumerate("ab")}
    monkeypatch.setattr(mergekit.sparsify, "bernoulli", by_delta)
    a, b = both(yaml.safe_dump(recipe), tmp_path)
    if rescale and dtype == "float32":  # sums of many elements depend on their order, which bfloat16 rounds away
        assert all(torch.allclose(a[name], b[name], rtol=0, atol=1e-6) for name in a)
    else:
        assert not differing(a, b)
    kept = sum(int(m.sum()) for pair in masks.values() for m in pair)
    total = sum(m.numel() for pair in masks.values() for m in pair)
    assert abs(kept - density * total) < 4 * np.sqrt(density * (1 - density) * total)


def _masks(recipe: dict[str, Any]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """The masks of both models' differences, by tensor."""
    c = merged(recipe_of(recipe, "test"))
    found = {}
    for name, shape in c.shape_of.items():
        rows, columns = slice(0, shape[0]), int(np.prod(shape[1:]))
        keeps = [random_keep(0.6, 7, name, i, columns) for i in (0, 1)]
        x = np.zeros((shape[0], columns), np.float32)
        one, two = (torch.from_numpy(keep(x, rows).reshape(shape)) for keep in keeps)
        found[name] = (one, two)
    return found


def _whose(tensor: torch.Tensor, deltas: dict[tuple[str, int], torch.Tensor]) -> tuple[str, int]:
    return next(key for key, delta in deltas.items() if delta.shape == tensor.shape and torch.equal(delta, tensor))
