"""The whole recipe as one command, on tiny models: what it says, skips, refuses and resumes, and what it leaves."""

import dataclasses
import json
import math
import os
import pathlib
import random
import runpy
import signal
import subprocess
import sys
import time

import ml_collections
import pytest
import transformers

from solar_jax import chain as command
from solar_jax.chaining.stages import Chain, resolve_chain
from solar_jax.cli.config_files import load_config
from solar_jax.errors import UserError
from solar_jax.training.run_folder import config_dict
from tests.evaluation import h6_data
from tests.test_train import make_config

ROOT = pathlib.Path(__file__).parents[1]
WORDS = ["red", "green", "blue", "one", "two", "three", "cat", "dog", "sun", "moon"]


def sentence(i: int, n: int) -> str:
    return " ".join(WORDS[(i * 7 + k * 3) % len(WORDS)] for k in range(n))


def write_config(file: pathlib.Path, config) -> str:
    """A config file of a config."""
    content = json.dumps(config_dict(config))
    file.write_text(
        "import json\nimport ml_collections\n\n\ndef get_config():\n"
        f"    return ml_collections.ConfigDict(json.loads({content!r}))\n"
    )
    return str(file)


@pytest.fixture(scope="module")
def configs(tiny, tmp_path_factory) -> dict[str, str]:
    """Config files of a small recipe, by stage."""
    folder = tmp_path_factory.mktemp("configs")
    (folder / "text.txt").write_text(" ".join(sentence(i, 9) for i in range(600)))
    answers = [{"prompt": sentence(i, 3), "completion": sentence(i + 1000, 1 + i % 5)} for i in range(90)]
    pairs = [
        {"prompt": sentence(i, 2), "chosen": sentence(i + 2000, 2), "rejected": "no " * (1 + i % 3)} for i in range(90)
    ]
    for name, records in (("answers", answers), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))

    def one(name: str, data: str, form: str, growth: str) -> str:
        more = {} if form == "text" else {"data_packing": "best_fit", "data_template": "solar"}
        config = make_config(
            tiny, folder / data, growth_operator=growth, data_holdout_every=6, evaluation_every=2,
            data_sequence_length=96, train_steps=4, checkpoint_every=2, **more,
        )  # fmt: skip
        growth_of = dataclasses.replace(config.growth, m=1 if growth == "dus" else 0)
        data_of = dataclasses.replace(config.data, format=form)
        return write_config(
            folder / f"{name}.py", dataclasses.replace(config, name=name, data=data_of, growth=growth_of)
        )

    return {
        "grow": one("grow", "text.txt", "text", "dus"),
        "sft": one("sft", "answers.jsonl", "conversations", "identity"),
        "dpo": one("dpo", "pairs.jsonl", "pairs", "identity"),
    }


def content(configs: dict[str, str]) -> dict:
    return {
        "name": "tiny",
        "stages": (
            {"name": "grow", "config": configs["grow"]},
            {"name": "sft", "config": configs["sft"], "start": "grow"},
            {"name": "dpo", "config": configs["dpo"], "start": "sft"},
            {"name": "again", "config": configs["dpo"], "start": "sft", "changes": {"seed": 5}},
            {"name": "merge", "models": ("dpo", "again"), "candidates": "linear:0.5,slerp:0.4",
             "eval_config": configs["dpo"], "reference": "sft"},
        ),
        "measures": tuple(configs.values()),
    }  # fmt: skip


def made(configs: dict[str, str], **changes) -> Chain:
    return resolve_chain(content(configs) | changes)


