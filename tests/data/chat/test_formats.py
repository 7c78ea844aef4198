"""Records of every known form become the messages that they stand for; others are refused by key and record."""

import pytest

from solar_jax.config import DataConfig
from solar_jax.data.chat.formats import CONVERSATIONS, FORMS, PAIRS, Conversation, Pair, contents, kind_of, read_record
from solar_jax.data.sources import documents, sources_of
from solar_jax.errors import UserError


def said(found: Conversation) -> list[tuple[str, str]]:
    return [(m["role"], m["content"]) for m in found.messages]


Q, A = ("user", "q"), ("assistant", "a")
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("messages", {"messages": MESSAGES}, [Q, A]),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, [Q, A]),
        ("sharegpt", {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
         [("system", "s"), Q, A]),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, [Q, A]),
        ("prompt_completion", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, [Q, A]),
        ("alpaca", {"instruction": "q", "input": "", "output": "a"}, [Q, A]),
        ("alpaca", {"instruction": "q", "input": "more", "output": "a"}, [("user", "q\n\nmore"), A]),
        ("openorca", {"id": "x", "system_prompt": "s", "question": "q", "response": "a"}, [("system", "s"), Q, A]),
        ("openorca", {"system_prompt": "", "question": "q", "response": "a"}, [Q, A]),
        ("metamath", {"type": "MATH", "query": "q", "original_question": "o", "response": "a"}, [Q, A]),
        ("gsm8k", {"question": "q", "answer": "a"}, [Q, A]),
    ],
)  # fmt: skip
def test_a_conversation_is_known_by_its_keys(form, record, expected):
    for name in ("conversations", form):
        assert said(read_record(record, "r", name)) == expected


B = ("assistant", "b")
REJECTED = [MESSAGES[0], {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("form", "record"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}),
        ("preference", {"prompt": MESSAGES[:1], "chosen": MESSAGES[1:], "rejected": REJECTED[1:]}),
        ("preference", {"chosen": MESSAGES, "rejected": REJECTED}),  # the prompt is implied
        ("preference", {"prompt": "q", "chosen": MESSAGES, "rejected": REJECTED}),  # or said twice
        ("orca_pairs", {"system": "", "question": "q", "chosen": "a", "rejected": "b"}),
        ("alpaca_pairs", {"instruction": "q", "input": "", "output": "x", "chosen": "a", "rejected": "b"}),
    ],
)
def test_a_pair_is_known_by_its_keys(form, record):
    for name in ("pairs", form):
        found = read_record(record, "r", name)
        assert isinstance(found, Pair)
        assert (said(found.chosen), said(found.rejected)) == ([Q, A], [Q, B])
        assert found.chosen.prompt == found.rejected.prompt == 1
    assert contents(found) == "q\n\na\n\nb"


def test_an_implied_prompt_is_all_that_both_answers_share():
    longer = [*MESSAGES, {"role": "user", "content": "and?"}]
    sides = [[*longer, {"role": "assistant", "content": c}] for c in "ab"]
    found = read_record({"chosen": sides[0], "rejected": sides[1]}, "r", "pairs")
    assert found.chosen.prompt == 3


def test_tools_and_template_arguments_travel_with_a_record():
    record = {
        "messages": MESSAGES,
        "tools": '[{"type": "function"}]',
        "chat_template_kwargs": {"enable_thinking": False},
    }
    found = read_record(record, "r", "conversations")
    assert (found.tools, found.kwargs) == ([{"type": "function"}], {"enable_thinking": False})


@pytest.mark.parametrize(
    ("form", "record", "expected"),
    [
        ("conversations", {"text": "x"}, r"r: is of no known form .*found the keys \['text'\]"),
        ("pairs", {"messages": MESSAGES}, "r: is of no known form"),
        ("conversations", "text", "r: must be a record with keys, found str"),
        ("conversations", {"messages": []}, "r: 'messages' must hold a list of messages"),
        ("conversations", {"messages": [{"role": "bot", "content": "x"}]}, "'role' must be one of .*, found 'bot'"),
        ("conversations", {"messages": [{"from": "human", "value": "x"}]}, "must have 'role' and 'content'"),
        ("conversations", {"messages": [{"role": "user", "content": None}]}, "'user' has no 'content'"),
        ("conversations", {"messages": [{"role": "user", "content": 3}]}, "must hold text, found int"),
        ("conversations", {"conversations": [{"from": "alien", "value": "x"}]}, "'from' must be one of"),
        ("conversations", {"messages": MESSAGES, "tools": "{"}, "'tools' is not JSON"),
        ("alpaca", {"question": "q", "answer": "a"}, "a record of the form 'alpaca' must have 'instruction'"),
        ("gsm8k", {"question": "q", "answer": 3}, "r: 'answer' must hold text, found int"),
        ("pairs", {"chosen": "a", "rejected": "b"}, "are text, which needs a 'prompt'"),
        (
            "pairs",
            {"chosen": MESSAGES, "rejected": [{"role": "user", "content": "z"}, *REJECTED]},
            "must share a prompt",
        ),
    ],
)
def test_a_record_of_no_known_form_is_refused_by_key(form, record, expected):
    with pytest.raises(UserError, match=expected):
        read_record(record, "r", form)


def test_every_form_is_a_value_of_the_key():
    assert ("text", "conversations", *CONVERSATIONS, "pairs", *PAIRS) == FORMS
    assert (kind_of("alpaca"), kind_of("orca_pairs"), kind_of("text")) == ("conversations", "pairs", "text")
    with pytest.raises(UserError, match=r"config\.data\.format must be one of text, conversations, .*, found 'chats'"):
        sources_of(DataConfig(format="chats"))


@pytest.mark.parametrize("name", ["a.txt", "a.md"])
def test_text_is_not_taken_for_records(tmp_path, name):
    (tmp_path / name).write_text('{"prompt": "q", "completion": "a"}')
    (source,) = sources_of(DataConfig(sources=(str(tmp_path / name),), format="conversations"))
    with pytest.raises(UserError, match=r"must hold records \(\.jsonl, \.json"):
        list(documents(source))
    (source,) = sources_of(DataConfig(format="conversations"))
    with pytest.raises(UserError, match="pydoc-topics holds text; config"):
        list(documents(source))
