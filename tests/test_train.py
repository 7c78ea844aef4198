"""Whole runs: what they leave behind, that they go on exactly, and that bad input leaves nothing."""

import dataclasses
import importlib.util
import json
import pathlib
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from solar_jax import train
from solar_jax.checkpoints.checkpoint import from_params
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import Config, MeshConfig, defaults, resolve
from solar_jax.errors import UserError
from solar_jax.model import llama
from solar_jax.model.shapes import parameter_count
from solar_jax.orbax_store.layout import newest
from solar_jax.parallel.mesh import make_mesh
from solar_jax.parallel.rules import parameter_shardings
from solar_jax.training import loop, run_folder, stages
from solar_jax.training.report import result_table
from tests.conftest import byte_tokenizer, hf_model, save_hf

REPO = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> pathlib.Path:
    """A small text with something to learn in it."""
    file = tmp_path_factory.mktemp("text") / "corpus.txt"
    rng = np.random.default_rng(0)
    words = ["depth", "up", "scaling", "grows", "a", "model", "by", "its", "own", "layers", "and", "heals", "it"]
    file.write_text(" ".join(rng.choice(words, 3000)))
    return file


def make_config(source: pathlib.Path | str, text: pathlib.Path, **changes) -> Config:
    """A run of seconds; `changes` are dotted keys with _ for the dot of the first level, as train_steps."""
    config = defaults()
    config.name, config.source = "test", str(source)
    config.growth.m = 2
    config.data.sources, config.data.sequence_length = (str(text),), 32
    config.train.steps, config.train.batch_size, config.train.remat = 6, 8, "none"
    config.train.precision = "float32"
    config.optimizer.learning_rate, config.optimizer.warmup_steps = 3e-3, 2
    config.evaluation.every, config.evaluation.windows, config.evaluation.batch_size = 2, 8, 8
    config.checkpoint.every, config.export.dtype = 3, "float32"
    for key, value in changes.items():
        group, _, name = key.partition("_")
        if name:
            config[group][name] = value
        else:
            config[group] = value
    return resolve(config)


def metrics(folder: pathlib.Path) -> list[tuple]:
    """The part of each step that must repeat bit by bit; rates are the machine's."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(r["step"], r["loss"], r["grad_norm"], r["learning_rate"], r["tokens"]) for r in lines]


@pytest.fixture(scope="module")
def finished(tiny, text, tmp_path_factory) -> tuple[Config, pathlib.Path, dict]:
    """An uninterrupted run with a control."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    config = make_config(tiny, text, train_control=True)
    return config, folder, train.run(config, folder)


def test_a_run_leaves_every_promised_file_and_key(finished):
    config, folder, summary = finished
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert summary["layers"] == 8
    assert summary["base_layers"] == 6
    assert summary["source_layers"] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert summary["tokens"] == 6 * 8 * 32
    assert summary["params"] == parameter_count(open_checkpoint(str(folder / "hf")).cfg)
    assert [r[0] for r in metrics(folder)] == list(range(1, 7))
    keys = {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "memory_peak_gib"}
    keys |= {f"{name}_seconds" for name in ("data", "compute", "evaluation", "checkpoint")}
    assert set(json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])) == keys
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((folder / "config.json").read_text())["train"]["steps"] == config.train.steps
    assert sorted(p.name for p in folder.iterdir()) == [
        "checkpoints", "config.json", "control", "data.json", "evals.jsonl", "goodput.json", "hf", "loss.png",
        "metrics.jsonl", "model", "summary.json",
    ]  # fmt: skip


