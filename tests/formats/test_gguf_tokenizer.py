"""Tokenizers of GGUF files against transformers' reader of the same file, SentencePiece's rule and cuts by hand."""

import itertools
import json
import pathlib

import gguf
import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers, trainers

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.errors import UserError
from solar_jax.formats.gguf_header import read_header
from solar_jax.formats.gguf_tokenizer import WORDS, files
from tests.checkpoints.test_gguf import hf_tensors, refusal, write_gguf
from tests.conftest import byte_tokenizer

TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\n\n\ttabs \r\n and   more   ",
    "naïve café, 東京タワー, Привет, 🙂👩‍👩‍👧",
    "def f(x):\n    return x ** 2  # it's\n",
    "I'LL pay 12345.67€, you'Ve 1,000,000!!! they're",
    "a<s>b</s> c",
    " leading",
    "",
    " ",
    "x\u0000y\u200bz",
]
PROSE = " ".join(TEXTS[:5] * 3) + "the theme there then they them this that those 1234 567 don't won't\n\n" * 5

RARE = set("東京タワー🙂👩é")  # letters that SentencePiece's vocabulary lacks, so that they become bytes


def trained(pre: str, size: int = 400) -> tuple[list[str], list[str]]:
    """Tokens and merges of a byte-level BPE that learnt from PROSE."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = WORDS[pre].pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator([PROSE] * 3, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(merge) for merge in model["merges"]]


def pieces(learnt: int = 120) -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary of PROSE as Llama's: special tokens, bytes, what was merged best first, letters."""
    words = [f"▁{word}" for word in PROSE.split()]
    made: list[str] = []
    symbols = [list(word) for word in words]
    while len(made) < learnt:
        pairs: dict[str, int] = {}
        for word in symbols:
            for left, right in itertools.pairwise(word):
                if RARE.isdisjoint(left + right):
                    pairs[left + right] = pairs.get(left + right, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        made.append(best)
        symbols = [merged(word, best) for word in symbols]
    letters = sorted({letter for word in words for letter in word} - RARE)
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *made, *letters, "<own>", "▁▁"]
    scores = [0.0] * 259 + [-float(i) for i in range(len(made) + len(letters))] + [0.0, -1e5]
    return tokens, scores, [2, 3, 3, *[6] * 256, *[1] * (len(made) + len(letters)), 4, 1]


def merged(word: list[str], piece: str) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and out[-1] + symbol == piece:
            out[-1] = piece
        else:
            out.append(symbol)
    return out


def by_rule(text: str, tokens: list[str], scores: list[float], kinds: list[int]) -> list[int]:
    """SentencePiece's BPE: the pair whose piece scores best is joined, the leftmost of equals, until none is left."""
    score_of = {t: s for t, s, k in zip(tokens, scores, kinds, strict=True) if k == 1}
    symbols = list(f"▁{text}".replace(" ", "▁")) if text else []
    while True:
        joined = enumerate(a + b for a, b in itertools.pairwise(symbols))
        pairs = [(-score_of[piece], i) for i, piece in joined if piece in score_of]
        if not pairs:
            break
        _, i = min(pairs)
        symbols[i : i + 2] = ["".join(symbols[i : i + 2])]
    ids = {t: i for i, t in enumerate(tokens)}
    return [i for s in symbols for i in ([ids[s]] if s in score_of else [ids[f"<0x{b:02X}>"] for b in s.encode()])]


def metadata(**fields) -> dict:
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()}


def sentencepiece(file: pathlib.Path, **changes) -> pathlib.Path:
    tokens, scores, kinds = pieces()
    keys = {"model": "llama", "pre": None, "tokens": tokens, "scores": scores, "token_type": kinds, "merges": None}
    keys |= {"unknown_token_id": 0} | changes
    keys = {f"tokenizer__ggml__{name}": value for name, value in keys.items()}
    tensors = hf_tensors(vocab_size=len(tokens))
    return write_gguf(file, tensors, llama__vocab_size=len(tokens), **keys)


def byte_level(file: pathlib.Path, pre: str, **changes) -> pathlib.Path:
    tokens, merges = trained(pre)
    keys = {"pre": pre, "tokens": tokens, "merges": merges, "token_type": [3, 3, 3, *[1] * (len(tokens) - 3)]} | changes
    keys = {f"tokenizer__ggml__{name}": value for name, value in keys.items()}
    return write_gguf(file, hf_tensors(vocab_size=len(tokens)), llama__vocab_size=len(tokens), **keys)


