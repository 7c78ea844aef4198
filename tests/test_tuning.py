"""Tuning end to end on a tiny model: conversations, pairs, chunks and adapters, resumed, on other meshes, prepared."""

import dataclasses
import datetime
import json
import pathlib
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
import torch
import transformers

from solar_jax import prepare, train
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import Config
from solar_jax.data.chat import encoding
from solar_jax.data.chat.encoding import load_rules
from solar_jax.data.corpus import load_corpus
from solar_jax.data.pipeline import addresses
from solar_jax.errors import UserError
from solar_jax.training import loop, preferences, stages, tuning
from tests.test_train import make_config, metrics

REPO = pathlib.Path(__file__).parents[1]
WORDS = "deeper models heal with few tokens when layers copy what came before them and answers end"


def sentence(seed: int, length: int) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS.split(), length))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("data") / "chats.jsonl"
    records = [{"prompt": sentence(i, 2), "completion": sentence(i + 1000, 1 + i % 5)} for i in range(120)]
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    return file


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> list[pathlib.Path]:
    folder = tmp_path_factory.mktemp("pairs")
    for k in range(2):
        records = [
            {"prompt": sentence(i + 500 * k, 2), "chosen": sentence(i + 2000, 2), "rejected": "no " * (1 + i % 3)}
            for i in range(60)
        ]
        (folder / f"{k}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return [folder / "0.jsonl", folder / "1.jsonl"]


def config_of(tiny, data: list[pathlib.Path], form: str, **changes) -> Config:
    changes = {
        "growth_operator": "identity", "data_packing": "best_fit", "data_sequence_length": 128,
        "data_template": "solar", "data_holdout_every": 6, "evaluation_every": 2,
    } | changes  # fmt: skip
    config = make_config(tiny, data[0], **changes)
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources=tuple(map(str, data)), format=form)
    )


@pytest.fixture(scope="module")
def answered(tiny, chats, tmp_path_factory):
    config, folder = config_of(tiny, [chats], "conversations"), tmp_path_factory.mktemp("sft") / "run"
    return config, folder, train.run(config, folder)


@pytest.fixture(scope="module")
def preferred(tiny, pairs, tmp_path_factory):
    """Two chunks, one a source."""
    config = config_of(tiny, pairs, "pairs", preferences_chunks="source", train_steps=4)
    folder = tmp_path_factory.mktemp("dpo") / "run"
    return config, folder, train.run(config, folder)


def weights(folder: pathlib.Path) -> bytes:
    return (folder / "hf/model.safetensors").read_bytes()


def interrupted(config, folder, moment, monkeypatch) -> None:
    def interrupt(line=""):
        if line.startswith(moment):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        for module in (loop, stages, tuning):
            patch.setattr(module, "say", interrupt)
        with pytest.raises(KeyboardInterrupt):
            train.run(config, folder)
    assert not (folder / "summary.json").exists()


def test_answers_are_learnt_and_what_was_left_out_is_counted_by_reason(answered, chats):
    _, folder, summary = answered
    assert summary["final_loss"] < summary["zero_token_loss"] - 0.3
    assert 0 < summary["start_end_probability"] < summary["final_end_probability"] * 2
    record = json.loads((folder / "data.json").read_text())
    part = record["train source 0"]
    assert part["records"] + len(record["heldout source 0"]["left_out"]) <= 120
    assert 0 < part["trained"] < part["tokens"]
    assert set(record["rules"]) == {"template", "date", "hash"}
    assert (folder / "loss.png").exists()