def test_another_cut_is_trained_beside_on_the_same_tokens_and_changes_no_number_of_the_run(
    finished, tiny, text, tmp_path
):
    _, whole, summary = finished
    found = train.run(make_config(tiny, text, growth_beside="1:3"), tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(whole)
    cut = found["beside"]
    assert (cut["operator"], cut["source_layers"]) == ("blocks(1:3)", [0, 1, 2, 1, 2, 3, 4, 5])
    assert [r[0] for r in metrics(tmp_path / "run/beside")] == list(range(1, 7))
    assert cut["final_loss"] < cut["zero_token_loss"] != summary["zero_token_loss"]
    alone = make_config(tiny, text, growth_operator="blocks", growth_blocks="1:3")
    assert train.run(alone, tmp_path / "alone")["final_loss"] == cut["final_loss"]
    table = result_table(found).splitlines()
    assert [line.split()[0] for line in table] == ["model", "base", "grown,", "healed", "grown,", "healed"]
    assert table[4].startswith("grown, blocks(1:3)")


def test_the_lineage_leads_from_the_healed_model_to_the_base(finished, tiny):
    config, folder, _ = finished
    healed = json.loads((folder / "hf" / "lineage.json").read_text())
    (run,) = healed["parents"]
    assert run == json.loads((folder / "model" / "lineage.json").read_text())
    assert (healed["made_by"], healed["operator"], healed["steps"]) == ("train", "identity", config.train.steps)
    assert (run["made_by"], run["operator"], run["name"]) == ("train", "dus(m=2)", "test")
    assert run["source_layers"] == [0, 1, 2, 3, 2, 3, 4, 5]
    assert (run["source"]["where"], run["parents"]) == (tiny.name, [])
    assert not (folder / ".hf.partial").exists()


def test_training_heals_and_the_control_starts_from_the_base(finished):
    _, folder, summary = finished
    evals = [json.loads(line) for line in (folder / "evals.jsonl").read_text().splitlines()]
    loss = {(r["arm"], r["step"]): r["loss"] for r in evals}
    assert summary["final_loss"] < summary["zero_token_loss"]
    assert summary["control_loss"] < summary["base_loss"] == loss["control", 0]
    assert {step for arm, step in loss if arm == "healed"} == {0, 2, 4, 6}


def test_transformers_loads_the_healed_model_with_our_logits(finished):
    _, folder, _ = finished
    tokens = np.random.default_rng(3).integers(0, 320, (2, 100))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=torch.float32)
    with torch.no_grad():
        theirs = model(torch.tensor(tokens)).logits.numpy()
    ours = open_checkpoint(str(folder))  # the run's own checkpoint, not what was exported from it
    np.testing.assert_allclose(llama.logits(ours.cfg, load_params(ours), jnp.array(tokens)), theirs, atol=1e-4)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert tokenizer("depth")["input_ids"] == byte_tokenizer().encode("depth").ids


def test_a_finished_run_is_not_run_again(finished, monkeypatch):
    config, folder, summary = finished
    monkeypatch.setattr(train, "RECIPES", None)
    assert train.run(config, folder) == summary


@pytest.mark.parametrize("moment", ["healed step 5", "healed: written", "control step 2"])
def test_an_interrupted_run_goes_on_bit_by_bit(finished, tmp_path, monkeypatch, moment):
    config, whole, summary = finished

    def interrupt(line=""):
        if line.startswith(moment):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "say", interrupt)
        patch.setattr(stages, "say", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "run")
    assert not (tmp_path / "run" / "summary.json").exists()
    resumed = train.run(config, tmp_path / "run")
    for part in ("", "control"):
        assert metrics(tmp_path / "run" / part) == metrics(whole / part)
    for key in ("base_loss", "zero_token_loss", "final_loss", "control_loss"):
        assert resumed[key] == summary[key]
    weights = [(f / "hf" / "model.safetensors").read_bytes() for f in (tmp_path / "run", whole)]
    assert weights[0] == weights[1]


def test_the_mesh_changes_no_loss(finished, tiny, text, tmp_path):
    config, whole, _ = finished
    expected = [r[1] for r in metrics(whole)]
    for i, mesh in enumerate([MeshConfig(8, 1), MeshConfig(2, 2, tensor=2), MeshConfig(1, 2, context=2, slice=2)]):
        other = dataclasses.replace(config, mesh=mesh, train=dataclasses.replace(config.train, control=False))
        train.run(other, tmp_path / str(i))
        np.testing.assert_allclose([r[1] for r in metrics(tmp_path / str(i))], expected, rtol=1e-5)


def test_a_batch_that_does_not_divide_over_the_devices_is_padded_and_gives_the_same_loss(tiny, text, tmp_path):
    """Five rows: padded to eight where rows are split eight ways, and where they are split four ways too."""
    config = make_config(tiny, text, train_batch_size=5, train_steps=2)
    train.run(config, tmp_path / "padded")
    tensor = dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, data=4, fsdp=1, tensor=2))
    train.run(tensor, tmp_path / "tensor")
    padded, other = ([r[1] for r in metrics(tmp_path / name)] for name in ("padded", "tensor"))
    np.testing.assert_allclose(padded, other, rtol=1e-5)


