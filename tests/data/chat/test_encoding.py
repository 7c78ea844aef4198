"""Tokens and marks of conversations and pairs are those of TRL's prepared datasets, but for the rules listed here.

Ours differ where a record is longer than a row (TRL cuts to max_length, here T + 1), where a template writes no special
token (the tokenizer's BOS and EOS stand around it), and where TRL trains every token of a chat.
"""

import dataclasses
import os

import datasets
import numpy as np
import pytest
import transformers

from solar_jax.data.chat import encoding
from solar_jax.data.chat.encoding import LeftOut, Rules
from solar_jax.data.chat.template import NAMED, Template, load_template
from solar_jax.data.sources import Document
from solar_jax.errors import UserError
from tests.conftest import byte_tokenizer, hf_model
from tests.data.chat.test_template import FILES, SPECIALS, TRL, conversation

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
BYTES = byte_tokenizer().to_str()
LENGTH = 512


def rules_of(template: Template | str, form: str = "conversations", **changes) -> Rules:
    if isinstance(template, str):
        template = Template(template, NAMED.get(template) or FILES[template].read_text(), tuple(SPECIALS.items()))
    return dataclasses.replace(Rules(BYTES, 2, template, form), **changes)


def encoded(rules: Rules, record: dict, length: int = LENGTH):
    return rules.encode(Document("r:0", "", record), length)


def spoken(rules: Rules, record: dict, length: int = LENGTH) -> list[tuple[str, str]]:
    """Each sequence's text, and what of it is trained."""
    tokenizer = byte_tokenizer()
    return [
        tuple(tokenizer.decode(ids.tolist(), skip_special_tokens=False) for ids in (e.tokens, e.tokens[e.trained]))
        for e in encoded(rules, record, length)
    ]  # fmt: skip


