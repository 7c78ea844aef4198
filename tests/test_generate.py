"""The generate command: a prompt, a file that resumes, a chat, and what is refused."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from solar_jax import generate
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.decoding.model import load_model
from solar_jax.decoding.sampling import Sampling
from solar_jax.errors import UserError
from solar_jax.generate import How
from tests.conftest import hf_model, save_hf

ROOT = pathlib.Path(__file__).parents[1]
LINES = [{"id": i, "prompt": "abcdefgh"[: i + 1]} for i in range(6)] + [
    {"messages": [{"role": "user", "content": "x"}]}
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    folder = save_hf(hf_model(), tmp_path_factory.mktemp("generate") / "model")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    )
    return folder


@pytest.fixture(scope="module")
def ready(folder):
    model = load_model(open_checkpoint(str(folder)), "float32")
    return model, model.engine(rows=3)


def written(file: pathlib.Path, lines: list[Any]) -> pathlib.Path:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def read(file: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_file_is_answered_line_by_line_and_resumed_where_it_was_killed(ready, tmp_path, monkeypatch, capsys):
    model, engine = ready
    how, file = How(9, Sampling(temperature=1.0, seed=4)), written(tmp_path / "in.jsonl", LINES)
    generate.answer_file(model, engine, how, file, tmp_path / "whole.jsonl")
    found = read(tmp_path / "whole.jsonl")
    assert [line.get("id") for line in found] == [0, 1, 2, 3, 4, 5, None]
    assert all(line["finish"] in ("length", "stop") and line["tokens"] <= 9 for line in found)

    real, done = engine.answers, []

    def dies(requests):
        for item in real(requests):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(item)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(engine, "answers", dies)
        with pytest.raises(KeyboardInterrupt):
            generate.answer_file(model, engine, how, file, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
    capsys.readouterr()
    fresh = model.engine(rows=2)
    generate.answer_file(model, fresh, how, file, tmp_path / "out.jsonl")
    assert "7 prompts, 4 of them to be answered" in capsys.readouterr().out
    assert read(tmp_path / "out.jsonl") == found
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_answers_of_other_settings_are_not_taken_over(ready, tmp_path, capsys):
    model, _ = ready
    file, out = written(tmp_path / "in.jsonl", LINES), tmp_path / "out.jsonl"
    out.with_name(".out.jsonl.partial").write_text(
        json.dumps({"line": 0, "request": "another", "text": "old", "finish": "stop", "tokens": 1}) + "\n"
    )
    generate.answer_file(model, model.engine(rows=3), How(4), file, out)
    assert "7 of them to be answered" in capsys.readouterr().out
    assert read(out)[0]["text"] != "old"


def test_a_chat_keeps_its_turns_and_an_empty_line_forgets_them(ready, monkeypatch, capsys):
    model, _ = ready
    engine, asked = model.engine(rows=1), []
    typed = iter(["one", "two", "", "three"])

    def typing(_: str) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    real = engine.submit
    monkeypatch.setattr("builtins.input", typing)
    monkeypatch.setattr(engine, "submit", lambda r: (asked.append(model.tokenizer.decode(list(r.tokens))), real(r))[1])
    generate.chat(model, engine, How(3), "be brief")
    first = "system: be brief\nuser: one\n"
    assert asked[0] == first
    assert asked[1].startswith(first + "assistant: ")
    assert asked[1].endswith("user: two\n")
    assert asked[2] == "system: be brief\nuser: three\n"
    assert "new conversation" in capsys.readouterr().out


def test_a_chat_without_a_template_is_refused(tmp_path):
    model = load_model(open_checkpoint(str(save_hf(hf_model(), tmp_path / "model"))), "float32")
    with pytest.raises(UserError, match="has no chat template"):
        generate.chat(model, model.engine(rows=1), How(3), None)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "in.jsonl:2: is not JSON"),
        ("[]", "in.jsonl:2: must be an object with either 'prompt' or 'messages'"),
        ('{"prompt": "a", "messages": []}', "in.jsonl:2: must be an object with either"),
        ('{"prompt": ""}', "in.jsonl:2: prompt must be text, found ''"),
        ('{"messages": []}', "messages must be a list with at least one message"),
        ('{"messages": [{"content": "x"}]}', "must be an object with a role and content"),
        (json.dumps({"prompt": "a" * 1020}), "in.jsonl:2: .*more than the context of 1024"),
    ],
)
def test_a_line_that_cannot_be_answered_is_named_before_any_is(ready, tmp_path, line, said):
    model, engine = ready
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(UserError, match=said):
        generate.answer_file(model, engine, How(9), tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    assert {p.name for p in tmp_path.iterdir()} == {"in.jsonl"}


@pytest.mark.slow  # a command
def test_the_command_prints_the_continuation(folder):
    arguments = [sys.executable, "-m", "solar_jax.generate", f"--model={folder}", "--prompt=abc", "--max_new_tokens=5"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = load_model(open_checkpoint(str(folder)), "float32")
    ((_, answer),) = model.engine(rows=1).answers([How(5).request(model.encode("abc"))])
    assert done.stdout == answer.text + "\n"
