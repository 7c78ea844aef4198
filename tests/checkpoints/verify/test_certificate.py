"""Certificates: sound conversions get one whose figures an oracle confirms; whatever is changed afterwards is named."""

import dataclasses
import hashlib
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.torch
import torch
from gguf.constants import GGMLQuantizationType as Type

from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.verify import certificate, recompute
from solar_jax.checkpoints.views import cast, grown
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.apply import grow
from solar_jax.growth.operators import LayerMap, make_layer_map
from solar_jax.model import llama
from tests.checkpoints import test_gguf, test_parity
from tests.conftest import TINY, hf_model, save_hf

LAYERS = TINY["num_hidden_layers"]
IDENTITY, DUS, PRO = GrowthConfig("identity"), GrowthConfig("dus", m=2), GrowthConfig("llama_pro", every=3)
AVERAGE, ZEROED = GrowthConfig("average", every=3), GrowthConfig("zeroed", m=2)
UP = "model.layers.3.mlp.up_proj.weight"


def convert(source, out, growth=IDENTITY, form="hf", dtype=None, verify=True) -> dict:
    """The certificate of a conversion; empty where none is asked for."""
    c = open_checkpoint(str(source))
    layer_map = make_layer_map(c.cfg.num_hidden_layers, growth)
    convert_checkpoint(grown(c, layer_map), Target(out, form, dtype), "convert", verify=verify)
    file = (out if form == "hf" else out / "model") / "certificate.json"
    return json.loads(file.read_text()) if verify else {}


def certify(source, out, growth=IDENTITY, dtype=None) -> dict:
    c = open_checkpoint(str(source))
    return certificate.certify(cast(grown(c, make_layer_map(c.cfg.num_hidden_layers, growth)), dtype), out)


def refusal(source, out, growth=IDENTITY, dtype=None) -> str:
    """The one sentence that certification ends with."""
    with pytest.raises(UserError) as e:
        certify(source, out, growth, dtype)
    text = str(e.value)
    assert str(out) in text
    assert len(text.splitlines()) == 1
    return text


def tensors(folder) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "model.safetensors")


def rewrite(folder, changed: dict[str, torch.Tensor]) -> None:
    safetensors.torch.save_file(tensors(folder) | changed, folder / "model.safetensors", {"format": "pt"})


def sha256(x: torch.Tensor) -> str:
    return hashlib.sha256(x.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()


def assert_sound(found: dict) -> None:
    """No difference where no number changed, and both damages seen."""
    assert all(p["max_abs_difference"] == 0 and p["mean_kl"] == 0 for p in found["logits"]["prompts"])
    assert all(p["top1_agreement"] == 1 for p in found["logits"]["prompts"])
    assert [p["length"] for p in found["logits"]["prompts"]] == [7, 7, 7, 512]
    assert [control["detected"] for control in found["negative_control"]] == [True, True]
    assert min(control["max_abs_difference"] for control in found["negative_control"]) > 0.1
    assert certificate.failures(found) == []


NOISE = GrowthConfig("zeroed", m=2, inner="normal")
# growth -> (source layer of each output layer, those of which every tensor is its, distance to the base's logits)
SOUND = {
    "identity": (IDENTITY, [0, 1, 2, 3, 4, 5], {0, 1, 2, 3, 4, 5}, 0.0),
    "dus": (DUS, [0, 1, 2, 3, 2, 3, 4, 5], {0, 1, 2, 3, 4, 5, 6, 7}, None),
    "llama_pro": (PRO, [0, 1, 2, 2, 3, 4, 5, 5], {0, 1, 2, 4, 5, 6}, 0.0),
    "zeroed": (ZEROED, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5], {0, 1, 2, 3, 8, 9}, 0.0),
    "average": (AVERAGE, [0, 1, 2, 2, 3, 4, 5], {0, 1, 2, 4, 5, 6}, None),
    "linear_lesa": (GrowthConfig("linear_lesa", every=3), [0, 1, 2, 2, 3, 4, 5], {0, 1, 2, 4, 5, 6}, None),
    "gated": (GrowthConfig("gated", m=2, beta=0.25), [0, 1, 2, 3, 2, 3, 4, 5], {0, 1, 2, 3, 6, 7}, None),
    "gated by 0": (GrowthConfig("gated", m=2, beta=0.0), [0, 1, 2, 3, 2, 3, 4, 5], {0, 1, 2, 3, 6, 7}, 0.0),
    "noise": (NOISE, [0, 1, 2, 3, 2, 3, 2, 3, 4, 5], {0, 1, 2, 3, 8, 9}, 0.0),
    "one layer": (GrowthConfig("slices", slices="4:5"), [4], {0}, None),
}


