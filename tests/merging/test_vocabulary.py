"""Merged vocabularies: every token's embedding is what mergekit gives it, whatever its number."""

import json
import pathlib
import shutil
from typing import Any

import pytest
import tokenizers
import torch
import transformers
import yaml

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from solar_jax.merging.recipe import recipe_of
from solar_jax.merging.view import merged
from tests.conftest import byte_tokenizer, hf_model, moved, save_hf
from tests.merging.oracle import ours, theirs

pytestmark = pytest.mark.slow  # mergekit imports for ten seconds
ADDED = {"base": [], "chat": ["<|im_start|>", "<|im_end|>", "hello"], "other": ["<|im_end|>", "world"]}
EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """Models with 320 embeddings, of which 259 to 262 have tokens; `small` has one for each token."""
    root, found = tmp_path_factory.mktemp("models"), {}
    for seed, (name, added) in enumerate(ADDED.items()):
        model = moved(hf_model(num_hidden_layers=2), seed).to(torch.bfloat16)
        found[name] = str(_with_tokens(save_hf(model, root / name), added))
    model = hf_model(num_hidden_layers=2, vocab_size=259).to(torch.bfloat16)
    found["small"] = str(save_hf(model, root / "small"))
    return found


def _with_tokens(folder: pathlib.Path, added: list[str]) -> pathlib.Path:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens([token for token in added if token.startswith("<")])
    tokenizer.add_tokens([token for token in added if not token.startswith("<")])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def recipe(folders: dict[str, str], names: tuple[str, ...], **more: Any) -> dict[str, Any]:
    models = [{"model": folders[name], "parameters": {"weight": 1 + i}} for i, name in enumerate(names)]
    return {"merge_method": "linear", "models": models, "dtype": "bfloat16"} | more


def _vocabulary(folder: pathlib.Path) -> dict[str, int]:
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)


def by_token(found: dict[str, torch.Tensor], folder: pathlib.Path) -> dict[tuple[str, str], torch.Tensor]:
    return {(name, token): found[name][row] for name in EMBEDDINGS for token, row in _vocabulary(folder).items()}


RULES: dict[str, Any] = {
    "union": lambda f: {"tokenizer_source": "union"},
    "base": lambda f: {"tokenizer_source": "base"},
    "a model": lambda f: {"tokenizer_source": f["other"]},
    "own sources": lambda f: {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<|im_end|>": {"source": f["chat"], "force": True},
                "hello": {"source": {"kind": "zero"}},
                "world": {"source": {"kind": "model_token", "model": f["base"], "token": "a"}},
                "<|new|>": {"source": {"kind": "model_token", "model": f["chat"], "token_id": 7}},
            },
        }
    },
    "padded": lambda f: {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
}


# Without a base_model, mergekit takes any of the models as "base".
@pytest.mark.parametrize(("rule", "has_base"), [(r, b) for r in RULES for b in (True, False) if b or r != "base"])
def test_each_token_has_mergekits_embedding(folders, rule, has_base, tmp_path):
    names = ("base", "chat", "other")
    content = recipe(folders, names, **RULES[rule](folders))
    if has_base:
        content |= {"merge_method": "task_arithmetic", "base_model": folders["base"]}
    text = yaml.safe_dump(content)
    a, b = ours(text, tmp_path / "ours"), theirs(text, tmp_path / "theirs")
    mine, wanted = by_token(a, tmp_path / "ours"), by_token(b, tmp_path / "theirs")
    assert mine.keys() == wanted.keys()
    for key, row in wanted.items():
        assert torch.equal(mine[key], row), key
    for name in a.keys() - set(EMBEDDINGS):
        assert torch.equal(a[name], b[name]), name
    if rule == "padded":  # rows without a token: mergekit's mean of all, in bfloat16
        assert a[EMBEDDINGS[0]].shape == b[EMBEDDINGS[0]].shape
        torch.testing.assert_close(a[EMBEDDINGS[0]][-1], b[EMBEDDINGS[0]][-1], atol=1e-3, rtol=0.01)