def opened(file: pathlib.Path) -> tokenizers.Tokenizer:
    return load_tokenizer(open_checkpoint(str(file)))


def theirs(file: pathlib.Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@pytest.mark.parametrize("pre", ["gpt-2", "llama-bpe", "llama3", "qwen2"])
def test_byte_level_tokens_are_transformers(tmp_path, pre):
    file = byte_level(tmp_path / "x.gguf", pre)
    ours, expected = opened(file), theirs(file)
    assert ours.get_vocab().items() <= expected.get_vocab().items()  # theirs has GPT-2's <|endoftext|> too
    for text in TEXTS:
        ids = ours.encode(text, add_special_tokens=False).ids
        assert ids == expected.encode(text, add_special_tokens=False)
        assert ours.decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    ("pre", "text", "words"),
    [
        ("gpt-2", "I'll see 1234€!", ["I", "'ll", " see", " 1234", "€!"]),
        ("smollm", "at 2024", ["at", " ", "2", "0", "2", "4"]),
        ("llama-bpe", "I'LL see 12345€!\n\n x", ["I", "'LL", " see", " ", "123", "45", "€!\n\n", " x"]),
        ("llama-bpe", "we'VEx", ["we", "'VE", "x"]),
        ("llama-bpe", "f(x)  = _a", ["f", "(x", ")", " ", " =", " _", "a"]),
        ("qwen2", "I'LL see 123 \n x", ["I", "'LL", " see", " ", "1", "2", "3", " \n", " x"]),
        ("deepseek-r1-qwen", "it's 12", ["it", "'s", " ", "1", "2"]),
        # Digits by threes, from the left, and signs of their own, before GPT-2's cuts.
        ("default", "pay 12345+6 now!", ["pay", " ", "123", "45", "+", "6", " now", "!"]),
        ("default", "at 12", ["at", " ", "12"]),
        ("default", "a <b>", ["a", " ", "<", "b", ">"]),
    ],
)
def test_text_is_cut_into_words_as_the_name_says(pre, text, words):
    cut = [word for word, _ in WORDS[pre].pre_tokenizer.pre_tokenize_str(text)]
    spelt = tokenizers.decoders.ByteLevel()
    assert [spelt.decode([word]) for word in cut] == words


def test_a_word_of_llama_3s_vocabulary_is_one_token_whatever_the_merges_say(tmp_path):
    tokens = [t for t, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])] + ["abc", "bc"]
    keys = {"tokens": tokens, "token_type": [3, 3, 3, *[1] * 258], "merges": ["b c"]}
    for pre, expected in (("llama-bpe", ["abc"]), ("qwen2", ["a", "bc"])):
        file = byte_level(tmp_path / f"{pre}.gguf", pre, **keys)
        assert opened(file).encode("abc", add_special_tokens=False).tokens == expected


def test_qwen_normalises_text_and_llama_does_not(tmp_path):
    for pre, same in (("qwen2", True), ("llama-bpe", False)):
        tokenizer = opened(byte_level(tmp_path / f"{pre}.gguf", pre))
        assert (tokenizer.encode("e\u0301").ids == tokenizer.encode("é").ids) == same


def test_the_tokenizer_merges_and_keeps_digits_and_special_tokens_apart(tmp_path):
    tokenizer = opened(write_gguf(tmp_path / "x.gguf", hf_tensors()))
    vocab = byte_tokenizer().get_vocab()
    assert tokenizer.encode("the 10").ids == [259, *(vocab[t] for t in ("e", "Ġ", "1", "0"))]
    assert tokenizer.encode("t</s>h<own>").ids == [vocab["t"], 2, vocab["h"], 260]
    assert tokenizer.decode([vocab["t"], 2, 260]) == "t<own>"  # a token of control is left out, the other is text


def test_sentencepiece_tokens_are_its_rules_and_transformers(tmp_path):
    file = sentencepiece(tmp_path / "x.gguf")
    ours, expected = opened(file), theirs(file)
    assert ours.get_vocab() == expected.get_vocab()
    for text in [*TEXTS, PROSE, "them 東", "  ▁ ", "ththth", "aaaa"]:
        ids = ours.encode(text, add_special_tokens=False).ids
        if "<s>" not in text:
            assert ids == by_rule(text, *pieces())
            assert ours.decode(ids) == text.replace("▁", " ")
        if not text.startswith(" ") and "<s>" not in text:  # their Metaspace adds no space there
            assert ids == expected.encode(text, add_special_tokens=False)


