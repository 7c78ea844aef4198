"""The config tree: what it refuses, and that the shipped configs are what their files say."""

import dataclasses
import importlib.util
import pathlib

import ml_collections
import pytest

from solar_jax.cli.config_keys import check_override
from solar_jax.config import Config, defaults, resolve
from solar_jax.errors import UserError
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.model.shapes import parameter_count
from solar_jax.training.run_folder import flat

DUS_48L = pathlib.Path(__file__).parents[1] / "configs" / "dus_48l.py"


def valid() -> ml_collections.ConfigDict:
    """The defaults with the four values that have no useful default."""
    config = defaults()
    config.name, config.source = "test", "smollm2"
    config.train.steps, config.train.batch_size = 10, 4
    return config


def with_value(key: str, value) -> ml_collections.ConfigDict:
    """`valid()` with one dotted key changed, whatever its type."""
    config = valid()
    *path, last = key.split(".")
    node = config
    for part in path:
        node = node[part]
    with node.ignore_type():
        node[last] = value
    return config


def dus_48l(*size: str) -> ml_collections.ConfigDict:
    module_spec = importlib.util.spec_from_file_location("dus_48l", DUS_48L)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module.get_config(*size)


def test_resolve_keeps_every_default_that_a_config_leaves_alone():
    expected = Config(name="test", source="smollm2")
    expected = dataclasses.replace(expected, train=dataclasses.replace(expected.train, steps=10, batch_size=4))
    assert resolve(valid()) == expected


def test_defaults_alone_are_no_run():
    with pytest.raises(UserError, match=r"config\.train\.steps must be at least 1, found 0"):
        resolve(defaults())


def test_a_resolved_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        resolve(valid()).train.steps = 3


def test_the_tree_stays_small_enough_to_read():
    assert len(flat(dataclasses.asdict(Config()))) < 120


@pytest.mark.parametrize(
    ("key", "known"),
    [("stepz", "train"), ("train.stepz", "steps"), ("optimizer.lr", "learning_rate"), ("growth.layers", "operator")],
)
def test_an_unknown_key_is_refused_with_the_known_ones(key, known):
    with pytest.raises(UserError) as e:
        resolve(with_value(key, 3))
    assert f"config.{key} is not a key" in str(e.value)
    assert known in str(e.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("train.steps", "10", "int"),
        ("train.steps", 10.0, "int"),
        ("train.steps", True, "int"),  # a bool is an int to isinstance
        ("train.control", 1, "bool"),
        ("optimizer.learning_rate", "2e-5", "float"),
        ("name", None, "str"),
        ("data.sources", "corpus.txt", "tuple"),  # a string is a sequence too
        ("data.sources", ("corpus.txt", 3), "tuple"),
        ("train", 3, "keys"),
    ],
)
def test_a_value_of_another_type_is_refused_by_key_type_and_value(key, value, expected):
    with pytest.raises(UserError) as e:
        resolve(with_value(key, value))
    assert f"config.{key} must" in str(e.value)
    assert expected in str(e.value)
    assert repr(value) in str(e.value)


def test_an_int_is_accepted_for_a_float_and_becomes_one():
    found = resolve(with_value("optimizer.clip_norm", 2)).optimizer.clip_norm
    assert (found, type(found)) == (2.0, float)


def test_a_list_is_accepted_for_a_tuple_and_becomes_one():
    assert resolve(with_value("data.sources", ["a.txt", "b.txt:2"])).data.sources == ("a.txt", "b.txt:2")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.steps", 0),
        ("train.batch_size", -4),
        ("train.accumulation", -1),
        ("data.sequence_length", 0),
        ("data.holdout_every", 1),
        ("data.sources", ()),
        ("data.packing", "first_fit"),
        ("data.mask_documents", False),  # with best_fit
        ("evaluation.windows", 0),
        ("evaluation.batch_size", 0),
        ("evaluation.every", -1),
        ("checkpoint.every", 0),
        ("checkpoint.keep", 0),
        ("seed", -1),
        ("source", ""),
        ("export.dtype", "int8"),
        ("optimizer.warmup_steps", -1),
        ("optimizer.weight_decay", -0.1),
        ("optimizer.clip_norm", -1.0),
        ("optimizer.learning_rate", -2e-5),
        ("optimizer.learning_rate", float("nan")),
        ("optimizer.learning_rate", float("inf")),
        ("optimizer.final_fraction", 1.5),
        ("optimizer.decay_fraction", -0.5),
        ("optimizer.b1", 1.5),
        ("optimizer.b1", 1.0),  # Adam divides by 1 - b1 ** t
        ("optimizer.b2", 1.0),
        ("optimizer.eps", -1e-8),
        ("logging.profile_start", -1),
        ("logging.profile_steps", 0),
        ("logging.watchdog_seconds", -1.0),
        ("optimizer.eps", 0.0),  # 0 / 0 for the embedding of a token that no batch has shown yet
    ],
)
def test_a_value_that_no_run_could_use_is_refused_by_key_and_value(key, value):
    with pytest.raises(UserError) as e:
        resolve(with_value(key, value))
    assert f"config.{key}" in str(e.value)
    assert str(value) in str(e.value)