def test_the_exported_model_has_the_template_it_was_trained_with_and_stops_where_answers_end(answered, tiny):
    _, folder, _ = answered
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    messages = [{"role": "user", "content": "red"}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == "### User:\nred\n\n### Assistant:\n"
    assert not (tiny / "chat_template.jinja").exists(), "it is not the base's"
    assert transformers.GenerationConfig.from_pretrained(folder / "hf").eos_token_id in (2, [2])


def test_the_loss_of_answers_is_that_of_transformers(answered, tiny, chats):
    """The first step's: summed over the trained tokens of all microbatches, divided by their number."""
    config, folder, _ = answered
    c = open_checkpoint(str(tiny))
    tokenizer, eos = load_tokenizer(c), eos_id(c)
    rules = load_rules(config.data, c.companions, c.where, tokenizer, eos)
    corpus = load_corpus(config.data, tokenizer, eos, c.cfg.vocab_size, rules)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    places, total, count = addresses(corpus, config.seed), torch.zeros(()), 0
    for i in range(config.train.batch_size):
        source, row = places[i]
        tokens, sizes, trained = corpus.train[source][1].sequences(int(row))
        ends = np.cumsum(sizes)
        for size, end in zip(sizes, ends, strict=True):
            ids = torch.tensor(tokens[end - size : end].astype(np.int64))[None]
            labels = ids.clone()
            labels[0, ~torch.tensor(trained[end - size : end])] = -100
            labels[0, 0] = -100
            n = int((labels >= 0).sum())
            total, count = total + model(ids, labels=labels).loss * n, count + n
    (total / count).backward()
    first = metrics(folder)[0]
    assert first[1] == pytest.approx(float(total.detach() / count), abs=1e-5)
    norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
    assert first[2] == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize(
    "changes", [{"accumulation": 4, "batch_size": 8}, {"mesh": {"data": 2, "fsdp": 2, "tensor": 2}}]
)
def test_microbatches_and_the_mesh_change_no_loss(answered, tmp_path, changes):
    config, folder, _ = answered
    mesh = changes.pop("mesh", {})
    other = dataclasses.replace(
        config, train=dataclasses.replace(config.train, **changes), mesh=dataclasses.replace(config.mesh, **mesh)
    )
    train.run(other, tmp_path / "run")
    for ours, theirs in zip(metrics(tmp_path / "run"), metrics(folder), strict=True):
        assert ours[1] == pytest.approx(theirs[1], rel=1e-5)
        assert ours[2] == pytest.approx(theirs[2], rel=1e-4)  # of a gradient's norm


@pytest.mark.parametrize("moment", ["tuned step 5", "tuned: written"])
def test_interrupted_tuning_goes_on_bit_by_bit(answered, tmp_path, monkeypatch, moment):
    config, folder, _ = answered
    interrupted(config, tmp_path / "run", moment, monkeypatch)
    train.run(config, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(folder)
    assert weights(tmp_path / "run") == weights(folder)


def test_prepared_records_train_as_those_of_the_files(answered, chats, tmp_path):
    config, folder, _ = answered
    made = prepare.prepare(config, tmp_path / "prepared", prepare.Options(workers=1))
    assert made["records"]["template"] == "solar"
    prepared = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(str(tmp_path / "prepared"),)))
    train.run(prepared, tmp_path / "run")
    assert [m[1] for m in metrics(tmp_path / "run")] == [m[1] for m in metrics(folder)]
    other = dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, template="chatml"))
    with pytest.raises(UserError, match="was prepared with other rules"):
        train.run(other, tmp_path / "other")
    text = dataclasses.replace(prepared, data=dataclasses.replace(prepared.data, format="text"))
    with pytest.raises(
        UserError, match=r"was prepared with config\.data\.format='conversations', but this run has 'text'"
    ):
        train.run(text, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_records_are_deduplicated_and_searched_for_evaluation_sets(tiny, tmp_path):
    leaked = "which planet of the solar system has the largest number of known moons around it today"
    records = [{"prompt": sentence(i, 3), "completion": sentence(i + 1000, 20)} for i in range(40)]
    records += [records[3], {"prompt": leaked, "completion": "Saturn."}]
    file, evaluations = tmp_path / "chats.jsonl", tmp_path / "evaluation.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records))
    evaluations.write_text(json.dumps({"question": leaked + "?"}) + "\n")
    # By position, so that the record that is searched for is not held out.
    config = config_of(tiny, [file], "conversations", data_holdout="position", data_sequence_length=256)
    options = prepare.Options(workers=1, dedup=True, decontaminate=(str(evaluations),))
    (source,) = prepare.prepare(config, tmp_path / "prepared", options)["sources"]
    assert (source["documents"], source["duplicates"], source["contaminated"]) == (42, 1, 1)
    assert source["train"]["documents"] + source["heldout"]["documents"] == 40


def test_a_template_writes_the_day_on_which_its_run_began(tiny, chats, tmp_path, monkeypatch):
    (tmp_path / "dated.jinja").write_text(
        "{{ strftime_now('%Y-%m-%d') }} {% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    )
    config = config_of(tiny, [chats], "conversations", data_template=str(tmp_path / "dated.jinja"))

    def today(day: str) -> None:
        date = types.SimpleNamespace(today=lambda: datetime.date.fromisoformat(day))
        monkeypatch.setattr(encoding, "datetime", types.SimpleNamespace(date=date))

    today("2026-11-28")
    train.run(config, tmp_path / "whole")
    interrupted(config, tmp_path / "run", "tuned step 3", monkeypatch)
    today("2026-11-29")
    train.run(config, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert json.loads((tmp_path / "run/data.json").read_text())["rules"]["date"] == "2026-11-28"
    train.run(config, tmp_path / "next")  # begun a day later: other tokens
    assert metrics(tmp_path / "next") != metrics(tmp_path / "whole")


def test_prepared_pairs_train_as_those_of_the_files(tiny, pairs, tmp_path):
    config = config_of(tiny, [pairs[0]], "pairs", train_steps=3)
    made = prepare.prepare(config, tmp_path / "prepared", prepare.Options(workers=1))
    assert made["totals"]["train"]["rows"] > 0
    prepared = dataclasses.replace(config, data=dataclasses.replace(config.data, sources=(str(tmp_path / "prepared"),)))
    train.run(config, tmp_path / "files")
    train.run(prepared, tmp_path / "folder")
    assert metrics(tmp_path / "folder") == metrics(tmp_path / "files")
    assert weights(tmp_path / "folder") == weights(tmp_path / "files")


def test_preferences_are_learnt_chunk_by_chunk(preferred):
    _, folder, summary = preferred
    first, *_ = map(json.loads, (folder / "chunk1/metrics.jsonl").read_text().splitlines())
    for part in ("chunk1", ""):
        lines = [json.loads(line) for line in (folder / part / "metrics.jsonl").read_text().splitlines()]
        assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-3)  # each chunk's reference is its start
        assert lines[0]["rewards/margins"] == pytest.approx(0, abs=1e-3)
    assert summary["final_loss"] < summary["zero_token_loss"]
    assert summary["start_accuracy"] == 0.5
    assert summary["final_accuracy"] > 0.5
    assert {"rewards/accuracies", "logps/chosen", "logits/rejected", "kl"} <= set(first)


def test_the_second_chunk_is_dpo_from_the_first_ones_result_bit_by_bit(preferred, pairs, tmp_path):
    config, folder, _ = preferred
    data = dataclasses.replace(config.data, sources=(str(pairs[1]),))
    alone = dataclasses.replace(
        config, source=str(folder / "chunk1"), data=data, preferences=dataclasses.replace(config.preferences, chunks="")
    )
    train.run(alone, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(folder)
    assert weights(tmp_path / "run") == weights(folder)


@pytest.mark.parametrize("moment", ["chunk1 step 3", "chunk 2 of 2", "tuned step 2"])
def test_interrupted_chunks_go_on_bit_by_bit(preferred, tmp_path, monkeypatch, moment):
    config, folder, _ = preferred
    interrupted(config, tmp_path / "run", moment, monkeypatch)
    train.run(config, tmp_path / "run")
    for part in ("chunk1", ""):
        assert metrics(tmp_path / "run" / part) == metrics(folder / part)
    assert weights(tmp_path / "run") == weights(folder)


@pytest.mark.parametrize("chunks", ["random:2", "difficulty:2", "listed"])
def test_chunks_hold_every_pair_once(tiny, pairs, tmp_path, capsys, chunks):
    if chunks == "listed":
        (tmp_path / "lists.json").write_text(json.dumps([[f"{pairs[0]}:7"], [f"{pairs[1]}:8", f"{pairs[0]}:9"]]))
        chunks = f"listed:{tmp_path / 'lists.json'}"
    config = config_of(
        tiny, pairs, "pairs", preferences_chunks=chunks, train_steps=0, train_epochs=1.0, evaluation_every=0
    )
    train.run(config, tmp_path / "run")
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("chunk ")]
    used = json.loads((tmp_path / "run/data.json").read_text())
    total = sum(used[f"train source {k}"]["records"] for k in range(2))
    counts = [int(line.split(": ")[1].split(" ")[0]) for line in told]
    assert counts == [1, 2] if "listed" in chunks else sum(counts) == total and len(counts) == 2


def computed(out: str) -> list[int]:
    return [int(line.split(", ")[1].split(" ")[0]) for line in out.splitlines() if line.startswith("reference: ")]


def test_a_reference_is_computed_once_and_a_changed_record_is_one_pair(tiny, pairs, tmp_path, capsys):
    file = tmp_path / "pairs.jsonl"
    shutil.copy(pairs[0], file)
    config = config_of(
        tiny, [file], "pairs", preferences_cache=str(tmp_path / "cache"), train_steps=0, train_epochs=1.0,
        data_holdout="position",
    )  # fmt: skip
    train.run(config, tmp_path / "first")
    assert sum(computed(capsys.readouterr().out)) >= 40
    train.run(config, tmp_path / "second")
    assert set(computed(capsys.readouterr().out)) == {0}
    assert metrics(tmp_path / "first") == metrics(tmp_path / "second")
    lines = file.read_text().splitlines()
    lines[1] = json.dumps({"prompt": "deeper", "chosen": "models heal", "rejected": "no"})  # 0 is held out
    file.write_text("\n".join(lines) + "\n")
    train.run(config, tmp_path / "third")
    assert sum(computed(capsys.readouterr().out)) == 1


def test_a_reference_of_other_weights_ends_the_run(tiny, pairs, tmp_path, monkeypatch):
    config = config_of(tiny, pairs, "pairs")
    real = preferences.sequence_sums

    def shifted(forward, batch, sequences):
        sums = real(forward, batch, sequences)
        return sums.at[:, ::2].add(1.0)

    monkeypatch.setattr("solar_jax.training.reference.sequence_sums", shifted)
    with pytest.raises(
        UserError, match=r"the first loss is 0\.\d+, but where the policy equals the reference it is 0\.693"
    ):
        train.run(config, tmp_path / "run")


def test_an_adapter_trains_resumes_and_comes_out_three_ways(tiny, pairs, tmp_path, monkeypatch):
    config = config_of(tiny, pairs, "pairs", lora_rank=4, train_trainable="new", train_steps=4, lora_variant="dora",
                       optimizer_learning_rate=1e-2)  # fmt: skip
    config = dataclasses.replace(config, growth=dataclasses.replace(config.growth, operator="dus"))
    summary = train.run(config, tmp_path / "whole")
    assert summary["final_loss"] < summary["zero_token_loss"]
    interrupted(config, tmp_path / "run", "tuned step 4", monkeypatch)
    train.run(config, tmp_path / "run")
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")
    assert weights(tmp_path / "run") == weights(tmp_path / "whole")
    newest = max((tmp_path / "run/checkpoints").iterdir(), key=lambda f: int(f.name))
    assert sum(f.stat().st_size for f in newest.rglob("*") if f.is_file()) < len(weights(tmp_path / "run")) / 2
    merged, applied, opened = (
        open_checkpoint(str(tmp_path / "run" / name)) for name in ("hf", "adapter_of_base", ".")
    )  # fmt: skip
    changed = 0
    base = open_checkpoint(str(tiny))
    for name in merged.shape_of:
        np.testing.assert_allclose(merged.read(name), applied.read(name), atol=1e-6)
        np.testing.assert_array_equal(merged.read(name), opened.read(name))
        if name in base.shape_of and ".layers." in name and int(name.split(".")[2]) < 4:
            changed += not np.array_equal(merged.read(name), base.read(name))
    assert changed == 0  # only the new layers, 4 to 7, have an adapter


@pytest.mark.parametrize(
    ("form", "changes", "expected"),
    [
        ("conversations", {"data_template": "tokenizer"}, "the tokenizer has no chat template"),
        ("pairs", {}, "is of no known form"),
        ("conversations", {"data_sequence_length": 8}, "no record is left to train on"),
        ("conversations", {"preferences_losses": ("kto",)}, r"config\.preferences\.losses must be among"),
        ("conversations", {"preferences_chunks": "sources"}, r"config\.preferences\.chunks must be source"),
    ],
)
def test_what_cannot_be_tuned_on_is_refused_before_anything_is_written(tiny, chats, tmp_path, form, changes, expected):
    config = config_of(tiny, [chats], form, **changes)
    with pytest.raises(UserError, match=expected):
        train.run(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def launched(recipe: str, tiny, data: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    """A recipe on the tiny model, in a process of its own."""
    flags = {
        "source": tiny, "data.sources": data, "data.sequence_length": 128, "data.template": "solar", "train.steps": 6,
        "train.batch_size": 4, "evaluation.windows": 4, "evaluation.batch_size": 4, "checkpoint.every": 2,
        "optimizer.learning_rate": 1e-3,
    }  # fmt: skip
    command = [sys.executable, "-u", "-m", "solar_jax.train", f"--config={REPO}/configs/{recipe}.py:smollm2"]
    command += [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in flags.items())]
    return subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "moments"),
    [
        ("sft", ["tuned step 3/"]),
        ("dpo", ["reference: ", "tuned step 3/"]),
        ("sdpo", ["chunk1 step 3/", "tuned step 3/"]),
    ],
)
def test_a_recipe_that_is_killed_and_asked_to_stop_ends_in_the_same_bits(tiny, chats, pairs, tmp_path, recipe, moments):
    data = chats if recipe == "sft" else pairs[0]
    whole = launched(recipe, tiny, data, tmp_path / "whole")
    said = whole.communicate(timeout=200)[0]
    assert whole.returncode == 0, said
    for number in (signal.SIGKILL, signal.SIGTERM):
        for moment in moments:
            process = launched(recipe, tiny, data, tmp_path / number.name)
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(moment):
                    process.send_signal(number)
                    break
            process.communicate(timeout=100)
            assert process.returncode in (-number, 75)
        process = launched(recipe, tiny, data, tmp_path / number.name)
        said = process.communicate(timeout=200)[0]
        assert process.returncode == 0, said
        assert metrics(tmp_path / number.name) == metrics(tmp_path / "whole")
        assert weights(tmp_path / number.name) == weights(tmp_path / "whole")


def test_the_devices_of_these_tests_are_eight():
    assert jax.device_count() == 8
