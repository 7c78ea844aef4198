"""Data made through a stand-in for an endpoint: what is kept, in which form, and what is dropped and why."""

import pathlib
import time

import pytest

from solar_jax.data.chat.formats import Conversation, Pair, read_record
from solar_jax.data.making import endpoint as endpoint_module
from solar_jax.data.making.filters import REASONS
from solar_jax.data.prepared.evaluation_sets import SOLAR
from solar_jax.data.sources import documents, parse_sources
from solar_jax.make_data import make_data
from tests.data.making.stub import (
    FIFTY,
    FIRST,
    HEAD,
    MakeJob,
    Stub,
    asked,
    dropped,
    is_answer,
    job_in,
    lines,
    own_text,
    said,
    serving,
    write_questions,
)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch):
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.001)


@pytest.fixture
def job(tmp_path) -> MakeJob:
    return job_in(tmp_path)


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


BAD = {
    "empty question": ("question", said(" "), "empty", "the rephrased question"),
    "no content": ("answer", said(None), "empty", "the answer"),
    "cut off": ("answer", said("1000 + 3", "length"), "cut_off", "the answer: length"),
    "cut off question": ("question", said("Ada has", "length"), "cut_off", "the rephrased question: length"),
    "unchanged": (
        "question",
        said(FIRST.upper().replace(",", "").replace("?", " !")),
        "unchanged",
        "but for case, whi",
    ),
    "lost": ("question", said("How many are 1,000 and 3?"), "changed_numbers", "lost 20"),
    "added": ("question", said(f"{HEAD} {FIRST} She has 2 cats."), "changed_numbers", "added 2"),
    "no number": ("answer", said("Many.\nI cannot tell."), "no_final_number", "its last line is 'I cannot tell.'"),
    "wrong": ("answer", said("The answer is: 1024"), "wrong_final_number", "1024 in place of 1023"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_filter_drops_what_it_should_and_nothing_else(job, name):
    step, bad, reason, details = BAD[name]

    def override(request):
        return bad if asked(request) == FIRST and is_answer(request) == (step == "answer") else None

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
    override = lambda r: said(FIFTY[0]["answer"]) if is_answer(r) and asked(r) == FIRST else None  # noqa: E731
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
        if not is_answer(request) and asked(request) == FIRST:
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