# ---- TRL ------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2, tmp_path_factory) -> transformers.PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("smollm2")
    for name, content in smollm2.companions.items():
        (folder / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(folder)


TOPICS = ["tides", "Zürich", "the number π", "code like f(x) = {x}", "emoji 🙂", "two\n\nparagraphs"]
CHATS = [{"messages": conversation(1 + i % 3, system=i % 2 == 0)} for i in range(6)]
COMPLETIONS = [{"prompt": conversation(1, False)[:1], "completion": conversation(1, False)[1:]} for _ in range(3)]
COMPLETIONS += [
    {"prompt": [{"role": "user", "content": f"Tell me about {t}."}],
     "completion": [{"role": "assistant", "content": f"{t}: well ...  \n" * (i + 1)}]} for i, t in enumerate(TOPICS)
]  # fmt: skip


def of_trl(tokenizer, records, tmp_path, **config) -> list[tuple[list[int], list[int]]]:
    """The tokens and labels of TRL's SFT trainer."""
    from trl import SFTConfig, SFTTrainer

    args = SFTConfig(
        output_dir=str(tmp_path), report_to=[], max_length=None, bf16=False, use_cpu=True, gradient_checkpointing=False,
        **config,
    )  # fmt: skip
    model = hf_model(vocab_size=len(tokenizer))
    made = SFTTrainer(
        model, args=args, train_dataset=datasets.Dataset.from_list(records), processing_class=tokenizer
    ).train_dataset
    return [(row["input_ids"], row.get("labels", row["input_ids"])) for row in made]


def labels_of(e) -> list[int]:
    return np.where(e.trained, e.tokens, -100).tolist()


def smollm2_rules(smollm2, form="conversations", text=None, **changes) -> Rules:
    template = load_template("tokenizer", smollm2.companions, "smollm2")
    template = template if text is None else dataclasses.replace(template, text=text)
    return Rules(smollm2.companions["tokenizer.json"].decode(), 2, template, form, **changes)


def test_prompts_and_completions_are_trls(smollm2, smollm2_tokenizer, tmp_path):
    expected = of_trl(smollm2_tokenizer, COMPLETIONS, tmp_path)
    for record, (ids, labels) in zip(COMPLETIONS, expected, strict=True):
        (found,) = encoded(smollm2_rules(smollm2), record)
        assert found.tokens.tolist() == ids
        assert labels_of(found) == labels


def test_marked_chats_are_trls(smollm2, smollm2_tokenizer, tmp_path):
    text = (TRL / "qwen2_5_training.jinja").read_text()
    smollm2_tokenizer.chat_template = text
    expected = of_trl(smollm2_tokenizer, CHATS, tmp_path, assistant_only_loss=True)
    for record, (ids, labels) in zip(CHATS, expected, strict=True):
        (found,) = encoded(smollm2_rules(smollm2, text=text), record)
        assert found.tokens.tolist() == ids
        assert labels_of(found) == labels


def test_chats_by_prefixes_are_the_marked_ones(smollm2):
    """SmolLM2's own template marks nothing; its turns are ChatML's, as are those of the template that marks."""
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>\n' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    for record in CHATS:
        (by_marks,) = encoded(smollm2_rules(smollm2, text=marked), record)
        (by_prefixes,) = encoded(smollm2_rules(smollm2, text=NAMED["chatml"]), record)
        np.testing.assert_array_equal(by_marks.tokens, by_prefixes.tokens)
        np.testing.assert_array_equal(by_marks.trained, by_prefixes.trained)


PAIRS = [
    {"prompt": r["prompt"], "chosen": r["completion"], "rejected": [{"role": "assistant", "content": f"no {i}"}]}
    for i, r in enumerate(COMPLETIONS)
]


def test_pairs_are_trls(smollm2, smollm2_tokenizer, tmp_path):
    from trl import DPOConfig, DPOTrainer

    smollm2_tokenizer.chat_template = load_template("tokenizer", smollm2.companions, "smollm2").text
    args = DPOConfig(
        output_dir=str(tmp_path), report_to=[], max_length=None, bf16=False, use_cpu=True, gradient_checkpointing=False
    )
    model = hf_model(vocab_size=len(smollm2_tokenizer))
    made = DPOTrainer(
        model, ref_model=hf_model(vocab_size=len(smollm2_tokenizer)), args=args,
        train_dataset=datasets.Dataset.from_list(PAIRS), processing_class=smollm2_tokenizer,
    ).train_dataset  # fmt: skip
    for record, row in zip(PAIRS, made, strict=True):
        sides = encoded(smollm2_rules(smollm2, "pairs"), record)
        for side, answer in zip(sides, (row["chosen_ids"], row["rejected_ids"]), strict=True):
            assert side.tokens.tolist() == row["prompt_ids"] + answer
            assert side.tokens[side.trained].tolist() == answer


# ---- Rules ----------------------------------------------------------------------------------------------------------
CHAT = {"messages": conversation(2, system=False)}


def test_only_answers_are_trained_and_with_them_what_ends_them():
    ((text, trained),) = spoken(rules_of("chatml"), CHAT)
    assert text.endswith("<|im_start|>assistant\nanswer 1<|im_end|>\n</s>")  # bytes know no <|im_end|>: EOS follows
    assert trained == "answer 0<|im_end|>\nanswer 1<|im_end|>\n</s>"
    ((text, trained),) = spoken(rules_of("llama3"), CHAT)
    assert text.startswith("<s><|start_header_id|>user")
    assert trained == "answer 0<|eot_id|>answer 1<|eot_id|></s>"
    ((_, trained),) = spoken(rules_of("mistral"), CHAT)
    assert trained == " answer 0</s> answer 1</s>"


@pytest.mark.parametrize(
    ("train_on", "expected"), [("answers", "answer 0</s>answer 1</s>"), ("last", "answer 1</s>"), ("all", None)]
)
def test_what_is_trained_is_chosen_by_a_key(train_on, expected):
    mistral = rules_of("mistral", train_on=train_on)
    ((text, trained),) = spoken(mistral, CHAT)
    assert trained.replace("> answer", ">answer").lstrip() == (expected or text)


def test_an_answer_of_weight_0_is_not_trained():
    messages = [m | ({"weight": 0} if i == 1 else {}) for i, m in enumerate(CHAT["messages"])]
    ((_, trained),) = spoken(rules_of("llama3"), {"messages": messages})
    assert trained == "answer 1<|eot_id|></s>"


def test_a_template_that_rewrites_earlier_turns_trains_the_last_answer_and_says_so():
    thoughts = {"messages": [m | ({"reasoning": "hm"} if m["role"] == "assistant" else {}) for m in CHAT["messages"]]}
    rules = rules_of("qwen3")
    ((text, trained),) = spoken(rules, thoughts)
    assert text.count("answer") == 2
    assert trained.count("answer") == 1
    assert "answer 1" in trained
    assert any("only the last answer of a conversation is trained" in note for note in rules.check())
    assert not any("last answer of" in note for note in rules_of("llama3").check())


def test_where_a_template_writes_no_special_token_bos_and_eos_are_the_tokenizers():
    with_bos = byte_tokenizer()
    from tokenizers import processors

    with_bos.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    rules = dataclasses.replace(rules_of("solar"), tokenizer=with_bos.to_str())
    ((text, trained),) = spoken(rules, CHAT)
    assert text.startswith("<s>### User:\n")
    assert text.endswith("### Assistant:\nanswer 1</s>")
    assert text.count("<s>") == text.count("</s>") == 1
    assert trained == "answer 0answer 1</s>"
    ((text, _),) = spoken(dataclasses.replace(rules, template=rules_of("mistral").template), CHAT)
    assert text.count("<s>") == 1  # the template's own


def test_a_template_whose_marks_leave_out_the_end_of_an_answer_is_refused():
    text = "{% for m in messages %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    with pytest.raises(UserError, match="ends before the token that ends an answer"):
        rules_of(Template("t", text, tuple(SPECIALS.items()))).check()


def test_a_prompt_that_is_no_prefix_of_its_conversation_is_refused():
    text = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}</s>{% endfor %}"
    with pytest.raises(UserError, match="r:0: t: the prompt for the last answer is no prefix"):
        encoded(rules_of(Template("t", text, tuple(SPECIALS.items()))), CHAT)


