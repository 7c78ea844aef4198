"""mergekit as the oracle of merges, and small models that differ as fine-tuned ones do."""

import pathlib

import torch
import yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
from safetensors.torch import load_file

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.merging.recipe import read_recipe
from solar_jax.merging.view import merged
from tests.conftest import hf_model, moved, save_hf

LAYERS = 4
Tensors = dict[str, torch.Tensor]


def write_models(root: pathlib.Path, dtype: str, **changes: int) -> dict[str, str]:
    """A base, three models near it (a, b, c), and one that has nothing to do with them (u)."""
    changes = {"num_hidden_layers": LAYERS} | changes
    found = {"base": hf_model(**changes)}
    found |= {n: moved(hf_model(**changes), i + 1) for i, n in enumerate("abc")}
    found["u"] = hf_model(seed=9, **changes)
    return {name: str(save_hf(model.to(getattr(torch, dtype)), root / name)) for name, model in found.items()}


def tensors(folder: pathlib.Path) -> Tensors:
    found: Tensors = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def theirs(text: str, out: pathlib.Path) -> Tensors:
    """mergekit's merge."""
    run_merge(MergeConfiguration.model_validate(yaml.safe_load(text)), str(out), MergeOptions(quiet=True))
    return tensors(out)


def ours(text: str, out: pathlib.Path) -> Tensors:
    out.with_suffix(".yml").write_text(text)
    convert_checkpoint(merged(read_recipe(out.with_suffix(".yml"))), Target(out, max_shard_size="100KB"), "merge")
    return tensors(out)


def both(text: str, folder: pathlib.Path) -> tuple[Tensors, Tensors]:
    """Our merge and mergekit's of one recipe: same names, shapes and dtypes."""
    a, b = ours(text, folder / "ours"), theirs(text, folder / "theirs")
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert (x.dtype, x.shape) == (b[name].dtype, b[name].shape), name
    return a, b


def differing(a: Tensors, b: Tensors) -> int:
    """How many elements differ."""
    return sum(int((a[name] != b[name]).sum()) for name in a)