def test_sentencepiece_merges_are_transformers(tmp_path):
    file = sentencepiece(tmp_path / "x.gguf")
    ours = json.loads(opened(file).to_str())["model"]["merges"]
    expected = json.loads(theirs(file).backend_tokenizer.to_str())["model"]["merges"]
    normal = {t for t, k in zip(pieces()[0], pieces()[2], strict=True) if k == 1}
    assert ours == [merge for merge in expected if {*merge, "".join(merge)} <= normal]
    assert len(ours) > 100


def test_sentencepieces_special_tokens_are_cut_out_and_texts_begin_with_one(tmp_path):
    tokenizer = opened(sentencepiece(tmp_path / "x.gguf"))
    ids = tokenizer.get_vocab()
    bare = tokenizer.encode("a", add_special_tokens=False).ids
    assert tokenizer.encode("a</s><own>").ids == [1, *bare, 2, ids["<own>"]]
    assert tokenizer.decode([1, 0, ids["▁the"], 2]) == "the"
    assert tokenizer.encode("a", "b").ids[0] == 1


@pytest.mark.parametrize(
    ("keys", "ends"),
    [
        ({}, (True, False)),  # as llama.cpp does where the file does not say
        ({"add_bos_token": False}, (False, False)),
        ({"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ({"bos_token_id": None}, (False, False)),
    ],
)
def test_texts_begin_and_end_as_the_file_says(tmp_path, keys, ends):
    bare = opened(sentencepiece(tmp_path / "x.gguf", **keys)).encode("the", add_special_tokens=False).ids
    found = opened(sentencepiece(tmp_path / "x.gguf", **keys)).encode("the").ids
    assert found == [1] * ends[0] + bare + [2] * ends[1]


@pytest.mark.parametrize(("pre", "begins"), [("llama-bpe", True), ("qwen2", False), ("default", False)])
def test_of_byte_level_tokenizers_llama_3s_begins_texts_unless_told_otherwise(tmp_path, pre, begins):
    assert (opened(byte_level(tmp_path / "x.gguf", pre)).encode("a").ids[0] == 1) == begins
    file = byte_level(tmp_path / "x.gguf", pre, add_bos_token=not begins)
    assert (opened(file).encode("a").ids[0] == 1) != begins


def test_the_space_before_the_first_word_can_be_left_out(tmp_path):
    tokenizer = opened(sentencepiece(tmp_path / "x.gguf", add_space_prefix=False))
    ids = tokenizer.encode("the", add_special_tokens=False)
    assert not ids.tokens[0].startswith("▁")
    assert tokenizer.decode(ids.ids) == "the"
    assert tokenizer.decode(tokenizer.encode(" the", add_special_tokens=False).ids) == " the"


def test_merges_that_the_file_has_are_taken_in_place_of_scores(tmp_path):
    file = sentencepiece(tmp_path / "x.gguf", merges=["h e"], scores=None)
    assert opened(file).encode("the", add_special_tokens=False).tokens == ["▁", "t", "he"]


@pytest.mark.parametrize("make", [sentencepiece, lambda file: byte_level(file, "llama-bpe")])
def test_transformers_loads_the_files_that_are_written(tmp_path, make):
    c = open_checkpoint(str(make(tmp_path / "x.gguf")))
    folder = tmp_path / "hf"
    folder.mkdir()
    for name, content in c.companions.items():
        (folder / name).write_bytes(content)
    loaded, ours = transformers.AutoTokenizer.from_pretrained(folder), load_tokenizer(c)
    for text in TEXTS:
        assert loaded.encode(text) == ours.encode(text).ids
    assert (loaded.bos_token_id, loaded.eos_token_id) == (1, 2)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "bert"}, "found 'bert'"),
        ({"model": None}, "found None"),
        ({"model": "gpt2", "pre": "chatglm-bpe"}, "'gpt2'/'chatglm-bpe'"),
        ({"model": "gpt2", "pre": None}, "'gpt2'/None"),
        ({"model": "gpt2", "pre": "qwen2"}, "tokenizer.ggml.merges is missing"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens must list strings"),
        ({"tokens": "x"}, "tokenizer.ggml.tokens must list strings"),
        ({"token_type": None}, "tokenizer.ggml.token_type is missing"),
        ({"token_type": [1, 1]}, "tokenizer.ggml.token_type must have"),
        ({"token_type": ["1"]}, "tokenizer.ggml.token_type must list numbers"),
        ({"scores": None}, "tokenizer.ggml.scores is missing"),
        ({"scores": [0.0]}, "tokenizer.ggml.scores must have"),
        ({"scores": [-1000.0] * len(pieces()[0])}, "tokenizer.ggml.scores must order"),
        ({"scores": [float("nan")] * len(pieces()[0])}, "tokenizer.ggml.scores must order"),
        ({"merges": ["th is"]}, "tokenizer.ggml.merges"),
        ({"merges": ["this"]}, "pairs of tokens, found 'this'"),
        ({"merges": ["t h e"]}, "pairs of tokens, found 't h e'"),
        ({"eos_token_id": 9999}, "tokenizer.ggml.eos_token_id must be below"),
        ({"bos_token_id": "1"}, "tokenizer.ggml.bos_token_id must be below"),
        ({"add_bos_token": 1}, "tokenizer.ggml.add_bos_token must be true or false"),
        ({"unknown_token_id": None, "tokens": ["a", "b"], "token_type": [1, 1], "scores": [0.0, 1.0]}, "256 byte"),
    ],
)
def test_a_vocabulary_that_cannot_be_used_is_named(tmp_path, changes, said):
    assert said in refusal(sentencepiece(tmp_path / "x.gguf", **changes))