def test_a_vocabulary_that_no_axis_divides_trains_to_the_same_losses_and_comes_back_whole(text, tmp_path):
    folder = save_hf(hf_model(vocab_size=323, num_hidden_layers=4), tmp_path / "model")
    losses = []
    for name, mesh in (("data", MeshConfig(8, 1)), ("tensor", MeshConfig(2, 2, tensor=2))):
        config = dataclasses.replace(make_config(folder, text, train_steps=3, growth_m=1), mesh=mesh)
        train.run(config, tmp_path / name)
        losses.append([r[1] for r in metrics(tmp_path / name)])
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-5)
    healed = open_checkpoint(str(tmp_path / "tensor" / "hf"))
    assert healed.shape_of["lm_head.weight"] == healed.shape_of["model.embed_tokens.weight"] == (323, 64)
    # Loaded onto the mesh and read back, nothing changes.
    c = open_checkpoint(str(folder))
    params = load_params(c, parameter_shardings(c.cfg, make_mesh(MeshConfig(2, 2, tensor=2))))
    back = from_params(params, c.cfg, c.hf_config, {})
    for name in c.shape_of:
        assert back.read(name).tobytes() == c.read(name).tobytes(), name


def test_the_full_size_recipe_runs_on_a_tiny_base_and_keeps_float32_state(tiny, text, tmp_path):
    """bfloat16 compute, full remat, cosine, documents masked, accumulated: all that the laptop's sibling leaves out."""
    spec = importlib.util.spec_from_file_location("dus_48l", REPO / "configs" / "dus_48l.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config("full")
    config.model = defaults().model
    config.source, config.growth.m, config.data.sources = str(tiny), 2, (str(text),)
    config.data.sequence_length, config.data.holdout_every = 32, 8
    config.train.steps, config.train.batch_size, config.train.accumulation = 4, 16, 2
    config.optimizer.warmup_steps, config.optimizer.learning_rate = 1, 3e-3
    config.evaluation.every, config.evaluation.windows, config.evaluation.batch_size = 2, 8, 8
    config.checkpoint.every = 2
    summary = train.run(resolve(config), tmp_path / "run")
    assert summary["final_loss"] < summary["zero_token_loss"]
    config.train.precision = "float32"
    exact = train.run(resolve(config), tmp_path / "float32")
    for key in ("base_loss", "zero_token_loss", "final_loss"):
        assert summary[key] == pytest.approx(exact[key], abs=0.03)  # bfloat16 keeps 8 bits of mantissa
    trained = open_checkpoint(str(tmp_path / "run"))
    rounded = load_params(trained)["layers"]["up_proj"].astype(jnp.bfloat16).astype(jnp.float32)
    assert not jnp.array_equal(rounded, load_params(trained)["layers"]["up_proj"])
    assert open_checkpoint(str(tmp_path / "run" / "hf")).dtype == "bfloat16"


@pytest.mark.parametrize(("trainable", "moved"), [("new", {4, 5}), ("seam", {3, 4}), ("no_embed", set(range(8)))])
def test_frozen_layers_leave_the_run_as_they_came(tiny, text, tmp_path, trainable, moved):
    train.run(make_config(tiny, text, train_trainable=trainable, train_steps=2), tmp_path / "run")
    base = safetensors.numpy.load_file(tiny / "model.safetensors")
    out = safetensors.numpy.load_file(tmp_path / "run" / "hf" / "model.safetensors")
    source = [0, 1, 2, 3, 2, 3, 4, 5]
    changed = {
        i
        for i in range(8)
        for name in base
        if f"layers.{source[i]}." in name
        and not np.array_equal(out[name.replace(f"layers.{source[i]}.", f"layers.{i}.")], base[name])
    }
    assert changed == moved
    assert np.array_equal(out["model.embed_tokens.weight"], base["model.embed_tokens.weight"])
    assert np.array_equal(out["lm_head.weight"], base["lm_head.weight"])


@pytest.mark.slow
def test_a_run_all_in_bfloat16_is_interrupted_goes_on_bit_by_bit_and_is_exported(tiny, text, tmp_path, monkeypatch):
    config = make_config(
        tiny, text, train_precision="bf16", train_steps=3, evaluation_every=0, checkpoint_every=1,
        export_dtype="bfloat16",
    )  # fmt: skip
    train.run(config, tmp_path / "whole")

    def interrupt(line=""):
        if "step 3/" in line:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "say", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "parts")
    train.run(config, tmp_path / "parts")
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    whole, parts = ((tmp_path / f / "hf" / "model.safetensors").read_bytes() for f in ("whole", "parts"))
    assert parts == whole
    # Nothing is rounded once more on the way out, but for the norms' scales, which are trained in float32.
    trained = load_params(open_checkpoint(str(tmp_path / "whole")))["layers"]
    assert (trained["up_proj"] == trained["up_proj"].astype(jnp.bfloat16)).all()
    assert (trained["mlp_norm"] != trained["mlp_norm"].astype(jnp.bfloat16)).any()