@pytest.mark.parametrize(("old", "new"), [("float32", "float32"), ("bfloat16", "mixed")])
def test_a_config_file_from_before_precision_had_names_means_what_it_meant(old, new):
    config = valid()
    del config.train["precision"]
    config.train.compute_dtype = old
    assert resolve(config).train.precision == new


def test_an_old_value_without_a_counterpart_is_refused_with_both_keys():
    config = valid()
    config.train.compute_dtype = "float16"
    with pytest.raises(UserError, match=r"config\.train\.compute_dtype is config\.train\.precision now, .* 'float16'"):
        resolve(config)


def test_an_override_by_an_old_name_is_refused_with_the_new_one():
    with pytest.raises(UserError, match=r"compute_dtype is not a key .* config\.train\.precision now"):
        check_override("config.train.compute_dtype")


def test_a_batch_that_microbatches_do_not_divide_is_refused_with_both_numbers():
    with pytest.raises(UserError, match=r"config\.train\.batch_size=4 .* config\.train\.accumulation=3"):
        resolve(with_value("train.accumulation", 3))


def test_a_misspelt_override_is_refused_with_what_was_meant():
    with pytest.raises(UserError, match=r"config\.train\.stepz is not a key .* mean config\.train\.steps\?"):
        check_override("config.train.stepz")


def test_an_override_below_a_value_is_refused():
    with pytest.raises(UserError, match=r"config\.train\.steps\.now is not a key"):
        check_override("config.train.steps.now")


def test_every_key_may_be_overridden():
    for key in flat(dataclasses.asdict(Config())):
        check_override(key)


def test_documents_may_see_each_other_where_they_stand_in_their_order():
    config = with_value("data.mask_documents", False)
    config.data.packing = "concat"
    assert not resolve(config).data.mask_documents


def test_the_full_config_is_the_papers_growth():
    c = resolve(dus_48l())
    layer_map = make_layer_map(c.model.num_hidden_layers, c.growth)
    assert (c.model.num_hidden_layers, layer_map.layers) == (32, 48)
    assert parameter_count(c.model.architecture) == 7_241_732_096
    assert parameter_count(grown_config(c.model.architecture, layer_map)) == 10_731_524_096
    assert c.data.sequence_length == 4096


def test_the_small_config_grows_the_embedded_model_to_as_many_layers(smollm2):
    c = resolve(dus_48l("smollm2"))
    layer_map = make_layer_map(smollm2.cfg.num_hidden_layers, c.growth)
    assert (smollm2.cfg.num_hidden_layers, layer_map.layers) == (30, 48)
    assert parameter_count(grown_config(smollm2.cfg, layer_map)) == 198_236_736  # as its file says


def test_a_size_that_the_config_lacks_is_refused_with_those_it_has():
    with pytest.raises(UserError, match="sizes full and smollm2, found 'large'"):
        dus_48l("large")


def test_a_run_shorter_than_its_warmup_is_all_warmup_and_says_so(capsys):
    config = defaults()
    config.source, config.train.steps, config.train.batch_size, config.optimizer.warmup_steps = "smollm2", 7, 1, 200
    assert resolve(config).optimizer.warmup_steps == 7
    assert "config.optimizer.warmup_steps=200 is cut to config.train.steps=7" in capsys.readouterr().out
    config.optimizer.warmup_steps = 7
    assert resolve(config).optimizer.warmup_steps == 7
    assert capsys.readouterr().out == ""