def test_a_chat_template_is_kept_and_must_be_text(tmp_path):
    tokens, scores, kinds = pieces()
    fields = metadata(model="llama", tokens=tokens, scores=np.array(scores), token_type=np.array(kinds))
    config = files(tmp_path, fields | {"tokenizer.chat_template": "{{ x }}"}, 512)["tokenizer_config.json"]
    assert json.loads(config)["chat_template"] == "{{ x }}"
    with pytest.raises(UserError, match="chat_template"):
        files(tmp_path, fields | {"tokenizer.chat_template": 3}, 512)


def test_without_bytes_unknown_letters_in_a_row_are_one_unknown_token(tmp_path):
    fields = metadata(model="llama", tokens=["<unk>", "▁", "a"], scores=np.zeros(3), token_type=np.array([2, 1, 1]))
    tokenizer = tokenizers.Tokenizer.from_buffer(files(tmp_path, fields, 512)["tokenizer.json"])
    assert tokenizer.encode("a東京a").ids == [1, 2, 0, 2]


def test_a_piece_of_absurd_length_is_refused(tmp_path):
    fields = metadata(model="llama", tokens=["<unk>", "a" * 1000], scores=np.zeros(2), token_type=np.array([2, 1]))
    with pytest.raises(UserError, match="found 1000"):
        files(tmp_path, fields, 512)


def test_the_header_is_what_the_package_reads(tmp_path):
    file = sentencepiece(tmp_path / "x.gguf")
    fields, entries = read_header(file)
    reader = gguf.GGUFReader(file)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF."):
            value, expected = fields.pop(name), field.contents()
            assert value == pytest.approx(expected) if isinstance(value, float) else list_of(value) == expected
    assert not fields
    for tensor in reader.tensors:
        entry = entries.pop(tensor.name)
        assert (entry.start, entry.stop) == (tensor.data_offset, tensor.data_offset + tensor.n_bytes)
        assert entry.shape == tuple(reversed([int(n) for n in tensor.shape]))
        assert entry.code == tensor.tensor_type.name
    assert not entries


def list_of(value):
    return list(value) if hasattr(value, "itemsize") else value


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        "The quick brown fox.",
        "  two  spaces\n\n\ttabs ",
        "naïve café, 東京, 🙂",
        "def f(x):\n    return x ** 2\n",
        "'s 1,234.5",
    ],
)
def test_smollm2s_tokenizer_gives_every_text_back(smollm2, text):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


@pytest.mark.slow
def test_smollm2s_tokenizer_cuts_text_as_its_authors_does(smollm2):
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("<|endoftext|><|im_start|><|im_end|>").ids == [0, 1, 2]
    assert tokenizer.decode([2]) == ""
    assert tokenizer.decode([2], skip_special_tokens=False) == "<|im_end|>"
    assert len(tokenizer.encode(" the").ids) == 1
    assert tokenizer.encode("the").ids != tokenizer.encode(" the").ids  # no space is put before the first word
    assert tokenizer.encode("in 2024").tokens == ["in", "Ġ", "2", "0", "2", "4"]
    assert tokenizer.encode(" Hello world").tokens == ["ĠHello", "Ġworld"]
