"""Sharding rules: nothing falls through, and optimiser state lies where its parameter does."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from solar_jax.config import Config, ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.shapes import param_axes, param_shapes
from solar_jax.parallel import rules
from solar_jax.parallel.collectives import constrain_on
from tests.conftest import optimizer_of
from tests.parallel.test_mesh import mesh_of

FSDP = ("fsdp", "expert", "context")
SMALL = ModelConfig(64, 32, 48, 3, 4, 2, 8, 1024, 10000.0, 1e-5)


def test_a_letter_without_a_rule_raises():
    with pytest.raises(ValueError, match="'X' of an array 'DX' has no sharding rule"):
        rules.spec("DX", rules.PARAMETERS)


def test_a_mesh_axis_used_twice_raises():
    with pytest.raises(ValueError, match="'VF' would be sharded over one mesh axis twice"):
        rules.spec("VF", rules.PARAMETERS)


def test_a_mesh_axis_within_a_group_counts_as_used():
    table = {"B": ("data", "fsdp"), "D": "fsdp"}
    with pytest.raises(ValueError, match="twice"):
        rules.spec("BD", table)


def test_every_parameter_and_activation_letter_has_a_rule():
    letters = set("".join(jax.tree.leaves(param_axes(SMALL))))
    assert letters <= set(rules.PARAMETERS)
    assert set("BTDNKHFV.") <= set(rules.ACTIVATIONS)


@pytest.mark.parametrize("shape", [(1, 4, 2), (2, 2, 2), (1, 1, 1), (1, 2, 1, 2, 2)])
def test_parameters_rest_as_the_table_says(shape):
    mesh = mesh_of(*shape)
    found = jax.tree.map(lambda s: (s.mesh, s.spec), rules.parameter_shardings(SMALL, mesh))
    specs = {
        "embed": ("tensor", FSDP),
        "layers": {
            "attn_norm": (None, FSDP),
            "q_proj": (None, FSDP, "tensor", None),
            "k_proj": (None, FSDP, "tensor", None),
            "v_proj": (None, FSDP, "tensor", None),
            "o_proj": (None, "tensor", None, FSDP),
            "mlp_norm": (None, FSDP),
            "gate_proj": (None, FSDP, "tensor"),
            "up_proj": (None, FSDP, "tensor"),
            "down_proj": (None, "tensor", FSDP),
        },
        "final_norm": (FSDP,),
        "lm_head": (FSDP, "tensor"),
    }
    expected = jax.tree.map(lambda s: (mesh, PartitionSpec(*s)), specs, is_leaf=lambda x: isinstance(x, tuple))
    assert found == expected


def test_a_tied_model_has_no_head_to_shard():
    tied = dataclasses.replace(SMALL, tie_word_embeddings=True)
    assert "lm_head" not in rules.parameter_shardings(tied, mesh_of(1, 4, 2))


def test_every_matrix_is_split_over_both_axes():
    # A parameter that no rule splits would be held whole by every chip, which no error would tell.
    shapes, shardings = param_shapes(SMALL), rules.parameter_shardings(SMALL, mesh_of(1, 4, 2))
    for path, x in jax.tree.leaves_with_path(shapes):
        sharding = shardings
        for key in path:
            sharding = sharding[key.key]
        parts = x.size // math.prod(sharding.shard_shape(x.shape))
        assert parts == (4 if path[-1].key.endswith("norm") else 8), jax.tree_util.keystr(path)


@pytest.mark.parametrize(
    ("shape", "change", "named"),
    [
        ((1, 8, 1), {"hidden_size": 36}, ("config.mesh.fsdp=8", "hidden_size=36")),
        ((1, 4, 1, 2), {"hidden_size": 36}, ("config.mesh.fsdp=4 x context=2 does not", "hidden_size=36")),
        ((1, 1, 4), {}, ("config.mesh.tensor=4", "num_key_value_heads=2")),
        ((1, 1, 2), {"intermediate_size": 49}, ("config.mesh.tensor=2", "intermediate_size=49")),
        ((1, 1, 2), {"num_attention_heads": 5}, ("config.mesh.tensor=2", "num_attention_heads=5")),
    ],
)
def test_a_mesh_axis_that_does_not_divide_is_refused_with_both_numbers(shape, change, named):
    with pytest.raises(UserError) as e:
        rules.parameter_shardings(dataclasses.replace(SMALL, **change), mesh_of(*shape))
    for part in named:
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("change", "embed", "head"),
    [
        ({}, ("tensor", rules.FSDP), (rules.FSDP, "tensor")),
        ({"vocab_size": 65}, (None, (*rules.FSDP, "tensor")), ((*rules.FSDP, "tensor"), None)),
        ({"vocab_size": 65, "hidden_size": 36}, (None, rules.FSDP), (rules.FSDP, None)),  # 36 / 8 is no integer
    ],
)
def test_a_vocabulary_that_tensor_does_not_divide_rests_over_the_hidden_axis(change, embed, head):
    mesh = mesh_of(1, 4, 2)
    cfg = dataclasses.replace(SMALL, **change)
    found = rules.parameter_shardings(cfg, mesh)
    assert (found["embed"].spec, found["lm_head"].spec) == (PartitionSpec(*embed), PartitionSpec(*head))
    moments = rules.like_parameters({"mu": param_shapes(cfg)}, cfg, mesh)["mu"]
    assert moments == found


@pytest.mark.parametrize("shape", [(1, 4, 2), (1, 8, 1), (2, 2, 2), (1, 2, 1, 2, 2)])
def test_every_adam_moment_lies_as_its_parameter(shape):
    mesh = mesh_of(*shape)
    opt_state = jax.eval_shape(optimizer_of(Config()).init, param_shapes(SMALL))
    found = rules.like_parameters(opt_state, SMALL, mesh)
    adam = [s for s in jax.tree.leaves(found, is_leaf=_is_adam) if _is_adam(s)]
    assert len(adam) == 1
    assert adam[0].mu == rules.parameter_shardings(SMALL, mesh)
    assert adam[0].nu == rules.parameter_shardings(SMALL, mesh)
    assert adam[0].count == NamedSharding(mesh, PartitionSpec())


def _is_adam(x) -> bool:
    return isinstance(x, optax.ScaleByAdamState)


def test_an_array_of_optimiser_state_without_a_rule_raises():
    # Replicated quietly, it could be as large as the model.
    tree = {"mu": param_shapes(SMALL), "factors": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
    with pytest.raises(ValueError, match=r"\['factors'\] of shape \(64, 32\) has no sharding rule"):
        rules.like_parameters(tree, SMALL, mesh_of(1, 8, 1))


def test_a_name_within_another_name_is_no_match():
    tree = {"mu": {"old_embed": jax.ShapeDtypeStruct((64, 32), jnp.float32)}}
    with pytest.raises(ValueError, match="old_embed"):
        rules.like_parameters(tree, SMALL, mesh_of(1, 8, 1))


@pytest.mark.parametrize(
    ("rows", "shape", "microbatches", "expected"),
    [
        (8, (2, 2, 2), 1, 8),
        (6, (2, 2, 2), 1, 8),
        (1, (1, 8, 1), 1, 8),
        (6, (1, 2, 1), 3, 6),
        (7, (1, 2, 1), 2, 8),
        (3, (1, 2, 1, 2, 2), 1, 4),
    ],
)
def test_rows_are_made_up_to_what_devices_and_microbatches_divide(rows, shape, microbatches, expected):
    assert rules.padded_rows(rows, mesh_of(*shape), microbatches) == expected


def test_a_batch_is_split_over_data_and_fsdp_and_whole_over_tensor():
    sharding = rules.batch_sharding(mesh_of(2, 2, 2))
    assert sharding.shard_shape((8, 16)) == (2, 16)


def test_a_constraint_lays_an_activation_out():
    mesh = mesh_of(2, 2, 2)
    x = jax.jit(lambda x: constrain_on(mesh)(x, "BTF"))(jnp.zeros((8, 4, 6)))
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")), 3)
