"""Hugging Face folders in: the same weights however they are stored, and damage named before anything is loaded."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers

from solar_jax.checkpoints.checkpoint import numpy_dtype
from solar_jax.checkpoints.hf_folder import INDEX
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tensor_table import hf_tensors, pick, to_hf
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import MeshConfig
from solar_jax.errors import UserError
from solar_jax.parallel.mesh import make_mesh
from solar_jax.parallel.rules import parameter_shardings
from tests.conftest import hf_model, refusal, save_hf

SHARD = "200KB"  # about one layer
Q2 = "model.layers.2.self_attn.q_proj.weight"


@pytest.fixture
def folder(tiny, tmp_path) -> pathlib.Path:
    """A copy of `tiny` to damage."""
    return shutil.copytree(tiny, tmp_path / "m")


@pytest.fixture
def sharded(tmp_path) -> pathlib.Path:
    """`tiny`'s weights in several files."""
    folder = save_hf(hf_model(), tmp_path / "sharded", max_shard_size=SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def edit_json(file: pathlib.Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def edit_tensors(folder: pathlib.Path, change) -> None:
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.torch.save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def assert_same(found, expected) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.shape, a.dtype, np.asarray(a).tobytes()) == (b.shape, b.dtype, np.asarray(b).tobytes())


def test_every_loaded_array_is_transformers_tensor(tiny):
    c = open_checkpoint(str(tiny))
    params = load_params(c)
    expected = hf_model().state_dict()
    for name, path, layer in hf_tensors(c.cfg):
        np.testing.assert_array_equal(to_hf(np.asarray(pick(params, path, layer)), path, c.cfg), expected[name])


def test_a_sharded_folder_loads_the_same_as_a_single_file(tiny, sharded):
    one, many = open_checkpoint(str(tiny)), open_checkpoint(str(sharded))
    assert (one.cfg, one.shape_of, one.dtype) == (many.cfg, many.shape_of, many.dtype)
    assert_same(load_params(many), load_params(one))


@pytest.mark.parametrize("mesh", [(1, 8, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_loading_onto_eight_devices_loads_the_same_as_onto_one(tmp_path, mesh, tied):
    assert jax.device_count() == 8
    c = open_checkpoint(str(save_hf(hf_model(tie_word_embeddings=tied, num_hidden_layers=2), tmp_path / "m")))
    shardings = parameter_shardings(c.cfg, make_mesh(MeshConfig(*mesh)))
    found = load_params(c, shardings)
    assert jax.tree.map(lambda x: x.sharding, found) == shardings
    assert_same(found, load_params(c))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_half_width_folder_loads_exactly(tmp_path, dtype):
    model = hf_model(num_hidden_layers=2).to(getattr(torch, dtype))
    c = open_checkpoint(str(save_hf(model, tmp_path / "m")))
    assert c.dtype == dtype
    narrow, wide = load_params(c, dtype=numpy_dtype(dtype)), load_params(c)
    expected = model.state_dict()
    for name, path, layer in hf_tensors(c.cfg):
        x = to_hf(np.asarray(pick(narrow, path, layer)), path, c.cfg)
        assert x.tobytes() == expected[name].view(torch.uint8).numpy().tobytes()
        x = to_hf(np.asarray(pick(wide, path, layer)), path, c.cfg)
        assert x.dtype == np.float32
        np.testing.assert_array_equal(x, expected[name].float())


def test_a_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda t: t.pop(Q2))
    text = refusal(folder)
    assert Q2 in text
    assert "missing" in text


def test_a_layer_fewer_than_the_config_says_is_refused(folder):
    edit_json(folder / "config.json", lambda c: c.update(num_hidden_layers=7))
    text = refusal(folder)
    assert "model.layers.6." in text
    assert "missing" in text


@pytest.mark.parametrize("name", ["model.layers.2.self_attn.q_proj.bias", "model.layers.6.mlp.up_proj.weight", "score"])
def test_a_tensor_that_the_model_has_no_place_for_is_named(folder, name):
    edit_tensors(folder, lambda t: t.update({name: torch.ones(3)}))
    text = refusal(folder)
    assert name in text
    assert "must hold only tensors of its model" in text


def test_a_tensor_of_another_shape_is_named_with_both_shapes(folder):
    edit_tensors(folder, lambda t: t.update({Q2: t[Q2].T.contiguous()}))
    text = refusal(folder)
    assert Q2 in text
    assert "(96, 64)" in text.partition("found")[0]
    assert "(64, 96)" in text.partition("found")[2]


def test_an_integer_tensor_among_the_weights_is_named(folder):
    edit_tensors(folder, lambda t: t.update({Q2: t[Q2].long()}))
    with pytest.raises(UserError, match=rf"{Q2} must be one of F32, BF16, F16, found I64"):
        open_checkpoint(str(folder))


def test_a_folder_of_integers_is_refused(folder):
    edit_tensors(folder, lambda t: t.update({k: x.long() for k, x in t.items()}))
    assert "I64" in refusal(folder)


def test_a_missing_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.unlink()
    text = refusal(sharded)
    assert text.startswith(f"/{file.name}: ")
    assert "No such file" in text


def test_a_truncated_shard_is_named(sharded):
    file = sorted(sharded.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-1])
    text = refusal(sharded)
    assert text.startswith(f"/{file.name}: ")
    assert "cut short" in text


@pytest.mark.parametrize("place", ["../x.safetensors", "/x.safetensors", "sub/x.safetensors", "..", "", 3, None])
def test_an_index_that_points_outside_the_folder_is_refused(sharded, place):
    inside = json.loads((sharded / INDEX).read_text())["weight_map"][Q2]
    shutil.copy(sharded / inside, sharded.parent / "x.safetensors")  # there, and whole: only its place is wrong
    (sharded / "sub").mkdir()
    shutil.copy(sharded / inside, sharded / "sub" / "x.safetensors")
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({Q2: place}))
    text = refusal(sharded)
    assert text.startswith(f"/{INDEX}: ")
    assert Q2 in text
    assert repr(place) in text


def test_a_tensor_that_its_shard_lacks_is_named(sharded):
    last = sorted(sharded.glob("*.safetensors"))[-1].name
    edit_json(sharded / INDEX, lambda index: index["weight_map"].update({"model.embed_tokens.weight": last}))
    text = refusal(sharded)
    assert text.startswith(f"/{last}: ")
    assert "model.embed_tokens.weight" in text


def test_a_tensor_that_the_index_forgets_is_named(sharded):
    edit_json(sharded / INDEX, lambda index: index["weight_map"].pop(Q2))
    text = refusal(sharded)
    assert text.startswith(f"/{INDEX}: ")
    assert Q2 in text


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_named(sharded, index):
    (sharded / INDEX).write_text(index)
    assert refusal(sharded).startswith(f"/{INDEX}: ")


def test_several_files_without_an_index_are_refused(sharded):
    (sharded / INDEX).unlink()
    assert INDEX in refusal(sharded)


def test_a_folder_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    text = refusal(folder)
    assert ".safetensors" in text
    assert "found none" in text


def test_a_file_without_tensors_is_refused(folder):
    safetensors.torch.save_file({}, folder / "model.safetensors")
    assert refusal(folder).startswith("/model.safetensors: ")


def test_a_missing_config_is_named(folder):
    (folder / "config.json").unlink()
    assert refusal(folder).startswith("/config.json: ")


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe\x00", b"3"])
def test_a_broken_config_is_named(folder, content):
    (folder / "config.json").write_bytes(content)
    assert refusal(folder).startswith("/config.json: ")


def test_a_missing_checkpoint_is_named(tmp_path):
    assert "no such checkpoint" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize("equal", [True, False])
def test_a_tied_model_may_store_its_embedding_twice_but_not_another_head(tmp_path, equal):
    model = hf_model(tie_word_embeddings=True, num_hidden_layers=2)
    folder = save_hf(model, tmp_path / "m")
    expected = load_params(open_checkpoint(str(folder)))
    head = model.model.embed_tokens.weight.detach().clone()
    if not equal:
        head[-1, -1] += 1e-6
        assert not torch.equal(head, model.model.embed_tokens.weight)
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": head}))
    if equal:
        assert_same(load_params(open_checkpoint(str(folder))), expected)
    else:
        text = refusal(folder)
        assert "lm_head.weight" in text
        assert "tie_word_embeddings" in text


def test_an_untied_model_needs_its_head(folder):
    edit_tensors(folder, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(folder)


def tokenizer_refusal(folder: pathlib.Path) -> str:
    with pytest.raises(UserError) as e:
        load_tokenizer(open_checkpoint(str(folder)))
    text = str(e.value)
    assert text.startswith(f"{folder}: ")
    assert len(text.splitlines()) == 1
    return text


def test_a_missing_tokenizer_is_named_when_it_is_needed(folder):
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in tokenizer_refusal(folder)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"type": "unheard of"}}'])
def test_a_broken_tokenizer_is_named(folder, content):
    (folder / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in tokenizer_refusal(folder)


def test_an_empty_tokenizer_is_refused(folder):
    edit_json(folder / "tokenizer.json", lambda t: t.update(added_tokens=[], model={"type": "BPE", "vocab": {},
                                                                                     "merges": []}))  # fmt: skip
    assert "tokenizer.json" in tokenizer_refusal(folder)


def test_a_tokenizer_fits_an_embedding_of_its_size_and_one_without_any_of_its_ids_is_refused(tmp_path):
    fits = save_hf(hf_model(vocab_size=259, num_hidden_layers=1), tmp_path / "fits")
    assert load_tokenizer(open_checkpoint(str(fits))).get_vocab_size() == 259
    edit_json(fits / "tokenizer.json", lambda t: t.update(added_tokens=[], model={"type": "BPE", "vocab": {"a": 300},
                                                                                  "merges": []}))  # fmt: skip
    assert "has ids from 300 up, but config.json's vocab_size is 259." in tokenizer_refusal(fits)


@pytest.mark.parametrize("left", ["truncation", "padding", "both", "dropout"])
def test_what_an_earlier_call_left_in_a_tokenizer_changes_no_count(folder, left):
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    expected = tokenizer.encode("depth up " * 50, add_special_tokens=False).ids
    if left in ("truncation", "both"):
        tokenizer.enable_truncation(64)
    if left in ("padding", "both"):
        tokenizer.enable_padding(length=2048)
    if left == "dropout":
        tokenizer.model = tokenizers.models.BPE(
            vocab=tokenizer.get_vocab(with_added_tokens=False) | {"ep": 259}, merges=[("e", "p")], dropout=0.5
        )
        expected = None
    tokenizer.save(str(folder / "tokenizer.json"))
    loaded, texts = load_tokenizer(open_checkpoint(str(folder))), ["depth up " * 50, "depth"]
    found = [e.ids for e in loaded.encode_batch_fast(texts, add_special_tokens=False)]
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    if left != "dropout":  # which transformers leaves on: every call gives other tokens
        assert found == theirs(texts, add_special_tokens=False)["input_ids"]
        assert found[0] == expected
    assert all(loaded.encode(t, add_special_tokens=False).ids == ids for t, ids in zip(texts, found, strict=True))
    assert json.loads(loaded.to_str())["truncation"] is None  # so that its hash is that of the clean file


@pytest.mark.parametrize(("value", "expected"), [(2, 2), ([7, 2], 7), (319, 319)])
def test_the_end_of_a_document_is_the_first_eos_token(folder, value, expected):
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=value))
    assert eos_id(open_checkpoint(str(folder))) == expected


