"""A merge is a checkpoint like any other: from and to every format, resumed, certified, with all its parents."""

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from solar_jax.checkpoints import write_hf
from solar_jax.checkpoints.adapters import lows_of, write_peft
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import LoraConfig
from solar_jax.errors import UserError
from solar_jax.merging.recipe import read_recipe, recipe_of, short_recipe
from solar_jax.merging.view import merged
from solar_jax.storage import paths
from tests.conftest import hf_model, moved, save_hf

LAYERS = 3


def near(folder: pathlib.Path, seed: int) -> pathlib.Path:
    """A model near the one of seed 0."""
    return save_hf(moved(hf_model(num_hidden_layers=LAYERS), seed, 1e-3 if seed else 0.0), folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    found = {name: near(root / name, seed) for seed, name in enumerate(("base", "a", "b"))}
    found["deep"] = save_hf(hf_model(num_hidden_layers=LAYERS + 1), root / "deep")
    found["wide"] = save_hf(hf_model(num_hidden_layers=LAYERS, intermediate_size=128), root / "wide")
    found["mistral"] = save_hf(hf_model("mistral", num_hidden_layers=LAYERS), root / "mistral")
    return {name: str(folder) for name, folder in found.items()}


def content(folders: dict[str, str], **changes: Any) -> dict[str, Any]:
    models = [{"model": folders[name], "parameters": {"weight": w}} for name, w in (("a", 0.4), ("b", 0.6))]
    return {"merge_method": "linear", "models": models} | changes


def ties(folders: dict[str, str], **changes: Any) -> dict[str, Any]:
    models = [
        {"model": folders[name], "parameters": {"weight": w, "density": 0.3}} for name, w in (("a", 0.4), ("b", 0.6))
    ]
    return {"merge_method": "ties", "base_model": folders["base"], "models": models} | changes


def view(found: dict[str, Any]) -> Checkpoint:
    return merged(recipe_of(found, "merge.yml"))


def same(a: Checkpoint, b: Checkpoint) -> None:
    assert a.shape_of == b.shape_of
    for name in a.shape_of:
        np.testing.assert_array_equal(a.read(name), b.read(name), err_msg=name)


@pytest.mark.parametrize("make", [content, ties])
def test_inputs_and_results_may_be_of_any_format(folders, make, tmp_path):
    expected = view(make(folders))
    own = {}
    for name in ("base", "a", "b"):
        convert_checkpoint(open_checkpoint(folders[name]), Target(tmp_path / name, "orbax"), "convert")
        own[name] = str(tmp_path / name)
    same(view(make(own)), expected)
    convert_checkpoint(view(make(own | {"a": folders["a"]})), Target(tmp_path / "out", "orbax"), "merge")
    same(open_checkpoint(str(tmp_path / "out")), expected)


@pytest.mark.slow  # an emulated bucket
@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_merge_goes_from_a_bucket_to_a_bucket(folders, bucket, form):
    for name in ("base", "a", "b"):
        if not paths.path(f"{bucket}/{name}/config.json").exists():
            convert_checkpoint(open_checkpoint(folders[name]), Target(paths.path(f"{bucket}/{name}")), "convert")
    own = {name: f"{bucket}/{name}" for name in ("base", "a", "b")}
    convert_checkpoint(view(ties(own)), Target(paths.path(f"{bucket}/{form}"), form), "merge")
    same(open_checkpoint(f"{bucket}/{form}"), view(ties(folders)))


def test_rows_are_the_same_however_a_tensor_is_read(folders):
    """Meshes read rows; statistics are still those of the full tensor."""
    c = view(ties(folders))
    for name in ("model.layers.1.mlp.up_proj.weight", "model.norm.weight"):
        whole, fresh = c.read(name), view(ties(folders))
        parts = [fresh.read(name, slice(i, i + 5)) for i in range(0, len(whole), 5)]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    leaf = load_params(c)["layers"]["up_proj"]
    np.testing.assert_array_equal(leaf[1], c.read("model.layers.1.mlp.up_proj.weight").T)


def test_each_layer_has_statistics_of_its_own(folders):
    """Statistics over the stacked array would keep 30 % of all layers' elements, not of each layer's."""
    models = [{"model": folders["a"], "parameters": {"weight": 1.0, "density": 0.3}}]
    c = view({"merge_method": "ties", "base_model": folders["base"], "models": models})
    base = open_checkpoint(folders["base"])
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        x = base.read(name)
        assert (c.read(name) != x).sum() == int(0.3 * x.size)


def test_dare_keeps_the_same_elements_again_and_others_with_another_seed(folders):
    found = ties(folders, merge_method="dare_ties", random_seed=3)
    same(view(found), view(found))
    name = "model.layers.1.mlp.up_proj.weight"
    a, b = (view(found | {"random_seed": seed}).read(name) for seed in (3, 4))
    assert (a != b).any()


def test_an_adapter_is_applied_to_the_model_before_it(folders, tmp_path):
    c, lora = open_checkpoint(folders["a"]), LoraConfig(rank=2, alpha=4.0, targets=("q", "down"))
    rng = np.random.default_rng(0)
    sizes = {"q": ((64, 2), (2, 96)), "down": ((96, 2), (2, 64))}
    leaves = {
        f"{target}_lora_{part}": rng.standard_normal((LAYERS, *shape), np.float32)
        for target, shapes in sizes.items()
        for part, shape in zip("ab", shapes, strict=True)
    }
    (tmp_path / "adapter").mkdir()
    lows = lows_of(leaves, lora, list(range(LAYERS)))
    write_peft(tmp_path / "adapter", lows, lora, list(range(LAYERS)), folders["a"])
    models = [{"model": f"{folders['a']}+{tmp_path / 'adapter'}", "parameters": {"weight": 1.0}}]
    found = view({"merge_method": "linear", "models": models})
    applied = open_checkpoint(str(tmp_path / "adapter"))
    same(found, applied)
    name = "model.layers.1.self_attn.q_proj.weight"
    assert np.abs(found.read(name) - c.read(name)).max() > 0.1


def test_the_lineage_holds_the_recipe_and_every_parent(folders, tmp_path):
    for name in ("a", "b"):
        convert_checkpoint(open_checkpoint(folders[name]), Target(tmp_path / name), "convert")
    own = {name: str(tmp_path / name) for name in ("a", "b")}
    convert_checkpoint(view(content(own)), Target(tmp_path / "out"), "merge")
    record = json.loads((tmp_path / "out" / "lineage.json").read_text())
    assert record["made_by"] == "merge"
    assert [parent["made_by"] for parent in record["parents"]] == ["convert", "convert"]
    assert record["merge"]["recipe"]["method"] == "linear"
    assert len(record["merge"]["inputs"]) == 2
    assert str(tmp_path) not in json.dumps(record), "a path of this machine"


def test_a_merge_is_certified(folders, tmp_path):
    convert_checkpoint(view(ties(folders)), Target(tmp_path / "out"), "merge", verify=True)
    found = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert max(one["max_abs_difference"] for one in found["logits"]["prompts"]) <= 1e-4
    assert any("arithmetic of a merge" in text for text in found["not_checked"])


def test_a_resumed_merge_keeps_finished_files_but_never_those_of_another_recipe(folders, tmp_path, monkeypatch):
    target = Target(tmp_path / "out", max_shard_size="40KB")

    def stopped(first: int, recipe: dict[str, Any]) -> list[str]:
        done = []
        real = write_hf.write_safetensors

        def write(path: pathlib.Path, *args: Any) -> None:
            if len(done) >= first:
                raise KeyboardInterrupt
            done.append(path.name)
            real(path, *args)

        with monkeypatch.context() as patch:
            patch.setattr(write_hf, "write_safetensors", write)
            patch.setattr(write_hf, "WRITERS", 1)
            with pytest.raises(KeyboardInterrupt):
                convert_checkpoint(view(recipe), target, "merge")
        return done

    other = content(folders, parameters={"normalize": False})
    stopped(3, other)
    first = stopped(3, content(folders))
    assert len(first) == 3, "the other recipe's files are not used"
    again = stopped(3, content(folders))
    assert not set(first) & set(again), "finished files are not written again"
    convert_checkpoint(view(content(folders)), target, "merge")
    same(open_checkpoint(str(target.out)), view(content(folders)))


def test_the_short_form_is_the_recipe(folders):
    pair = [(folders["a"], 0.4), (folders["b"], 0.6)]
    same(merged(short_recipe("linear", pair, None, None, None)), view(content(folders)))
    slerp = {"merge_method": "slerp", "base_model": folders["a"], "parameters": {"t": 0.6},
             "models": [{"model": folders["a"]}, {"model": folders["b"]}]}  # fmt: skip
    same(merged(short_recipe("slerp", pair, None, None, None)), view(slerp))
    same(merged(short_recipe("ties", pair, folders["base"], 0.3, None)), view(ties(folders)))


def test_a_value_that_is_not_finite_is_named(folders, tmp_path):
    for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
        bad = near(tmp_path / np.dtype(dtype).name, 1)
        weights = {name: x.astype(dtype) for name, x in load_file(bad / "model.safetensors").items()}
        weights["model.layers.2.mlp.up_proj.weight"][7, 5] = np.nan
        save_file(weights, bad / "model.safetensors", metadata={"format": "pt"})
        target = Target(tmp_path / "out")
        with pytest.raises(UserError, match=r"model\.layers\.2\.mlp\.up_proj\.weight has a value that is not finite"):
            convert_checkpoint(view(content(folders | {"b": str(bad)})), target, "merge")
        assert not [p for p in tmp_path.iterdir() if "out" in p.name]


# Changes of a sound recipe -> what is said.
REFUSED = {
    "method": (lambda f: content(f, merge_method="magic"), "merge_method must be one of linear, .*found 'magic'"),
    "key": (lambda f: content(f, merge_metod="linear"), "the key 'merge_metod' is not supported"),
    "inner key": (
        lambda f: content(f, models=[{"model": f["a"], "weight": 1}]),
        r"models\[0\]: the key 'weight' is not supported",
    ),
    "parameter": (lambda f: content(f, parameters={"wieght": 1}), "parameters.wieght is unknown; linear has weight"),
    "no weight": (lambda f: content(f, models=[{"model": f["a"]}]), "the parameter weight is missing for model.embed"),
    "no t": (
        lambda f: content(f, merge_method="slerp", base_model=f["a"], parameters={}), "the parameter t is missing",
    ),
    "t with one model": (
        lambda f: {"merge_method": "slerp", "base_model": f["a"],
                   "models": [{"model": f["a"]}, {"model": f["b"], "parameters": {"t": 0.5}}]},
        "parameters.t of slerp is for all models at once",
    ),
    "weights that sum to 0": (
        lambda f: content(f, models=[{"model": f[n], "parameters": {"weight": w}} for n, w in (("a", 1), ("b", -1))]),
        "weights must not sum to 0",
    ),
    "density": (lambda f: ties(f, parameters={"density": 0.5}, models=[
        {"model": f["a"], "parameters": {"weight": 1, "density": 1.2}}]),
        r"density must be a number in \[0, 1\], found 1.2"),
    "weight as text": (
        lambda f: content(f, models=[{"model": f["a"], "parameters": {"weight": "much"}}]),
        "must be a number, found 'much'",
    ),
    "flag": (lambda f: content(f, parameters={"normalize": "sometimes"}), "normalize must be true or false"),
    "range outside": (
        lambda f: {"merge_method": "passthrough",
                   "slices": [{"sources": [{"model": f["a"], "layer_range": [0, 4]}]}]},
        r"layer_range \[0, 4\] is outside the model's 3 layers",
    ),
    "range reversed": (
        lambda f: {"merge_method": "passthrough",
                   "slices": [{"sources": [{"model": f["a"], "layer_range": [2, 1]}]}]},
        r"layer_range must be \[first, end\]",
    ),
    "ranges of two lengths": (
        lambda f: {"merge_method": "linear", "parameters": {"weight": 1}, "slices": [{"sources": [
            {"model": f["a"], "layer_range": [0, 2]}, {"model": f["b"], "layer_range": [0, 3]}]}]},
        "all inputs must have the same number of layers",
    ),
    "depth": (lambda f: content(f | {"b": f["deep"]}), "all inputs must have the same number of layers, found"),
    "width": (lambda f: content(f | {"b": f["wide"]}), "intermediate_size must be 96 as that of"),
    "architecture": (lambda f: content(f | {"b": f["mistral"]}), "model_type must be 'llama' as that of"),
    "a model twice": (lambda f: content(f | {"b": f["a"]}), "is an input twice"),
    "no base": (lambda f: content(f, merge_method="ties"), "ties needs a base_model, found none"),
    "three for slerp": (
        lambda f: content(f, merge_method="slerp", base_model=f["base"], parameters={"t": 0.5}), "slerp needs 2 models",
    ),
    "two for model_stock": (
        lambda f: {"merge_method": "model_stock", "base_model": f["base"], "models": [{"model": f["a"]}]},
        "model_stock needs at least 3 models",
    ),
    "models and slices": (lambda f: content(f, slices=[]) | {"slices": [{"sources": []}]}, "exactly one of models"),
    "dtype": (lambda f: content(f, dtype="float64"), "dtype must be one of float32, bfloat16, float16"),
    "no such model": (lambda f: content(f | {"b": "/not/there"}), "/not/there: no such checkpoint"),
    "revision": (
        lambda f: content(f, models=[{"model": {"model": {"path": f["a"], "revision": "main"}},
                                      "parameters": {"weight": 1}}]),
        "revision is not supported",
    ),
    "nothing": (lambda f: None, "must be a table"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_mistake_is_one_sentence_before_weights_are_read(folders, mistake):
    make, said = REFUSED[mistake]
    with pytest.raises(UserError, match=said) as e:
        view(make(folders))
    assert len(str(e.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("merge_method: [", "is not YAML"),
        ("merge_method: linear\nmerge_method: ties\nmodels: [{model: x}]", "'merge_method' is given twice"),
        (b"\xff\xfe", "is not UTF-8"),
        (None, "No such file"),
    ],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, text, said):
    file = tmp_path / "merge.yml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=said) as e:
        read_recipe(file)
    assert str(e.value).startswith(str(file))
    assert len(str(e.value).splitlines()) == 1


def test_the_recipe_of_a_file_is_read(folders, tmp_path):
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(content(folders)))
    same(merged(read_recipe(tmp_path / "merge.yml")), view(content(folders)))
