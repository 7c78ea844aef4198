"""Adapters both ways: ours in PEFT, PEFT's in ours, with the dense model and PEFT's own logits as judges."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch

from solar_jax.checkpoints.adapters import PEFT_CONFIG, lows_of, replication_of, write_peft
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.views import grown
from solar_jax.config import GrowthConfig, LoraConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import dus, make_layer_map
from solar_jax.model.llama import logits
from solar_jax.model.lora import first_adapter
from solar_jax.training.partition import make_partition
from tests.conftest import hf_model, save_hf

TOKENS = np.arange(3, 35).reshape(2, 16) * 7 % 250
VARIANTS = ["lora", "rslora", "dora"]
DUS = make_layer_map(6, GrowthConfig(m=2))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_hf(hf_model(), tmp_path_factory.mktemp("base") / "llama")


def ours(source) -> np.ndarray:
    """Our logits of what SRC opens as."""
    c = open_checkpoint(str(source))
    return np.asarray(logits(c.cfg, load_params(c, None, np.float32), jnp.asarray(TOKENS)))


def theirs(folder, base) -> np.ndarray:
    """PEFT's logits of an adapter folder on its base, not merged."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = peft.PeftModel.from_pretrained(model, str(folder)).eval()
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits.numpy()


def trained_adapter(c, lora: LoraConfig, trainable: str = "all"):
    """An adapter that changes something, its partition, and the dense parameters beside it."""
    partition = make_partition(trainable, c.layer_map, lora)
    params = load_params(c, None, np.float32)
    leaves = first_adapter(c.cfg, lora, partition.taken(params["layers"]), 3, "float32")
    key = jax.random.key(0)
    changed = {
        name: x * 1.3 if name.endswith("norm") else x + 0.05 * jax.random.normal(jax.random.fold_in(key, i), x.shape)
        for i, (name, x) in enumerate(leaves.items())
    }
    return partition, params, changed


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grows", [False, True], ids=["base", "grown"])
def test_an_adapter_of_ours_is_the_same_in_the_step_in_peft_and_merged(base, tmp_path, variant, grows):
    lora = LoraConfig(rank=4, alpha=10.0, variant=variant)
    c = open_checkpoint(str(base))
    c = grown(c, DUS) if grows else c
    partition, params, leaves = trained_adapter(c, lora, "new" if grows else "all")
    merged = partition.merged(params | {"lora": leaves}, {"lora": leaves})
    in_the_step = np.asarray(logits(c.cfg, merged, jnp.asarray(TOKENS)))
    layers = [i for i, trains in enumerate(partition.layers) if trains]
    write_peft(
        tmp_path, lows_of(jax.tree.map(np.asarray, leaves), lora, layers), lora, layers, str(base),
        replication_of(c.layer_map),
    )  # fmt: skip
    assert np.abs(in_the_step - np.asarray(logits(c.cfg, params, jnp.asarray(TOKENS)))).max() > 1e-2
    np.testing.assert_allclose(theirs(tmp_path, base), in_the_step, atol=1e-4)
    np.testing.assert_allclose(ours(tmp_path), in_the_step, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("ranges", [None, [[0, 4], [2, 6]]], ids=["base", "replicated"])
def test_an_adapter_of_pefts_is_applied(base, tmp_path, variant, ranges):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"], use_rslora=variant == "rslora",
        use_dora=variant == "dora", layer_replication=ranges, task_type="CAUSAL_LM", init_lora_weights=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        expected = model(torch.tensor(TOKENS)).logits.numpy()
    model.peft_config["default"].base_model_name_or_path = str(base)
    model.save_pretrained(tmp_path)
    assert open_checkpoint(str(tmp_path)).cfg.num_hidden_layers == (6 if ranges is None else 8)
    np.testing.assert_allclose(ours(tmp_path), expected, atol=1e-4)
    assert np.abs(ours(base) - expected).max() > 1e-2 if ranges is None else True


def test_a_first_adapter_changes_nothing(base):
    c = open_checkpoint(str(base))
    for variant in VARIANTS:
        lora = LoraConfig(rank=4, variant=variant)
        partition, params = make_partition("all", c.layer_map, lora), load_params(c, None, np.float32)
        leaves = first_adapter(c.cfg, lora, params["layers"], 0, "float32")
        found = logits(c.cfg, partition.merged(params, {"lora": leaves}), jnp.asarray(TOKENS))
        np.testing.assert_allclose(found, logits(c.cfg, params, jnp.asarray(TOKENS)), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"peft_type": "LOHA"}, "peft_type must be LORA, found 'LOHA'"),
        ({"bias": "all"}, "bias='all' is not supported"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save=\['lm_head'\] is not supported"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the base"),
        ({"r": 5}, r"needs lora_A \[5, in\] and lora_B \[out, 5\], found"),
        ({"use_dora": True}, "use_dora is True, found"),
        ({"r": None}, "r and lora_alpha must be numbers"),
    ],
)
def test_an_adapter_that_would_be_applied_wrongly_is_refused(base, tmp_path, change, expected):
    lora, c = LoraConfig(rank=4), open_checkpoint(str(base))
    _, _, leaves = trained_adapter(c, lora)
    write_peft(
        tmp_path, lows_of(jax.tree.map(np.asarray, leaves), lora, list(range(6))), lora, list(range(6)), str(base)
    )
    config = json.loads((tmp_path / PEFT_CONFIG).read_text())
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=expected):
        open_checkpoint(str(tmp_path))


def test_an_adapter_of_another_base_is_refused_with_both_shapes(base, tmp_path):
    lora, c = LoraConfig(rank=4), open_checkpoint(str(base))
    _, _, leaves = trained_adapter(c, lora)
    other = save_hf(hf_model(hidden_size=48, head_dim=16), tmp_path / "other")
    out = tmp_path / "adapter"
    out.mkdir()
    write_peft(out, lows_of(jax.tree.map(np.asarray, leaves), lora, list(range(6))), lora, list(range(6)), str(other))
    with pytest.raises(UserError, match=r"an adapter of another base: it has model\.layers\.0\.self_attn\.q_proj"):
        open_checkpoint(str(out))


def test_growth_by_copies_is_pefts_layer_replication():
    assert replication_of(dus(32, GrowthConfig(m=8))) == [[0, 24], [8, 32]]
    assert replication_of(make_layer_map(6, GrowthConfig("identity"))) is None