def end_of_document(folder: pathlib.Path, config, generation, token) -> int:
    edit_json(folder / "config.json", lambda c: c.update(eos_token_id=config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    edit_json(folder / "tokenizer_config.json", lambda c: c.update(eos_token=token))
    return eos_id(open_checkpoint(str(folder)))


@pytest.mark.parametrize(
    ("config", "generation", "token", "expected", "said"),
    [
        (None, 2, None, 2, ""),
        (None, None, "</s>", 2, ""),
        (None, None, {"content": "<s>", "lstrip": False}, 1, ""),  # as transformers 4 wrote it
        ([7, 2], [2, 7], "</s>", 7, ""),  # a chat model's: all are known
        (None, [2, 7], "</s>", 2, ""),
        (7, 2, "</s>", 7, "eos_token_id is 7 in config.json, 2 in generation_config.json, 2 in tokenizer_config.json"),
        (None, 7, "</s>", 7, "eos_token_id is 7 in generation_config.json, 2 in tokenizer_config.json"),
    ],
)
def test_eos_is_looked_for_in_three_files_and_a_contradiction_is_told(
    folder, capsys, config, generation, token, expected, said
):
    assert end_of_document(folder, config, generation, token) == expected
    out = capsys.readouterr().out
    assert said in out
    assert bool(said) == ("documents end with" in out)


@pytest.mark.parametrize("value", [None, [], 320, -1, "2", True])
def test_an_eos_token_outside_the_vocabulary_is_refused(folder, value):
    with pytest.raises(UserError) as e:
        end_of_document(folder, value, None, None)
    assert "eos_token_id" in str(e.value)
    assert str(e.value).endswith(f"found {value!r}.")
