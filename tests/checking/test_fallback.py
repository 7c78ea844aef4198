"""A run's kernel is checked once a machine, and a wrong one is left for the next, with a warning."""

import dataclasses
import json

import jax
import pytest

from solar_jax import train
from solar_jax.checking import fallback
from solar_jax.checking.fallback import attention_for_run, case_of_run, marker_folder, probed_once, sound_attention
from solar_jax.checking.kernels import compared
from solar_jax.config import Config, DataConfig, MeshConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.hardware.slices import find_slice
from solar_jax.model.flash import flash_attention
from solar_jax.model.splash import splash_attention
from solar_jax.planning.search import of_slice, options
from tests.checking.test_kernels import CASE
from tests.parallel.test_rules import SMALL
from tests.test_train import make_config


def kernel(attend, scale: float = 1.0, window: int = CASE.window):
    """An interpreted kernel; with another scale or window than the case's it is wrong."""
    return lambda *x: scale * attend(*x, sliding_window=window, interpret=True)


def unsupported(*_):
    raise NotImplementedError("no such layout")


RIGHT = {"flash": kernel(flash_attention), "splash": kernel(splash_attention)}
WRONG = {"flash": kernel(flash_attention, window=71), "splash": kernel(splash_attention, scale=1.01)}


def chosen(kernels, wanted: str = "auto") -> tuple[str, list[str]]:
    """The kernel that a run which would take flash goes on with, of these kernels, and what it is warned of."""
    warnings = []
    name = sound_attention(
        wanted,
        choose=lambda name: "flash" if name == "auto" else name,
        probe=lambda name: compared(name, kernels[name], CASE).problem,
        warn=warnings.append,
    )
    return name, warnings


def test_a_right_kernel_is_kept_without_a_word():
    assert chosen(RIGHT) == ("auto", [])
    assert chosen(RIGHT, "splash") == ("splash", [])
    assert chosen({}, "xla") == ("xla", [])  # arrays' own attention is what kernels are compared with


def test_a_wrong_kernel_is_left_for_jaxs_with_a_warning():
    name, (said,) = chosen(RIGHT | {"flash": WRONG["flash"]})
    assert name == "splash"
    assert said.startswith("attention kernel 'flash' ")
    assert "differs by" in said
    assert said.endswith("the run takes 'splash' in its place")


def test_two_wrong_kernels_are_left_for_array_operations():
    name, warnings = chosen(WRONG)
    assert name == "xla"
    assert ["'splash'" in said for said in warnings] == [True, True]
    assert "the run takes 'xla'" in warnings[1]


def test_a_kernel_that_does_not_compile_is_left_too():
    name, (said,) = chosen(RIGHT | {"flash": unsupported})
    assert name == "splash"
    assert "does not run: NotImplementedError: no such layout" in said


def test_a_machine_is_probed_once_for_the_same_kernel_shapes_and_versions(tmp_path, monkeypatch):
    ran, folder = [], tmp_path / "made" / "when needed"

    def probe():
        ran.append(None)
        return ""

    for _ in range(2):
        assert probed_once("flash", CASE, folder, probe) == ""
    assert len(ran) == 1
    probed_once("splash", CASE, folder, probe)
    probed_once("flash", dataclasses.replace(CASE, length=512), folder, probe)
    monkeypatch.setattr(fallback, "machine_key", lambda: {"libtpu": "another"})
    probed_once("flash", CASE, folder, probe)
    assert len(ran) == 4
    for file in folder.iterdir():
        file.write_text("{")  # damaged
    probed_once("flash", CASE, folder, probe)
    probed_once("flash", CASE, None, probe)
    assert len(ran) == 6


def test_what_was_found_wrong_is_said_again_with_the_file_to_remove(tmp_path):
    probed_once("flash", CASE, tmp_path, lambda: "differs")
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["jax"] == jax.__version__
    assert probed_once("flash", CASE, tmp_path, lambda: "") == f"differs (found before; remove {file} to check again)"
    file.unlink()
    assert probed_once("flash", CASE, tmp_path, lambda: "") == ""


def test_a_folder_that_cannot_be_written_costs_no_run(tmp_path):
    (tmp_path / "file").write_text("")
    assert probed_once("flash", CASE, tmp_path / "file" / "folder", lambda: "") == ""


@pytest.mark.parametrize(("cache", "expected"), [("/somewhere/compiled/", "/somewhere/compiled_checked"), (None, None)])
def test_markers_are_beside_the_compilation_cache(cache, expected):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", cache)
    try:
        assert (marker_folder() and str(marker_folder())) == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def option_of(wanted: str = "auto"):
    train = TrainConfig(1, 8, remat="none", attention=wanted)
    config = Config(data=DataConfig(sequence_length=4096), train=train, mesh=MeshConfig(1, -1, 2, 1))
    return options(SMALL, config, of_slice(find_slice("v5e-8")))[0]


def test_a_row_is_compared_as_a_device_sees_it():
    cfg = dataclasses.replace(SMALL, num_attention_heads=8, num_key_value_heads=4, head_dim=128, sliding_window=1024)
    case = case_of_run(cfg, option_of().config, tensor=2, context=1)
    assert (case.heads, case.kv_heads, case.width, case.length, case.rows) == (4, 2, 128, 4096, 1)
    assert (case.dtype, case.window, case.segmented) == ("bfloat16", 1024, True)
    assert case_of_run(cfg, option_of().config, tensor=4, context=1).kv_heads == 1
    assert case_of_run(cfg, option_of().config, tensor=2, context=4).length == 1024


def test_a_run_on_a_tpu_probes_what_it_would_take(monkeypatch, tmp_path):
    monkeypatch.setattr(fallback, "marker_folder", lambda: tmp_path)
    probed, warnings = [], []

    def probe(kernel, case, say):
        probed.append(kernel)
        return "differs" if kernel == "flash" else ""

    monkeypatch.setattr(fallback, "probed_here", probe)
    assert attention_for_run(SMALL, option_of(), "tpu", print, warnings.append) == "splash"
    assert probed == ["flash", "splash"]
    assert len(warnings) == 1
    assert attention_for_run(SMALL, option_of("xla"), "tpu", print, warnings.append) == "xla"
    assert attention_for_run(SMALL, option_of("flash"), "cpu", print, warnings.append) == "flash"
    assert probed == ["flash", "splash"]


def test_a_run_is_planned_with_what_the_check_left(monkeypatch, tiny, text, tmp_path):
    planned, choose = [], train.search.choose

    def watched(cfg, config, *rest):
        planned.append(config.train.attention)
        if planned[-1] == "xla":
            raise UserError("planned with xla.")
        return choose(cfg, config, *rest)

    monkeypatch.setattr(train, "attention_for_run", lambda *_: "xla")
    monkeypatch.setattr(train.search, "choose", watched)
    with pytest.raises(UserError, match="planned with xla"):
        train.run(make_config(tiny, text), tmp_path / "run")
    assert planned[-2:] == ["auto", "xla"]
    assert not (tmp_path / "run").exists()