@pytest.mark.parametrize("name", SOUND)
@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_sound_result_is_certified_layer_by_layer(tmp_path, tiny, name, form):
    growth, source_layers, equal, base = SOUND[name]
    found = convert(tiny, tmp_path / "out", growth, form)
    assert_sound(found)
    assert [row["source"] for row in found["layer_map"]] == source_layers
    assert {row["layer"] for row in found["layer_map"] if row["equals_source"]} == equal
    assert found["logits"]["equals_base"] == base
    assert found["logits"]["tolerance"] == 1e-4
    config = {} if len(source_layers) == LAYERS else {"num_hidden_layers": [LAYERS, len(source_layers)]}
    assert found["config_changed"] == config
    assert set(found["companions_sha256"]) == {"tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert found["result"]["where"] == "out"
    assert found["versions"]["numpy"] == np.__version__
    base_tensors = tensors(tiny)
    for tensor, record in found["tensors"].items():  # hashes of the source's bytes in HF's layout, in both forms
        assert record["source_sha256"] == [sha256(base_tensors[source]) for source in record["source"]]
        assert record["bitwise_equal"] == ([record["sha256"]] == record["source_sha256"])
        assert (record["made"] == "copied") == record["bitwise_equal"]
        if form == "hf":
            assert record["sha256"] == sha256(tensors(tmp_path / "out")[tensor])


def test_a_certificate_does_not_travel_to_what_is_made_from_its_checkpoint(tmp_path, tiny):
    convert(tiny, tmp_path / "once", DUS)
    convert(tmp_path / "once", tmp_path / "twice", verify=False)
    assert (tmp_path / "once" / "certificate.json").exists()
    assert not (tmp_path / "twice" / "certificate.json").exists()


def test_computed_tensors_say_how_they_were_made(tmp_path, tiny):
    record = convert(tiny, tmp_path / "mean", AVERAGE)["tensors"][UP]
    assert record["source"] == ["model.layers.2.mlp.up_proj.weight", "model.layers.3.mlp.up_proj.weight"]
    assert (record["made"], record["equals_recomputation"]) == ("mean of layers 2 and 3", True)
    found = convert(tiny, tmp_path / "pro", PRO)["tensors"]
    fit = convert(tiny, tmp_path / "fit", GrowthConfig("linear_lesa", every=3))["tensors"][UP]
    assert fit["source"] == record["source"]
    assert re.fullmatch(r"-?[\d.e-]+ and -?[\d.e-]+ times the values of layers 2 and 3", fit["made"])
    noise = convert(tiny, tmp_path / "noise", NOISE)["tensors"]["model.layers.4.mlp.up_proj.weight"]
    assert (noise["made"], noise["equals_recomputation"]) == ("noise with the standard deviation", True)
    scaled = {name for name, record in found.items() if record["made"] == "scaled by 0.0"}
    assert scaled == {f"model.layers.{i}.{x}.weight" for i in (3, 7) for x in ("self_attn.o_proj", "mlp.down_proj")}


@pytest.mark.parametrize("form", ["hf", "orbax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_measured_and_its_logits_reported_without_a_bound(tmp_path, tiny, dtype, form):
    found = convert(tiny, tmp_path / "out", DUS, form, dtype)
    expected = {name: x.to(getattr(torch, dtype)) for name, x in tensors(tiny).items()}
    for record in found["tensors"].values():
        x, cast = tensors(tiny)[record["source"][0]], expected[record["source"][0]]
        assert record["sha256"] == sha256(cast)
        assert record["max_abs_difference"] == float((cast.float() - x).abs().max()) > 0
        assert record["made"] == f"cast float32->{dtype}"
    logits = found["logits"]
    assert logits["tolerance"] is None
    assert 1e-4 < logits["prompts"][3]["max_abs_difference"] < 0.1
    assert certificate.failures(found) == []
    assert [control["judged_by"] for control in found["negative_control"]] == ["mean_kl", "mean_kl"]
    assert min(control["mean_kl"] / control["threshold"] for control in found["negative_control"]) > 10


def test_a_cast_that_changes_no_number_keeps_the_bound_on_logits(tmp_path):
    source = save_hf(hf_model(num_hidden_layers=2).to(torch.bfloat16), tmp_path / "source")
    found = convert(source, tmp_path / "out", dtype="float32")
    assert_sound(found)
    assert found["logits"]["tolerance"] == 1e-4
    assert {record["max_abs_difference"] for record in found["tensors"].values()} == {0.0}


def test_norms_of_another_dtype_are_certified_as_they_are(tmp_path):
    source = save_hf(hf_model(num_hidden_layers=2).to(torch.bfloat16), tmp_path / "source")
    rewrite(source, {name: x.float() for name, x in tensors(source).items() if "norm" in name})
    found = convert(source, tmp_path / "out", GrowthConfig("average", every=1))
    assert_sound(found)
    assert {record["dtype"] for name, record in found["tensors"].items() if "norm" in name} == {"float32"}
    assert {record["dtype"] for name, record in found["tensors"].items() if "norm" not in name} == {"bfloat16"}


@pytest.mark.parametrize(
    ("kind", "made"),
    [
        (Type.F32, ""),
        (Type.F16, ""),
        (Type.BF16, ""),
        (Type.Q8_0, "dequantised Q8_0"),
        (Type.Q4_0, "dequantised Q4_0"),
        (Type.Q4_1, "dequantised Q4_1"),
        (Type.Q5_1, "dequantised Q5_1 by the gguf package"),
    ],
)
def test_a_gguf_source_is_dequantised_a_second_time(tmp_path, kind, made):
    source = test_gguf.write_gguf(tmp_path / "x.gguf", test_gguf.hf_tensors(), kind=kind)
    found = convert(source, tmp_path / "out", GrowthConfig("naive", copies=2))
    assert_sound(found)
    record = found["tensors"]["model.layers.3.self_attn.k_proj.weight"]
    assert record["made"] == ", ".join(filter(None, (made, "rotary pairs reordered")))
    assert (record["bitwise_equal"], record["equals_recomputation"]) == (False, True)
    assert found["tensors"][UP]["made"] == (made or "copied")
    assert found["tensors"][UP]["bitwise_equal"] == (kind in (Type.F32, Type.F16, Type.BF16))


@pytest.mark.parametrize(
    "name",
    ["Llama, MLP biases", "Llama 3.1", "Mistral v0.1", "Qwen3, biases", "EXAONE 3", "Phi-3", "SmolLM3", "HyperCLOVAX"],
)
def test_every_kind_of_architecture_is_certified(tmp_path, name):
    source = save_hf(test_parity.hf_model(name), tmp_path / "source")
    found = convert(source, tmp_path / "out", GrowthConfig("llama_pro", every=2))
    assert_sound(found)
    assert found["logits"]["equals_base"] == 0.0
    scaled = {name.rpartition("layers.2.")[2] for name, r in found["tensors"].items() if r["made"] == "scaled by 0.0"}
    assert ("self_attn.o_proj.bias" in scaled) == ("biases" in name)
    assert ("mlp.down_proj.bias" in scaled) == ("MLP biases" in name)
    assert ("post_norm1.weight" in scaled) == (name == "HyperCLOVAX") != ("mlp.down_proj.weight" in scaled)


def changed_config(**changes):
    def change(folder: pathlib.Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def flip_a_bit(folder: pathlib.Path) -> None:
    """The lowest bit of one number in the middle of a tensor, in the file."""
    data = bytearray((folder / "model.safetensors").read_bytes())
    length = int.from_bytes(data[:8], "little")
    start, stop = json.loads(data[8 : 8 + length])[UP]["data_offsets"]
    data[8 + length + (start + stop) // 8 * 4] ^= 1
    (folder / "model.safetensors").write_bytes(data)


def swap_layers(folder: pathlib.Path) -> None:
    found, other = tensors(folder), {".layers.4.": ".layers.5.", ".layers.5.": ".layers.4."}
    rewrite(folder, {k.replace(a, b): x for a, b in other.items() for k, x in found.items() if a in k})


def test_an_untouched_result_can_be_certified_again(tmp_path, tiny):
    convert(tiny, tmp_path / "out", DUS, verify=False)
    assert_sound(certify(tiny, tmp_path / "out", DUS))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_bit, f"{UP} must be bitwise equal to {UP}"),
        (swap_layers, "layers.4.self_attn.q_proj.weight must be bitwise equal to model.layers.2.self_attn.q_proj"),
        (changed_config(rope_parameters={"rope_type": "default", "rope_theta": 10500.0}), "'rope_theta': 10500.0"),
        (changed_config(rms_norm_eps=1e-6), "rms_norm_eps must be 1e-05, found 1e-06"),
        (changed_config(eos_token_id=3), "eos_token_id must be 2, found 3"),
        (changed_config(dtype="bfloat16"), "dtype must be 'float32', found 'bfloat16'"),
        (lambda f: (f / "tokenizer.json").write_bytes((f / "tokenizer.json").read_bytes() + b" "), "tokenizer.json is"),
        (lambda f: (f / "tokenizer_config.json").unlink(), "tokenizer_config.json of"),
        (lambda f: (f / "merges.txt").write_text("a b"), "merges.txt is not"),
        (lambda f: rewrite(f, {UP: tensors(f)[UP].half()}), f"{UP} must be float32, found float16"),
        (lambda f: rewrite(f, {UP: tensors(f)[UP].mT.contiguous()}), UP),
    ],
    ids=[
        "one bit of a tensor", "two layers swapped", "rope theta", "epsilon", "end token", "dtype", "tokenizer changed",
        "tokenizer file gone", "a file more", "another dtype", "another shape",
    ],
)  # fmt: skip
def test_whatever_is_changed_afterwards_is_named(tmp_path, tiny, damage, said):
    convert(tiny, tmp_path / "out", DUS, verify=False)
    damage(tmp_path / "out")
    assert said in refusal(tiny, tmp_path / "out", DUS)


@pytest.mark.parametrize(
    ("growth", "dtype", "said"),
    [
        (AVERAGE, None, f"{UP} is not mean of layers 2 and 3 of model.layers.2.mlp"),
        (DUS, "bfloat16", f"{UP} is not cast float32->bfloat16 of {UP}"),
        (PRO, "float16", f"{UP} is not cast float32->float16 of model.layers.2.mlp"),
    ],
)
def test_one_bit_of_a_computed_tensor_is_named(tmp_path, tiny, growth, dtype, said):
    convert(tiny, tmp_path / "out", growth, dtype=dtype, verify=False)
    assert certify(tiny, tmp_path / "out", growth, dtype)
    x = tensors(tmp_path / "out")[UP].clone()
    x.view(torch.uint8)[7, 0] ^= 1
    rewrite(tmp_path / "out", {UP: x})
    assert said in refusal(tiny, tmp_path / "out", growth, dtype)


def test_a_zeroed_layer_that_adds_something_is_named(tmp_path, tiny):
    convert(tiny, tmp_path / "out", PRO, verify=False)
    name = "model.layers.3.mlp.down_proj.weight"
    rewrite(tmp_path / "out", {name: tensors(tmp_path / "out")["model.layers.2.mlp.down_proj.weight"]})
    assert f"{name} is not scaled by 0.0" in refusal(tiny, tmp_path / "out", PRO)


def test_an_array_of_our_own_form_that_was_changed_is_named(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "other")
    rewrite(tmp_path / "other", {UP: tensors(tiny)[UP] + 1e-3})
    convert(tmp_path / "other", tmp_path / "out", form="orbax", verify=False)
    assert f"{UP} must be bitwise equal" in refusal(tiny, tmp_path / "out")


@pytest.mark.parametrize("form", ["hf", "orbax"])
def test_a_wrong_writer_leaves_no_folder(tmp_path, tiny, monkeypatch, form):
    rightly = grown

    def wrong(c, layer_map):
        right = rightly(c, layer_map)

        def read(name, rows=slice(None)):
            source = re.sub(r"layers\.(\d+)", lambda m: f"layers.{layer_map.source[int(m[1])]}", name)
            return c.read(source, rows)  # without the mean

        return dataclasses.replace(right, read=read)

    monkeypatch.setitem(globals(), "grown", wrong)
    with pytest.raises(UserError, match=r"out: model\.layers\.3\..* is not mean of layers 2 and 3"):
        convert(tiny, tmp_path / "out", AVERAGE, form)
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_float16_has_no_room_for_is_named(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "source")
    x = tensors(tiny)[UP].clone()
    x[3, 4] = 1e5
    rewrite(tmp_path / "source", {UP: x})
    with pytest.raises(UserError, match=rf"{UP} has values out of float16's range"):
        convert(tmp_path / "source", tmp_path / "out", dtype="float16")


def test_logits_alone_refuse_another_theta_and_another_epsilon(tmp_path, tiny, monkeypatch):
    # As if the check of config.json had overlooked it.
    monkeypatch.setattr(certificate, "_check_config", lambda *args: {})
    for change in ({"rope_parameters": {"rope_type": "default", "rope_theta": 10500.0}}, {"rms_norm_eps": 1e-3}):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert(tiny, tmp_path / "out", PRO, verify=False)
        changed_config(**change)(tmp_path / "out")
        wrong = certificate.failures(certify(tiny, tmp_path / "out", PRO))
        assert any(text.startswith("logits of prompt 3 must be within 0.0001 of the source's") for text in wrong)
        assert any(text.startswith("logits must be within 0.0001 of the base's") for text in wrong)


def test_a_model_on_which_damage_does_not_show_is_not_certified(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "source")
    silent = {k: 0 * x for k, x in tensors(tiny).items() if "o_proj" in k or "down_proj" in k}
    rewrite(tmp_path / "source", silent)
    with pytest.raises(UserError, match=r"cannot tell a damaged result \(rotary base times 10: max_abs_difference 0\)"):
        convert(tmp_path / "source", tmp_path / "out", DUS)
    assert [f.name for f in tmp_path.iterdir()] == ["source"]
    convert(tmp_path / "source", tmp_path / "out", DUS, verify=False)
    found = certify(tmp_path / "source", tmp_path / "out", DUS)
    assert [control["detected"] for control in found["negative_control"]] == [False, False]


def test_logits_that_are_no_numbers_are_not_certified(tmp_path, tiny):
    shutil.copytree(tiny, tmp_path / "source")
    rewrite(tmp_path / "source", {UP: tensors(tiny)[UP] + float("inf")})
    with pytest.raises(UserError, match="logits of prompt 0 are not finite"):
        convert(tmp_path / "source", tmp_path / "out")


def test_the_controls_are_the_damage_that_they_say(tmp_path, tiny):
    found = convert(tiny, tmp_path / "out", DUS)["negative_control"]
    c = open_checkpoint(str(tmp_path / "out"))
    params, logits = load_params(c), jax.jit(llama.logits, static_argnums=0)
    tokens = [t[:, : certificate.CONTROL] for t in certificate.prompts(c.cfg.vocab_size, 1024)]
    faster = dataclasses.replace(c.cfg, rope_theta=10 * c.cfg.rope_theta)
    swapped = grow(params, LayerMap("swap", 8, (1, 0, 2, 3, 4, 5, 6, 7)))
    for record, (cfg, damaged) in zip(found, ((faster, params), (c.cfg, swapped)), strict=True):
        expected = max(float(abs(logits(c.cfg, params, t) - logits(cfg, damaged, t)).max()) for t in tokens)
        assert record["max_abs_difference"] == pytest.approx(expected, rel=1e-4)
    assert [record["damage"] for record in found] == ["rotary base times 10", "layers 0 and 1 swapped"]


def test_layers_that_may_be_swapped_differ_and_add_something():
    def neighbours(operator: str, **numbers) -> tuple[int, int] | None:
        return certificate.different_neighbours(make_layer_map(3, GrowthConfig(operator, **numbers)))

    assert neighbours("interleave", copies=2) == (1, 2)  # 0 0 1 1 2 2
    assert neighbours("llama_pro", every=1) == (0, 2)  # 0 0' 1 1' 2 2'
    assert neighbours("average", every=1) == (0, 1)  # 0 01 1 12 2
    assert neighbours("slices", slices="2:3,2:3") is None


def test_only_plans_whose_added_layers_add_nothing_are_compared_with_the_base():
    def kept(operator: str, **numbers) -> list[int] | None:
        return certificate.kept_layers(make_layer_map(3, GrowthConfig(operator, **numbers)))

    assert kept("identity") == [0, 1, 2]
    assert kept("llama_pro", every=1) == [0, 2, 4]
    assert kept("zeroed", m=1) == [0, 1, 4]  # 0 1 1' 1' 2
    assert kept("slices", slices="0:2,2:3") == [0, 1, 2]
    for other in (kept("dus", m=1), kept("average", every=1), kept("slices", slices="0:2")):
        assert other is None
    assert certificate.kept_layers(LayerMap("half", 2, (0, 1), scale=(1.0, 0.5))) is None


def test_the_tokens_of_prompts_are_the_same_everywhere():
    short, long = certificate.prompts(32000, 4096)
    assert (short.shape, long.shape) == ((3, 7), (1, 512))
    assert certificate.prompts(32000, 300)[1].shape == (1, 300)
    assert short[0].tolist() == [14669, 4964, 29383, 10025, 14465, 3841, 31935]


def test_a_person_is_told_in_four_lines(tmp_path, tiny, capsys):
    convert(tiny, tmp_path / "out", PRO)
    lines = capsys.readouterr().out.splitlines()[1:]
    assert lines[0] == "certificate of out, llama_pro(every=3) of llama"
    assert lines[1] == "  tensors: 71 of 75 bitwise equal to the source's, 4 recomputed"
    assert lines[2] == "  logits: up to 0 from the source's (at most 0.0001); from the base's 0"
    assert lines[3].count("rejected") == 2
    assert len(lines) == 4


def test_small_blocks_give_the_same_certificate(tmp_path, tiny, monkeypatch):
    whole = convert(tiny, tmp_path / "whole", AVERAGE, dtype="bfloat16")
    monkeypatch.setattr("solar_jax.checkpoints.checkpoint.BLOCK", 1 << 11)
    monkeypatch.setattr(recompute, "_PIECE", 100)
    blocks = convert(tiny, tmp_path / "blocks", AVERAGE, dtype="bfloat16")
    assert blocks["tensors"] == whole["tensors"]
    for a, b in zip(blocks["logits"]["prompts"], whole["logits"]["prompts"], strict=True):
        assert a.pop("tokens") == b.pop("tokens")
        assert a == pytest.approx(b, rel=1e-3)