def test_the_result_is_a_model_whose_tokenizer_and_end_token_belong_together(folders, tmp_path):
    config = json.loads((pathlib.Path(folders["chat"]) / "config.json").read_text())
    (pathlib.Path(folders["chat"]) / "config.json").write_text(json.dumps(config | {"eos_token_id": [2, 260]}))
    ours(yaml.safe_dump(recipe(folders, ("base", "chat"), tokenizer_source=folders["chat"])), tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("<|im_end|>")["input_ids"] == [260]
    assert model.config.eos_token_id == [2, 260]
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == 262


def test_padding_rows_that_mergekit_drops_are_kept_where_all_tokenizers_agree(folders, tmp_path, capsys):
    content = recipe({"a": folders["base"], "b": _copy(folders["base"], tmp_path)}, ("a", "b"), tokenizer_source="base")
    a, b = ours(yaml.safe_dump(content), tmp_path / "ours"), theirs(yaml.safe_dump(content), tmp_path / "theirs")
    assert [len(x[EMBEDDINGS[0]]) for x in (a, b)] == [320, 259]
    assert "the 61 embeddings without a token are kept" in capsys.readouterr().out
    for name in EMBEDDINGS:
        assert torch.equal(a[name][:259], b[name])


def _copy(folder: str, root: pathlib.Path) -> str:
    return str(shutil.copytree(folder, root / "copy"))


def test_vocabularies_of_two_sizes_need_a_rule(folders, tmp_path):
    with pytest.raises(UserError, match=r"vocab_size must be 320 as that of .*found 259; tokenizer_source says how"):
        merged(recipe_of(recipe(folders, ("base", "small")), "test"))
    text = yaml.safe_dump(recipe(folders, ("base", "small"), tokenizer_source="union"))
    a, b = ours(text, tmp_path / "ours"), theirs(text, tmp_path / "theirs")
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_tokenizers_that_differ_without_a_rule_are_told(folders, capsys):
    merged(recipe_of(recipe(folders, ("base", "chat")), "test"))
    assert "its tokenizer differs from that of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("token", "said"),
    [
        ({"source": {"kind": "model_token", "model": "chat", "token": "nothing"}}, "has no embedding of 'nothing'"),
        ({"source": {"kind": "model_token", "model": "chat", "token_id": 320}}, "has no embedding of 320"),
        ({"source": {"kind": "mean"}}, "kind must be zero or model_token"),
        ({"force": True}, "force needs a source"),
        ({"sources": "chat"}, "the key 'sources' is not supported"),
    ],
)
def test_a_token_without_a_source_is_refused(folders, token, said):
    if isinstance(token.get("source"), dict) and "model" in token["source"]:
        token = {"source": token["source"] | {"model": folders["chat"]}}
    content = recipe(folders, ("base", "chat"), tokenizer={"source": "union", "tokens": {"<|new|>": token}})
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        merged(recipe_of(content, "test"))


@pytest.mark.parametrize(
    ("wanted", "expected"), [("{{ 'own' }}", "{{ 'own' }}"), ("auto", "{{ 'theirs' }}"), ("chatml", "<|im_start|>")]
)
def test_a_chat_template_is_the_recipes(folders, wanted, expected, tmp_path):
    for name in ("chat", "other"):
        (pathlib.Path(folders[name]) / "chat_template.jinja").write_text("{{ 'theirs' }}")
    content = recipe(folders, ("base", "chat", "other"), chat_template=wanted)
    ours(yaml.safe_dump(content), tmp_path / "out")
    assert expected in transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template


def test_an_unknown_template_is_refused(folders):
    with pytest.raises(UserError, match=r"chat_template must be auto, .*chatml.* or Jinja text, found 'llama9'"):
        merged(recipe_of(recipe(folders, ("base", "chat"), chat_template="llama9"), "test"))


def test_a_merge_of_embeddings_reads_only_the_rows_it_is_asked_for(folders):
    c = merged(recipe_of(recipe(folders, ("base", "chat", "other"), tokenizer_source="union"), "test"))
    whole = c.read(EMBEDDINGS[0])
    assert (c.read(EMBEDDINGS[0], slice(255, 262)) == whole[255:262]).all()
    assert open_checkpoint(folders["base"]).shape_of[EMBEDDINGS[0]][0] == 320