@pytest.fixture(scope="module")
def ran(configs, tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("chain") / "run"
    data = h6_data.write(tmp_path_factory.mktemp("h6"))
    command.run_chain(made(configs, tasks=("winogrande",), task_data=str(data)), folder)
    return folder


def test_a_first_stage_from_scratch_is_measured_against_its_new_model(tiny, configs, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1}  # fmt: skip
    changes = {"source": f"scratch:{tiny}", "growth.operator": "identity", "growth.m": 0}
    changes |= {f"model.{key}": value for key, value in sizes.items()}
    stage = {"name": "grow", "config": configs["grow"], "changes": changes}
    command.run_chain(made(configs, stages=(stage,), measures=(configs["grow"],)), tmp_path / "run")
    record = json.loads((tmp_path / "run" / "chain.json").read_text())["stages"]
    (base,) = record["base"]["measured"].values()
    config = json.loads((tmp_path / "run" / "grow" / "hf" / "config.json").read_text())
    assert config["hidden_size"] == 16
    assert base["loss"] == pytest.approx(math.log(config["vocab_size"]), rel=0.02)  # it knows nothing


@pytest.mark.slow  # five stages
def test_the_result_is_a_chat_model_with_the_history_of_every_stage(ran):
    tokenizer = transformers.AutoTokenizer.from_pretrained(ran / "merge")
    model = transformers.AutoModelForCausalLM.from_pretrained(ran / "merge")
    assert model.config.num_hidden_layers == 10
    messages = [{"role": "user", "content": "red"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "### User:\nred\n\n"
    ids = json.loads((ran / "merge" / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.eos_token_id in (ids if isinstance(ids, list) else [ids])
    record, stages = json.loads((ran / "merge" / "lineage.json").read_text()), []
    while record:
        stages.append((record["made_by"], record.get("name")))
        record = (record["parents"] or [None])[0]
    assert stages == [("merge", None), ("train", "dpo"), ("train", "sft"), ("train", "grow")]
    card = (ran / "merge" / "README.md").read_text()
    assert "of dpo, again, merged with solar_jax." in card
    assert "- depth-up-scaling\n- merge\n" in card
    for name in ("base", "grow", "sft", "dpo", "again", "linear (0.5, 0.5)", "slerp (0.6, 0.4)"):
        assert f"| {name} |" in card
    scores = {name: of["scores"] for name, of in json.loads((ran / "chain.json").read_text())["stages"].items()}
    assert set(scores) == {"base", "grow", "sft", "dpo", "again", "merge"}, "tasks are measured after each stage"
    assert all(set(of) == {"winogrande/acc"} for of in scores.values())
    assert "| winogrande/acc | " in card
    table = json.loads((ran / "merge" / "candidates.json").read_text())
    losses = {name: next(iter(of.values()))["loss"] for name, of in table["measured"].items()}
    assert table["best"] == min(losses, key=lambda name: losses[name])


@pytest.mark.slow
def test_finished_stages_are_skipped_and_nothing_is_measured_again(ran, configs, capsys):
    before = {file: file.stat().st_mtime_ns for file in ran.rglob("*") if file.is_file()}
    command.run_chain(made(configs), ran)
    assert {file: file.stat().st_mtime_ns for file in ran.rglob("*") if file.is_file()} == before
    said = capsys.readouterr().out
    assert said.count("is finished") == 5
    assert "preference accuracy" in said


@pytest.mark.slow
def test_a_changed_stage_is_refused_with_the_difference_and_dry_runs_write_nothing(ran, configs, tmp_path, capsys):
    changed = content(configs)
    changed["stages"][1]["changes"] = {"train.steps": 5}
    with pytest.raises(UserError, match=r"sft: was begun with changes \{\}, now it is .*--rerun=sft runs it again"):
        command.run_chain(resolve_chain(changed), ran)
    command.run_chain(resolve_chain(changed), ran, ["sft"], dry_run=True)
    assert "run again, their folders deleted: sft, dpo, again, merge" in capsys.readouterr().out
    assert (ran / "sft" / "summary.json").exists()
    file = pathlib.Path(configs["dpo"])
    text = file.read_text()
    file.write_text(text.replace('"beta": 0.1', '"beta": 0.2'))
    with pytest.raises(UserError, match=r"preferences.beta is 0.1 where this one's is 0.2; --rerun=dpo runs it again"):
        command.run_chain(made(configs), ran)
    file.write_text(text)


@pytest.mark.slow
def test_a_result_that_was_replaced_is_not_built_upon_unnoticed(ran, configs):
    file = ran / "chain.json"
    text = file.read_text()
    content_of = json.loads(text)
    content_of["stages"]["dpo"]["inputs"]["sft"] = "[]"
    file.write_text(json.dumps(content_of))
    try:
        with pytest.raises(UserError, match="has changed since dpo began from it; --rerun=dpo"):
            command.run_chain(made(configs), ran)
    finally:
        file.write_text(text)


@pytest.mark.slow  # starts the command again and again
def test_killed_at_random_moments_it_ends_in_the_same_bits(ran, configs, tmp_path):
    file = tmp_path / "chain.py"
    file.write_text(
        f"import ml_collections\n\n\ndef get_config():\n    return ml_collections.ConfigDict({content(configs)!r}, "
        "convert_dict=False)\n"
    )
    folder, rng, kills = tmp_path / "run", random.Random(3), 0
    arguments = [sys.executable, "-m", "solar_jax.chain", f"--config={file}", f"--workdir={folder}"]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    with (tmp_path / "log").open("w") as log:
        while kills < 3:
            process = subprocess.Popen(arguments, cwd=ROOT, stdout=log, stderr=log, env=environment)
            time.sleep(rng.uniform(8, 20))
            if process.poll() is not None:
                break
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        done = subprocess.run(arguments, cwd=ROOT, stdout=log, stderr=log, env=environment, check=False)
    assert done.returncode == 0, (tmp_path / "log").read_text()[-3000:]
    assert kills
    for stage in ("grow/hf", "sft/hf", "dpo/hf", "again/hf", "merge"):
        weights = "model.safetensors"
        assert (folder / stage / weights).read_bytes() == (ran / stage / weights).read_bytes(), stage


REFUSED = {
    "key": ({"sources": ()}, "the chain: the key 'sources' is unknown"),
    "tasks": ({"tasks": "h6"}, "the chain: tasks must be a list of names, found 'h6'"),
    "limit": ({"task_limit": 5}, "config.evaluation.task_limit=5 needs config.evaluation.tasks"),
    "no stages": ({"stages": ()}, "the chain has no stages"),
    "measure": ({"measures": ("nothing.py",)}, "nothing.py: no such file"),
}
BAD_STAGES = {
    "key": ({"begin": "grow"}, "stage 'x': the key 'begin' is unknown"),
    "no config": ({"config": None}, "stage 'x': config is missing"),
    "start": (
        {"start": "later"},
        r"stage 'x': must start from one of the stages before it \(\['grow'\]\), found 'later'",
    ),
    "change": ({"changes": {"train.stesp": 3}}, "stesp"),
    "name": ({"name": "grow"}, "stage 'grow': a stage needs a name of its own"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_a_chain_that_cannot_be_is_refused_before_anything_runs(configs, mistake):
    change, said = REFUSED[mistake]
    with pytest.raises(UserError, match=said):
        made(configs, **change)


@pytest.mark.parametrize("mistake", BAD_STAGES)
def test_a_stage_that_cannot_be_is_named(configs, mistake):
    change, said = BAD_STAGES[mistake]
    stage = {
        key: value for key, value in ({"name": "x", "config": configs["sft"]} | change).items() if value is not None
    }
    with pytest.raises(UserError, match=said):
        made(configs, stages=(content(configs)["stages"][0], stage))


@pytest.mark.parametrize("size", ["full", "smollm2"])
def test_the_recipe_that_comes_with_the_package_resolves(size):
    found = runpy.run_path(str(ROOT / "configs/solar/chain.py"))["get_config"](size)
    assert isinstance(found, ml_collections.ConfigDict)
    chain = resolve_chain(found)
    assert [stage.name for stage in chain.after(["dpo"])] == ["dpo", "merge"]
    assert load_config(chain.measures[0]).name.startswith("dus_48l")
