"""The command that makes data: killed and resumed, other settings, endpoints that die, and every refusal."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from solar_jax.data.making import endpoint as endpoint_module
from solar_jax.data.making.prompts import rephrase_messages
from solar_jax.data.making.results import Prices
from solar_jax.errors import UserError
from solar_jax.make_data import make_data
from tests.conftest import free_port
from tests.data.making.stub import (
    FIFTY,
    FIRST,
    MakeJob,
    Sent,
    Stub,
    asked,
    dropped,
    job_in,
    lines,
    serving,
    write_questions,
)

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)


@pytest.fixture
def job(tmp_path) -> MakeJob:
    return job_in(tmp_path)


def command(stub_url: str, questions: pathlib.Path, out: pathlib.Path, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "solar_jax.make_data", "--kind=math_instruct", f"--questions={questions}",
        f"--endpoint={stub_url}", f"--out={out}", *more,
    ]  # fmt: skip


def test_kill_9_then_the_same_command_makes_the_same_bytes_and_asks_nothing_twice(job, tmp_path):
    with serving(Stub()) as stub:
        whole = job(stub, FIFTY, out="whole")
        make_data(whole)
    out = tmp_path / "killed"
    with serving(Stub(delay=0.04)) as stub:
        process = subprocess.Popen(
            command(stub.url, whole.questions, out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        progress = out / "progress.jsonl"
        while process.poll() is None and not (progress.exists() and progress.read_bytes().count(b"\n") >= 8):
            time.sleep(0.005)
        process.kill()
        process.wait()
        assert not (out / "train.jsonl").exists()
        with progress.open("ab") as f:
            f.write(b'{"record": 49, "outcomes": [{"rephra')  # as if killed within a write
        finished = {r["record"] for r in lines_but_last(progress)}
        before = len(stub.requests)
        assert 8 <= len(finished) < 50
    with serving(Stub()) as stub:
        done = subprocess.run(
            command(stub.url, whole.questions, out), cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert f"Resuming {out}" in done.stdout
        assert f"{len(finished)} are finished" in done.stdout
        again = {asked(request) for request in stub.requests}
        assert not again & {FIFTY[record - 1]["question"] for record in finished}
        assert len(stub.requests) == 2 * (50 - len(finished))
        assert before >= 2 * len(finished)
    assert (out / "train.jsonl").read_bytes() == (whole.out / "train.jsonl").read_bytes()
    assert len(lines(progress)) == 50
    assert json.loads((out / "report.json").read_text())["requests"] == 100


def lines_but_last(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]


def test_a_job_that_is_complete_asks_nothing_and_writes_the_same(job):
    with serving(Stub()) as stub:
        making = job(stub)
        make_data(making)
        first, asked_then = (making.out / "train.jsonl").read_bytes(), len(stub.requests)
        make_data(making)
        assert len(stub.requests) == asked_then
    assert (making.out / "train.jsonl").read_bytes() == first


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"kind": "math_alignment"}, "kind: 'math_instruct' then, 'math_alignment' now"),
        ({"model": "other"}, "model: 'stub' then, 'other' now"),
        ({"temperature": 0.0, "seed": 1}, "seed: 0 then, 1 now; temperature: 0.7 then, 0.0 now"),
        ({"max_new_tokens": 5}, "max_new_tokens: 1024 then, 5 now"),
        ({"rephrasings": 2}, "rephrasings: 1 then, 2 now"),
        ({"records": FIFTY[:4]}, "questions_sha256: "),
        ({"decontaminate": ("questions.jsonl",)}, "evaluations_sha256: None then, "),
    ],
)
def test_a_job_with_other_settings_is_refused_and_they_are_named(job, tmp_path, changes, expected):
    with serving(Stub()) as stub:
        making = job(stub)
        make_data(making)
        before = {f.name: f.read_bytes() for f in making.out.iterdir()}
        if "decontaminate" in changes:
            write_questions(tmp_path / "eval.jsonl", [{"text": " ".join(map(str, range(20)))}])
            changes = {"decontaminate": (str(tmp_path / "eval.jsonl"),)}
        with pytest.raises(UserError, match="was begun with other settings") as e:
            make_data(job(stub, **changes))
        assert expected in str(e.value)
        make_data(job(stub, concurrency=1, retries=0, prices=Prices(1, 2)))  # what decides no record may change
    after = {f.name: f.read_bytes() for f in making.out.iterdir()}
    del before["report.json"], after["report.json"]
    assert after == before


def test_other_prompts_are_another_job(job, monkeypatch):
    with serving(Stub()) as stub:
        make_data(job(stub))
        monkeypatch.setattr("solar_jax.data.making.prompts.REPHRASE", "Say it otherwise.")
        assert rephrase_messages("q", 0)[0]["content"] == "Say it otherwise."
        with pytest.raises(UserError, match="prompts_sha256: "):
            make_data(job(stub))


def test_a_folder_of_something_else_is_refused_and_left_alone(job, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with serving(Stub()) as stub, pytest.raises(UserError, match="already exists and is no job of make_data"):
        make_data(job(stub))
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("")
    with serving(Stub()) as stub, pytest.raises(UserError, match="already exists and is no job of make_data"):
        make_data(job(stub, out="file"))


def test_a_damaged_line_of_progress_is_named(job):
    with serving(Stub()) as stub:
        making = job(stub)
        make_data(making)
        file = making.out / "progress.jsonl"
        content = file.read_bytes().split(b"\n")
        file.write_bytes(b"\n".join([content[0], content[1][:20], *content[2:]]))
        with pytest.raises(UserError, match=r"progress.jsonl:2: is not a finished question; delete that line"):
            make_data(making)


def test_an_endpoint_that_dies_ends_the_command_and_the_same_command_goes_on(job):
    stub = Stub()
    stub.override = lambda r: Sent(500, b'{"error": "out of memory"}') if len(stub.requests) > 20 else None
    with serving(stub):
        making = job(stub, FIFTY, retries=1)
        with pytest.raises(UserError, match=r"5 requests in a row failed, the last: answered 500 .*: out of memory"):
            make_data(making)
        assert not (making.out / "train.jsonl").exists()
        finished = {FIFTY[r["record"] - 1]["question"] for r in lines(making.out / "progress.jsonl")}
        assert 1 <= len(finished) <= 10
        stub.override, before = None, len(stub.requests)
        report = make_data(making)
        assert finished.isdisjoint(asked(request) for request in stub.requests[before:])
    assert report["kept"] == 50


def test_questions_without_an_answer_are_asked_again_by_the_same_command(job):
    fails = True

    def override(request):
        return Sent(503) if fails and asked(request) == FIRST else None

    with serving(Stub(override)) as stub:
        making = job(stub, retries=1)
        with pytest.raises(UserError, match="1 of 5 questions got no answer, the last: answered 503 Service Unavail"):
            make_data(making)
        assert not (making.out / "train.jsonl").exists()
        fails, before = False, len(stub.requests)
        assert make_data(making)["kept"] == 5
        assert len(stub.requests) - before == 2


def test_a_question_that_the_endpoint_refuses_is_dropped_but_all_of_them_end_the_command(job):
    with serving(
        Stub(lambda r: Sent(400, b'{"error": {"message": "too long"}}') if asked(r) == FIRST else None)
    ) as stub:
        making = job(stub)
        make_data(making)
        assert dropped(making.out) == [(1, "refused", "answered 400 Bad Request: an error: too long")]
    with serving(Stub(lambda r: Sent(400, b'{"error": {"message": "no such field"}}'))) as stub:
        making = job(stub, FIFTY[:3], out="other")
        with pytest.raises(UserError, match="refused each of the 3 questions: answered 400 Bad Request: an error"):
            make_data(making)
        assert (making.out / "progress.jsonl").read_bytes() == b""


def test_retries_and_dollars_are_reported(job, capsys):
    busy = iter([Sent(429, headers={"Retry-After": "0"}), Sent(500)])
    with serving(Stub(lambda r: next(busy, None))) as stub:
        making = job(stub, prices=Prices(2.0, 10.0))
        report = make_data(making)
    assert (report["requests"], report["retries"]) == (10, 2)
    assert (report["tokens_in"], report["tokens_out"]) == (110, 70)
    assert report["dollars"] == pytest.approx((110 * 2 + 70 * 10) / 1e6)
    assert json.loads((making.out / "report.json").read_text()) == report
    assert "requests  10, and 2 retries\ntokens    110 in, 70 out, $0.0009" in capsys.readouterr().out


def test_two_commands_do_not_write_to_one_folder(job):
    with serving(Stub(delay=0.5)) as stub:
        making = job(stub)
        first = subprocess.Popen(
            command(stub.url, making.questions, making.out), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        while not (making.out / "job.json").exists():
            time.sleep(0.01)
        with pytest.raises(UserError, match="is in use by process"):
            make_data(making)
        first.kill()
        first.communicate()


def test_questions_of_which_none_can_be_used_are_refused(job):
    with serving(Stub()) as stub, pytest.raises(UserError, match="none of 1 questions can be used; record 1: no_orig"):
        make_data(job(stub, [{"question": "Why?", "answer": "Because."}]))
    assert stub.requests == []


MISTAKES = {
    "flags": (
        [],
        "make_data needs --kind math_alignment|math_instruct, --questions FILE, --endpoint URL and --out DIR",
    ),
    "kind": (["--kind=math"], "flag --kind=math: value should be one of <math_alignment|math_instruct>"),
    "url": (["ALL", "--endpoint=localhost:8000"], "--endpoint: 'localhost:8000': must be a URL that begins with http"),
    "away": (["ALL"], "cannot be reached: Connection refused"),
    "questions": (["ALL", "--questions=nowhere.jsonl"], "--questions: nowhere.jsonl: no such file"),
    "bucket": (["ALL", "--out=gs://b/x"], "--out: gs://b/x: must be on this machine"),
    "price": (["ALL", "--price_in=1"], "--price_in and --price_out are given together"),
    "no key": (["ALL", "--api_key_file=nowhere"], "--api_key_file: nowhere: cannot be read: No such file or directory"),
    "empty key": (["ALL", "--api_key_file=EMPTY"], "is empty; it must hold the key on one line"),
    "long key": (["ALL", "--api_key_file=LONG"], "must hold the key on one line, found several lines"),
    "sets": (
        ["ALL", "--decontaminate=nothing"],
        "--decontaminate: nothing: must be a preset (solar), or a file or fold",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence_and_nothing_is_written(tmp_path, name):
    flags, expected = MISTAKES[name]
    (tmp_path / "EMPTY").write_text(" \n")
    (tmp_path / "LONG").write_text("sesame\nopen\n")
    write_questions(tmp_path / "questions.jsonl", FIFTY[:2])
    every = command(f"http://127.0.0.1:{free_port()}", pathlib.Path("questions.jsonl"), pathlib.Path("out"))
    done = subprocess.run(
        [*every[:3], *[f for flag in flags for f in (every[3:] if flag == "ALL" else [flag])]],
        cwd=tmp_path, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "sesame" not in done.stderr + done.stdout
    assert sorted(f.name for f in tmp_path.iterdir()) == ["EMPTY", "LONG", "questions.jsonl"]


def test_the_key_is_sent_but_neither_printed_nor_written(tmp_path):
    questions = write_questions(tmp_path / "questions.jsonl", FIFTY[:3])
    (tmp_path / "key").write_text("open-sesame\n")
    with serving(Stub()) as stub:
        flags = command(stub.url, questions, tmp_path / "out", f"--api_key_file={tmp_path / 'key'}")
        done = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert stub.keys == {"Bearer open-sesame"}
        stub.override = lambda r: Sent(401, b'{"error": "bad key open-sesame"}')
        flags[-2] = f"--out={tmp_path / 'other'}"
        refused = subprocess.run(flags, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "answered 401 Unauthorized: an error: bad key ***." in refused.stderr
    written = "".join(f.read_text() for f in tmp_path.rglob("*") if f.is_file() and f.name != "key")
    assert "open-sesame" not in done.stdout + done.stderr + refused.stdout + refused.stderr + written
