"""Data made through a stand-in for an endpoint: what is kept and dropped, killed and resumed, and every refusal."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from solar_jax.data.chat.formats import Conversation, Pair, read_record
from solar_jax.data.making import endpoint as endpoint_module
from solar_jax.data.making.filters import REASONS
from solar_jax.data.making.prompts import rephrase_messages
from solar_jax.data.making.results import Prices
from solar_jax.data.prepared.evaluation_sets import SOLAR
from solar_jax.data.sources import documents, parse_sources
from solar_jax.errors import UserError
from solar_jax.make_data import Making, make_data
from tests.conftest import free_port
from tests.data.making.stub import (
    HEAD,
    Sent,
    Stub,
    asked,
    is_answer,
    own_text,
    question,
    said,
    serving,
    write_questions,
)

ROOT = pathlib.Path(__file__).parents[1]
FIFTY = [question(i) for i in range(50)]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)


@pytest.fixture
def job(tmp_path):
    """Options of a job about the first questions of `FIFTY`."""

    def of(stub: Stub, records=FIFTY[:5], out: str = "out", **changes) -> Making:
        file = write_questions(tmp_path / "questions.jsonl", records)
        return dataclasses.replace(Making("math_instruct", file, stub.url, tmp_path / out), **changes)

    return of


def lines(file: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def dropped(out: pathlib.Path) -> list[tuple[int, str, str]]:
    return [(r["provenance"]["record"], r["reason"], r["details"]) for r in lines(out / "dropped.jsonl")]


def test_fifty_questions_become_conversations_in_their_order(job, capsys):
    with serving(Stub(delay=0.002)) as stub:
        making = job(stub, FIFTY)
        report = make_data(making)
    assert stub.most_at_once <= 4
    assert len(stub.requests) == 100
    assert (report["asked"], report["kept"], report["dropped"]) == (50, 50, {})
    made = lines(making.out / "train.jsonl")
    for i, record in enumerate(made):
        total = sum((1000 + 7 * i, 3 + i, 20 + i % 9))
        assert record["prompt"] == [{"role": "user", "content": f"{HEAD} {FIFTY[i]['question']}"}]
        assert record["completion"][0]["content"].endswith(f"The answer is: {total}")
        origin = record["provenance"]
        assert origin["number"] == str(total)
        assert (origin["source"], origin["record"], origin["model"]) == ("questions.jsonl", i + 1, "stub-1")
        assert (origin["original_question"], origin["rephrasing"]) == (FIFTY[i]["question"], 0)
        assert (origin["prompts"], origin["temperature"], origin["seed"], len(origin["sha256"])) == ("1", 0.7, 0, 64)
    assert str(making.out.parent) not in (making.out / "train.jsonl").read_text()
    assert sorted(f.name for f in making.out.iterdir()) == [
        "dropped.jsonl", "job.json", "progress.jsonl", "report.json", "train.jsonl",
    ]  # fmt: skip
    told = capsys.readouterr().out
    assert "questions 50 of 50 in questions.jsonl; 0 are finished" in told
    assert "requests  100 at most, 2 for each of 1 rephrasing; one that fails is tried up to 5 times again" in told
    assert "stub, temperature 0.7, 4 requests at once" in told
    assert f"kept      50 records\ndropped   0\nrequests  100, and 0 retries\ntokens    {1100:,} in, 700 out\n" in told


def test_the_instructions_are_read_as_conversations_by_train(job):
    with serving(Stub()) as stub:
        making = job(stub)
        make_data(making)
    (source,) = parse_sources((str(making.out / "train.jsonl"),), form="conversations")
    found = [read_record(d.record, d.id, "conversations") for d in documents(source)]
    assert len(found) == 5
    for conversation in found:
        assert isinstance(conversation, Conversation)
        assert [m["role"] for m in conversation.messages] == ["user", "assistant"]
        assert conversation.prompt == 1
    assert found == [read_record(d.record, d.id, "prompt_completion") for d in documents(source)]


def test_the_pairs_are_read_as_pairs_by_train_and_reject_the_original_answer(job):
    with serving(Stub()) as stub:
        making = job(stub, kind="math_alignment")
        make_data(making)
    (source,) = parse_sources((str(making.out / "train.jsonl"),), form="pairs")
    found = [read_record(d.record, d.id, "pairs") for d in documents(source)]
    assert found == [read_record(d.record, d.id, "preference") for d in documents(source)]
    assert len(found) == 5
    for pair, original in zip(found, FIFTY, strict=False):
        assert isinstance(pair, Pair)
        assert [m["content"] for m in pair.rejected.messages] == [
            f"{HEAD} {original['question']}", original["answer"],
        ]  # fmt: skip
        assert pair.chosen.messages[0] == pair.rejected.messages[0]
        assert "The answer is: " in pair.chosen.messages[1]["content"]


def test_several_rephrasings_of_a_question_are_several_records(job):
    with serving(Stub()) as stub:
        making = job(stub, rephrasings=3)
        report = make_data(making)
    assert report["kept"] == 15
    made = lines(making.out / "train.jsonl")
    assert [(r["provenance"]["record"], r["provenance"]["rephrasing"]) for r in made[:4]] == [
        (1, 0), (1, 1), (1, 2), (2, 0),
    ]  # fmt: skip
    assert len({request["seed"] for request in stub.requests}) == 30


Q = FIFTY[0]["question"]  # its numbers are 1,000, 3 and 20
BAD = {
    "empty question": ("question", said(" "), "empty", "the rephrased question"),
    "no content": ("answer", said(None), "empty", "the answer"),
    "cut off": ("answer", said("1000 + 3", "length"), "cut_off", "the answer: length"),
    "cut off question": ("question", said("Ada has", "length"), "cut_off", "the rephrased question: length"),
    "unchanged": ("question", said(Q.upper().replace(",", "").replace("?", " !")), "unchanged", "but for case, whi"),
    "lost": ("question", said("How many are 1,000 and 3?"), "changed_numbers", "lost 20"),
    "added": ("question", said(f"{HEAD} {Q} She has 2 cats."), "changed_numbers", "added 2"),
    "no number": ("answer", said("Many.\nI cannot tell."), "no_final_number", "its last line is 'I cannot tell.'"),
    "wrong": ("answer", said("The answer is: 1024"), "wrong_final_number", "1024 in place of 1023"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_filter_drops_what_it_should_and_nothing_else(job, name):
    step, bad, reason, details = BAD[name]

    def override(request):
        return bad if asked(request) == Q and is_answer(request) == (step == "answer") else None

    with serving(Stub(override)) as stub:
        making = job(stub)
        report = make_data(making)
    ((record, found, said_details),) = dropped(making.out)
    assert (record, found) == (1, reason)
    assert said_details.startswith(details)
    assert (report["kept"], report["dropped"]) == (4, {reason: 1})
    assert len(stub.requests) == (9 if step == "question" else 10)  # no answer to what is dropped already
    assert [r["provenance"]["record"] for r in lines(making.out / "train.jsonl")] == [2, 3, 4, 5]
    assert reason in REASONS


def test_a_wrong_number_is_kept_nowhere_however_it_is_written(job):
    forms = ["#### 1,023", r"So \boxed{1023\text{ apples}}", "The answer is: 2046/2", "The answer is: 1023.0 apples."]
    for i, form in enumerate(forms):
        with serving(Stub(lambda r, form=form: said(form) if is_answer(r) else None)) as stub:
            assert make_data(job(stub, FIFTY[:2], out=f"out{i}"))["dropped"] == {"wrong_final_number": 1}


def test_a_question_that_comes_twice_is_kept_once_the_first_in_order(job):
    same = "Same: 1,000 and 3 and 20 give how many?"

    def override(request):
        if is_answer(request):
            return None
        time.sleep(0.03 if asked(request).startswith("First") else 0)
        return said(same if asked(request).startswith("First") else f"{same.upper()} ")

    records = [{"question": f"{n}: 1,000, 3, 20, sum?", "answer": "#### 1023"} for n in ("First", "Second", "Third")]
    with serving(Stub(override)) as stub:
        making = job(stub, records)
        make_data(making)
    assert [r["provenance"]["record"] for r in lines(making.out / "train.jsonl")] == [1]
    details = "of record 1, rephrasing 0"
    assert dropped(making.out) == [(2, "duplicate", details), (3, "duplicate", details)]


def test_a_pair_of_one_answer_is_dropped(job):
    override = lambda r: said(FIFTY[0]["answer"]) if is_answer(r) and asked(r) == Q else None  # noqa: E731
    for kind, expected in (("math_alignment", [(1, "same_answer", "word for word")]), ("math_instruct", [])):
        with serving(Stub(override)) as stub:
            making = job(stub, kind=kind, out=kind)
            make_data(making)
        assert dropped(making.out) == expected


def test_an_original_without_a_number_is_not_asked_about(job):
    with serving(Stub()) as stub:
        making = job(stub, [{"question": "Why?", "answer": "Because."}, *FIFTY[:2]])
        report = make_data(making)
    assert (report["asked"], report["dropped"]) == (2, {"no_original_number": 1})
    assert not any("Why?" in asked(request) for request in stub.requests)


PLACES = {  # data set of the hub -> where its files are
    "allenai/ai2_arc": ("ARC-Easy/test.jsonl", "ARC-Challenge/test.jsonl"), "Rowan/hellaswag": ("data/val.jsonl",),
    "openai/gsm8k": ("main/test.jsonl",), "ucinlp/drop": ("data/dev.jsonl",), "allenai/winogrande": ("dev.jsonl",),
}  # fmt: skip


WORDS = ("why", "does", "the", "moon", "of", "that", "far", "planet", "look", "so", "red", "at", "night")


def test_questions_of_the_ten_tasks_that_the_paper_removed_are_found_and_named_before_anything_is_asked(job, tmp_path):
    sets: dict[pathlib.Path, list[dict]] = {}
    planted, named = [], []
    for i, (task, name) in enumerate([*SOLAR.items(), ("gsm8k test", "openai/gsm8k")]):
        hard = len(PLACES[name]) > 1 and ("hard" in task or "Challenge" in task)
        file = tmp_path / "sets" / name.split("/")[1] / PLACES[name][hard]
        text = " ".join(f"{word}{i}" for word in WORDS)
        sets.setdefault(file, []).append({"id": i, "question": f"{text}?", "choices": {"text": ["a", "b"]}})
        planted.append({"question": f"Tell me: {text.upper()} And what is 3 + {i}?", "answer": f"#### {3 + i}"})
        named.append(f"{file}:{len(sets[file])}")
    for file, records in sets.items():
        file.parent.mkdir(parents=True)
        write_questions(file, records)
    assert len(planted) == 11
    with serving(Stub()) as stub:
        making = job(stub, [*FIFTY[:3], *planted, *FIFTY[3:5]], decontaminate=(f"solar={tmp_path / 'sets'}",))
        report = make_data(making)
    found = lines(making.out / "dropped.jsonl")
    assert [r["evaluation"] for r in found] == named
    assert {r["reason"] for r in found} == {"contaminated"}
    assert "shares 'why0 does0 the0" in found[0]["details"]
    assert [r["provenance"]["record"] for r in found] == list(range(4, 15))
    assert (report["asked"], report["kept"]) == (5, 5)
    assert len(stub.requests) == 10  # nothing about the planted ones


def test_a_rephrasing_or_an_answer_that_recalls_an_evaluation_set_is_found(job, tmp_path):
    leak = "Janet has three ducks that lay sixteen eggs on every single day of the year"
    write_questions(tmp_path / "eval.jsonl", [{"question": "short"}, {"question": leak}])

    def override(request):
        own = own_text(request)
        if not is_answer(request) and asked(request) == Q:
            return said(own.replace(HEAD, f"{leak}!"))
        return (
            said(f"{leak.upper()}.\n{own}") if is_answer(request) and asked(request) == FIFTY[1]["question"] else None
        )

    with serving(Stub(override)) as stub:
        making = job(stub, decontaminate=(str(tmp_path / "eval.jsonl"),))
        make_data(making)
    found = lines(making.out / "dropped.jsonl")
    assert [r["provenance"]["record"] for r in found] == [1, 2]
    assert {r["evaluation"] for r in found} == {f"{tmp_path / 'eval.jsonl'}:2"}
    assert len(stub.requests) == 9
    with serving(Stub(override)) as stub:  # a negative control: without the sets all is kept
        assert make_data(job(stub, out="unchecked"))["kept"] == 5


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
        return Sent(503) if fails and asked(request) == Q else None

    with serving(Stub(override)) as stub:
        making = job(stub, retries=1)
        with pytest.raises(UserError, match="1 of 5 questions got no answer, the last: answered 503 Service Unavail"):
            make_data(making)
        assert not (making.out / "train.jsonl").exists()
        fails, before = False, len(stub.requests)
        assert make_data(making)["kept"] == 5
        assert len(stub.requests) - before == 2


def test_a_question_that_the_endpoint_refuses_is_dropped_but_all_of_them_end_the_command(job):
    with serving(Stub(lambda r: Sent(400, b'{"error": {"message": "too long"}}') if asked(r) == Q else None)) as stub:
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
