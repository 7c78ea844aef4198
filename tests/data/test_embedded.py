"""Text and records that every CPython carries: its library's sources, and questions about its functions."""

import inspect
import json.decoder
import math

import pytest

from solar_jax.config import DataConfig
from solar_jax.data import embedded
from solar_jax.data.sources import documents, sources_of
from solar_jax.errors import UserError


def read(kind: str) -> dict:
    (source,) = sources_of(DataConfig(sources=(embedded.FUNCTIONS,), format=kind))
    return {d.id: d.record for d in documents(source)}


def test_answers_are_the_documentation_of_what_was_asked_about():
    found = read("conversations")
    assert len(found) > 500
    record = found["pydoc-functions:math.sqrt"]
    assert record == {"prompt": "What does math.sqrt do in Python?", "completion": "Return the square root of x."}
    assert "Return the square root of x." in math.sqrt.__doc__
    assert len({r["completion"] for r in found.values()}) == len(found)


def test_the_rejected_answer_of_a_pair_is_another_functions():
    pairs, answers = read("pairs"), read("conversations")
    assert pairs.keys() == answers.keys()
    for name, record in pairs.items():
        assert record["chosen"] == answers[name]["completion"]
        assert record["rejected"] != record["chosen"]


def test_records_are_not_taken_for_text():
    (source,) = sources_of(DataConfig(sources=(embedded.FUNCTIONS,)))
    with pytest.raises(UserError, match="pydoc-functions holds conversations and pairs"):
        list(documents(source))


def test_the_standard_librarys_sources_are_a_million_tokens_and_hold_no_help_topic():
    (source,) = sources_of(DataConfig(sources=(embedded.STDLIB,)))
    found = {d.id: d.text for d in documents(source)}
    assert found["python-stdlib:json/decoder.py"] == inspect.getsource(json.decoder)
    assert sum(map(len, found.values())) > 5_000_000
    assert not any(name.split(":")[1].startswith(("test", "encodings", "pydoc_data")) for name in found)
    topics = [text for _, text in embedded.topics() if len(text) > 500]
    everything = "\n".join(found.values())
    assert not any(text[100:300] in everything for text in topics)
    assert topics[0][100:300] in "\n".join(topics)  # the control
