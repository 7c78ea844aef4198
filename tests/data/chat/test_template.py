"""Chat templates write the bytes that transformers writes, and answers are found in them."""

import importlib.util
import itertools
import pathlib

import pytest
import transformers

from solar_jax.data.chat.template import NAMED, Template, load_template
from solar_jax.errors import UserError
from tests.conftest import byte_tokenizer

SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather", "description": "Weather of <city> & more, é",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]  # fmt: skip


def package(name: str, folder: str) -> pathlib.Path:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return pathlib.Path(spec.submodule_search_locations[0]) / folder


TRL, MERGEKIT = package("trl", "chat_templates"), package("mergekit", "_data/chat_templates")
FILES = {
    "chatml": MERGEKIT / "chatml.jinja",
    "alpaca": MERGEKIT / "alpaca.jinja",
    "mistral": MERGEKIT / "mistral.jinja",
    "exaone": MERGEKIT / "exaone.jinja",
    "llama3": TRL / "llama3.jinja",
    "llama3_2": TRL / "llama3_2.jinja",
    "qwen2_5": TRL / "qwen2_5.jinja",
    "qwen3": TRL / "qwen3.jinja",
    "qwen3_training": TRL / "qwen3_training.jinja",
    "phi3": TRL / "phi3.jinja",
}


@pytest.fixture(scope="module")
def theirs() -> transformers.PreTrainedTokenizerFast:
    return transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer(), **SPECIALS)


def conversation(turns: int, system: bool, tools: bool = False) -> list[dict]:
    messages = [{"role": "system", "content": "You are brief. é"}] if system else []
    for i in range(turns):
        messages.append({"role": "user", "content": f" question {i} <b> & 'c'\n"})
        if tools and i == 0:
            call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln <>"}}}
            messages += [
                {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "rain"}
            ]  # fmt: skip
        messages.append({"role": "assistant", "content": f"answer {i}"})
    return messages


CASES = list(itertools.product(range(1, 6), (False, True), (False, True)))


@pytest.mark.parametrize("name", [*FILES, "smollm2"])
def test_a_template_writes_the_bytes_of_transformers(theirs, smollm2, name):
    if name == "smollm2":
        text = load_template("tokenizer", smollm2.companions, "smollm2").text
    else:
        text = FILES[name].read_text()
    ours = Template(name, text, tuple(SPECIALS.items()), date="2026-11-28")
    wrote = 0
    for (turns, system, asks), tools in itertools.product(CASES, (False, True)):
        messages = conversation(turns, system, tools)
        messages = messages[:-1] if asks else messages
        how = {"tools": TOOLS if tools else None, "add_generation_prompt": asks}
        date = {"date_string": "28 Nov 2026"} if name == "llama3_2" else {}  # transformers has the day of today
        try:
            expected = theirs.apply_chat_template(messages, chat_template=text, tokenize=False, **how, **date)
        except Exception:  # of many types: the template refuses such a conversation
            with pytest.raises(UserError, match="the chat template fails"):
                ours.render(messages, **how, **date)
            continue
        assert ours.render(messages, **how, **date) == expected
        wrote += 1
    assert wrote >= 20


@pytest.mark.parametrize("file", sorted(TRL.glob("*_training.jinja")), ids=lambda file: file.stem)
def test_marked_answers_are_those_that_transformers_marks(theirs, file):
    """Tokens are bytes here, so that its mask of tokens is one of bytes."""
    ours = Template(file.stem, file.read_text(), tuple(SPECIALS.items()))
    messages = conversation(3, system=True)
    try:
        found = theirs.apply_chat_template(
            messages, chat_template=file.read_text(), tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
    except Exception:
        with pytest.raises(UserError, match="the chat template fails"):
            ours.render_with_spans(messages)
        return
    text, spans = ours.render_with_spans(messages)
    encoding = byte_tokenizer().encode(text, add_special_tokens=False)
    mask = [int(any(a < end and begin < b for a, b in spans)) for begin, end in encoding.offsets]
    assert encoding.ids == found["input_ids"]
    assert mask == found["assistant_masks"]


def test_solars_own_template_is_the_papers_prompt_format():
    ours = Template("solar", NAMED["solar"])
    messages = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "Bye"},
    ]  # fmt: skip
    assert ours.render(messages, add_generation_prompt=True) == (
        "### System:\nBe brief.\n\n### User:\nHi\n\n### Assistant:\nHello.### User:\nBye\n\n### Assistant:\n"
    )
    with pytest.raises(UserError, match="a message is of the role tool"):
        ours.render([{"role": "tool", "content": "x"}])


def test_the_date_of_a_template_is_fixed():
    text = "{{ strftime_now('%d %b %Y') }}"
    assert Template("t", text, date="2024-02-29").render([]) == "29 Feb 2024"
    assert Template("t", text).needs_date
    assert not Template("t", "{{ messages[0]['content'] }}").needs_date


@pytest.mark.parametrize(
    "text",
    [
        "{% set x = namespace(__a=1) %}",
        "{{ nothing.here }}",
        "{% for %}",
        "{{ raise_exception('no') }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
        "{{ ''.__class__.__mro__ }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_refused_in_one_sentence(text):
    with pytest.raises(UserError, match="t: the chat template fails: "):
        Template("t", text).render([{"role": "user", "content": "a"}])


def test_the_template_is_the_tokenizers_a_file_or_one_by_name(tmp_path):
    file = tmp_path / "own.jinja"
    file.write_text("{{ eos_token }}")
    companions = {
        "tokenizer_config.json": b'{"chat_template": [{"name": "default", "template": "D"}, {"name": "tool_use", '
        b'"template": "T"}], "eos_token": {"content": "</s>"}}'
    }
    assert load_template("tokenizer", companions, "m").text == "D"
    assert load_template(str(file), companions, "m").render([]) == "</s>"
    assert load_template("tokenizer", companions | {"chat_template.jinja": b"J"}, "m").text == "J"
    assert load_template("chatml", {}, "m").text == NAMED["chatml"]
    with pytest.raises(UserError, match="m: the tokenizer has no chat template"):
        load_template("tokenizer", {}, "m")
    with pytest.raises(UserError, match=r"config\.data\.template must be tokenizer, solar, chatml, none or a file"):
        load_template("sola", {}, "m")