def test_what_is_too_long_is_cut_or_dropped_and_what_has_nothing_left_is_dropped():
    record = {"prompt": "abcdef", "completion": "0123456789"}
    rules = rules_of("none")
    (cut,) = encoded(rules, record, length=9)
    assert (len(cut.tokens), int(cut.trained.sum())) == (10, 4)  # T inputs and the last one's target
    for change, length, reason in (({"too_long": "drop"}, 9, encoding.TOO_LONG), ({}, 5, encoding.NOTHING_LEFT)):
        with pytest.raises(LeftOut, match=reason):
            encoded(dataclasses.replace(rules, **change), record, length)
    with pytest.raises(LeftOut, match=encoding.EMPTY):
        encoded(rules, {"prompt": "a", "completion": "  "})


@pytest.mark.parametrize(
    ("record", "length", "reason"),
    [
        ({"prompt": "ab", "chosen": "same", "rejected": "same"}, LENGTH, encoding.EQUAL),
        ({"prompt": "ab", "chosen": "the same x", "rejected": "the same y"}, 16, encoding.EQUAL),
        ({"prompt": "ab", "chosen": "yes", "rejected": " "}, LENGTH, encoding.EMPTY),
        ({"prompt": "ab" * 9, "chosen": "yes", "rejected": "no"}, 16, encoding.PROMPT_FILLS),
        ({"prompt": "ab", "chosen": "y", "rejected": "n", "chosen-rating": 7, "rejected-rating": 7}, LENGTH,
         encoding.TIE),
        ({"prompt": "ab", "chosen": "y", "rejected": "n", "metadata": {"score_chosen": 1, "score_rejected": 1}}, LENGTH,
         encoding.TIE),
    ],
)  # fmt: skip
def test_pairs_that_teach_nothing_are_left_out_by_reason(record, length, reason):
    with pytest.raises(LeftOut, match=reason):
        encoded(rules_of("none", "pairs"), record, length)
    if reason == encoding.TIE:
        assert len(encoded(rules_of("none", "pairs", keep_ties=True), record, length)) == 2


def test_every_setting_is_in_the_hash_of_the_rules():
    rules = rules_of("chatml")
    changes = [
        {"tokenizer": "{}"}, {"eos": 3}, {"form": "alpaca"}, {"train_on": "last"}, {"too_long": "drop"},
        {"keep_ties": True}, {"template": dataclasses.replace(rules.template, date="2026-01-01")},
        {"template": dataclasses.replace(rules.template, text="x")},
    ]  # fmt: skip
    assert {next(iter(c)) for c in changes} == {f.name for f in dataclasses.fields(Rules)}
    assert len({dataclasses.replace(rules, **c).fingerprint() for c in changes} | {rules.fingerprint()}) == 9