def test_training_goes_on_from_our_own_checkpoint(finished, text, tmp_path):
    _, folder, summary = finished
    again = train.run(make_config(folder, text, growth_operator="identity", train_steps=2), tmp_path / "run")
    assert again["base_layers"] == 8
    assert again["base_loss"] == pytest.approx(summary["final_loss"], rel=1e-6)


def test_a_run_of_an_older_version_is_known_by_what_its_keys_meant(finished, tmp_path):
    config, folder, _ = finished
    old = json.loads((folder / "config.json").read_text())
    assert old["train"].pop("precision") == "float32"
    old["train"]["compute_dtype"] = "float32"
    del old["logging"]["watchdog_seconds"]  # a key that came later
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert run_folder.check_owner(tmp_path, config)
    old["train"]["compute_dtype"] = "bfloat16"
    (tmp_path / "config.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match=r"whose config\.train\.precision is 'mixed' where this one's is 'float32'"):
        run_folder.check_owner(tmp_path, config)


def test_a_folder_that_holds_another_run_is_left_alone(finished, tmp_path):
    config, folder, _ = finished
    other = dataclasses.replace(config, seed=1)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    with pytest.raises(UserError, match=r"another run, whose config\.seed is 0 where this one's is 1"):
        train.run(other, folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds files but no run"):
        train.run(config, tmp_path)


def test_a_run_goes_on_with_what_was_allowed_to_change_and_with_nothing_else(finished, tmp_path, monkeypatch):
    config, whole, _ = finished

    def interrupt(line=""):
        if line.startswith("healed step 5"):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "say", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, tmp_path / "run")
    longer = dataclasses.replace(config, train=dataclasses.replace(config.train, steps=7, precision="bf16"))
    with pytest.raises(UserError, match=r"precision is 'float32' where this one's is 'bf16', config.train.steps is 6 "):
        train.run(longer, tmp_path / "run", ["seed"])
    words = tmp_path / "other.txt"
    words.write_text(" ".join(np.random.default_rng(1).choice(["other", "words"], 3000)))
    other = dataclasses.replace(longer, data=dataclasses.replace(longer.data, sources=(str(words),)))
    with pytest.raises(UserError, match=r"other data, train source 0: 388 rows .* where this one has .*=data resumes"):
        train.run(other, tmp_path / "run", ["train", "data.sources"])
    with pytest.raises(UserError, match=r"--allow_changed=train.stepz: .* did you mean train.steps"):
        train.run(longer, tmp_path / "run", ["train.stepz"])
    assert metrics(tmp_path / "run") == metrics(whole)[:5]
    summary = train.run(longer, tmp_path / "run", ["train"])  # the state of step 3, as bfloat16
    assert [r[0] for r in metrics(tmp_path / "run")] == list(range(1, 8))
    assert metrics(tmp_path / "run")[:3] == metrics(whole)[:3]
    assert summary["tokens"] == 7 * 8 * 32
    assert json.loads((tmp_path / "run" / "config.json").read_text())["train"]["steps"] == 7


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "solar_jax.train", *arguments], cwd=REPO, capture_output=True, text=True, check=False
    )


@pytest.mark.slow
def test_kill_9_then_the_same_command_goes_on(finished, tmp_path):
    """The real thing: another process, killed by the system in the middle of a step."""
    config, whole, _ = finished
    file = tmp_path / "config.py"
    file.write_text(
        "import json, ml_collections\n"
        f"def get_config(): return ml_collections.ConfigDict(json.loads({json.dumps(dataclasses.asdict(config))!r}))\n"
    )
    arguments = [f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "solar_jax.train", *arguments], cwd=REPO, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("healed step 5"):
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    found = newest(tmp_path / "run")  # that of step 3, unless it was still being written
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert ("resuming from the checkpoint of step 3" in done.stdout) == (found is not None)
    assert metrics(tmp_path / "run") == metrics(whole)
