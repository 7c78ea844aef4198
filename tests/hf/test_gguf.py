"""GGUF files in: the original tensors bit by bit, the tokenizer, and files that are none of ours."""

import pathlib
import shutil

import gguf
import numpy as np
import pytest

from solar_jax.errors import UserError
from solar_jax.hf import families
from solar_jax.hf.reader import eos_id, load_tokenizer
from solar_jax.hf.tensors import TENSORS
from solar_jax.source import open_checkpoint
from tests.conftest import TINY, byte_tokenizer, hf_model

LAYERS = 2


def llama_cpp_order(x: np.ndarray, heads: int) -> np.ndarray:
    """q_proj or k_proj as llama.cpp's converter stores it: the halves of each rotary pair side by side."""
    return x.reshape(heads, 2, -1, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)


def hf_tensors(tied: bool = False) -> dict[str, np.ndarray]:
    model = hf_model(num_hidden_layers=LAYERS, tie_word_embeddings=tied)
    return {k: x.numpy() for k, x in model.state_dict().items() if not (tied and k == "lm_head.weight")}


def write_gguf(file: pathlib.Path, tensors: dict[str, np.ndarray], permute: bool = True, **changes) -> pathlib.Path:
    """A file as llama.cpp's converter makes it of `tensors`.

    `changes` are metadata keys, "__" for ".", that take another value, or are left out if None.
    """
    vocab = sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])
    tokens = [token for token, _ in vocab] + ["th", "<own>"]
    metadata = {
        "general.architecture": "llama",
        "llama.vocab_size": TINY["vocab_size"],
        "llama.context_length": TINY["max_position_embeddings"],
        "llama.embedding_length": TINY["hidden_size"],
        "llama.feed_forward_length": TINY["intermediate_size"],
        "llama.block_count": LAYERS,
        "llama.attention.head_count": TINY["num_attention_heads"],
        "llama.attention.head_count_kv": TINY["num_key_value_heads"],
        "llama.attention.key_length": TINY["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": TINY["rms_norm_eps"],
        "llama.rope.freq_base": 10000.0,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3, *[1] * 257, 4],
        "tokenizer.ggml.merges": ["t h"],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    } | {k.replace("__", "."): v for k, v in changes.items()}
    # The writer adds the architecture by itself.
    writer = gguf.GGUFWriter(file, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    for name, x in tensors.items():
        layer = name.split(".")[2] if name.startswith("model.layers.") else ""
        gguf_name = {row.hf.format(layer): row.gguf.format(layer) for row in TENSORS.values()}.get(name, name)
        if permute and "q_proj" in name:
            x = llama_cpp_order(x, TINY["num_attention_heads"])
        if permute and "k_proj" in name:
            x = llama_cpp_order(x, TINY["num_key_value_heads"])
        writer.add_tensor(gguf_name, np.ascontiguousarray(x))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def refusal(file: pathlib.Path) -> str:
    """The one line that opening `file` ends with."""
    with pytest.raises(UserError) as e:
        open_checkpoint(str(file))
    text = str(e.value)
    assert text.startswith(f"{file}: ")
    assert len(text.splitlines()) == 1
    return text.removeprefix(f"{file}: ")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", hf_tensors())


def test_the_file_names_of_the_table_are_llama_cpps():
    # The writer above takes them from the table too, so only the package can tell that they are right.
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, LAYERS)
    for row in TENSORS.values():
        assert names.get_name(row.hf.format(1), try_suffixes=(".weight",)) == row.gguf.format(1)


@pytest.mark.parametrize("tied", [False, True])
def test_the_tensors_are_the_original_bit_by_bit(tmp_path, tied):
    expected = hf_tensors(tied)
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", expected)))
    assert c.cfg.tie_word_embeddings == tied
    assert c.shape_of == {name: x.shape for name, x in expected.items()}
    for name, x in expected.items():
        found = c.read(name)
        assert (found.dtype, found.shape, found.tobytes()) == (x.dtype, x.shape, x.tobytes())


def test_a_file_in_hugging_faces_own_order_would_come_out_wrong(tmp_path):
    expected = hf_tensors()
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", expected, permute=False)))
    differ = {name for name, x in expected.items() if not np.array_equal(c.read(name), x)}
    assert differ == {name for name in expected if "q_proj" in name or "k_proj" in name}


def test_as_many_kv_heads_as_heads_need_not_be_said(tmp_path):
    expected = {k: x.numpy() for k, x in hf_model(num_hidden_layers=LAYERS, num_key_value_heads=4).state_dict().items()}
    tensors = {k: llama_cpp_order(x, 4) if "q_proj" in k or "k_proj" in k else x for k, x in expected.items()}
    keys = {"llama__attention__head_count_kv": None}
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors, permute=False, **keys)))
    for name, x in expected.items():
        np.testing.assert_array_equal(c.read(name), x)


def test_the_config_is_the_originals(whole):
    c = open_checkpoint(str(whole))
    assert c.cfg == families.model_config(hf_model(num_hidden_layers=LAYERS).config.to_dict(), "")
    assert c.cfg.rms_norm_eps == 1e-5  # the file's float32 reads 9.999999747e-06
    assert c.dtype == "float32"
    assert eos_id(c) == 2


def test_the_tokenizer_merges_and_keeps_digits_and_special_tokens_apart(whole):
    tokenizer = load_tokenizer(open_checkpoint(str(whole)))
    vocab = byte_tokenizer().get_vocab()
    assert tokenizer.encode("the 10").ids == [259, *(vocab[t] for t in ("e", "Ġ", "1", "0"))]
    assert tokenizer.encode("t</s>h<own>").ids == [vocab["t"], 2, vocab["h"], 260]
    assert tokenizer.decode([vocab["t"], 2, 260]) == "t<own>"  # a token of control is left out, the other is text


def test_numbers_are_cut_into_digits_only_where_the_file_says_so(tmp_path):
    tokens = [t for t, _ in sorted(byte_tokenizer().get_vocab().items(), key=lambda item: item[1])] + ["10", "x"]
    keys = {"tokenizer__ggml__tokens": tokens, "tokenizer__ggml__merges": ["1 0"]}
    for pre, length in (("smollm", 2), ("gpt-2", 1)):
        file = write_gguf(tmp_path / f"{pre}.gguf", hf_tensors(), tokenizer__ggml__pre=pre, **keys)
        assert len(load_tokenizer(open_checkpoint(str(file))).encode("10").ids) == length


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("general__architecture", "qwen2", "'qwen2'"),
        ("llama__rope__scaling__type", "yarn", "'yarn'"),
        ("tokenizer__ggml__model", "llama", "llama/smollm"),
        ("tokenizer__ggml__pre", "llama-bpe", "gpt2/llama-bpe"),
        ("tokenizer__ggml__pre", None, "gpt2/None"),
        ("llama__vocab_size", None, "llama.vocab_size"),
        ("llama__attention__head_count", None, "llama.attention.head_count"),
        ("llama__context_length", None, "llama.context_length"),
        ("tokenizer__ggml__tokens", None, "tokenizer.ggml.tokens"),
        ("tokenizer__ggml__token_type", None, "tokenizer.ggml.token_type"),
        ("tokenizer__ggml__merges", None, "tokenizer.ggml.merges"),
        ("tokenizer__ggml__token_type", [1, 1], "tokenizer.ggml.token_type"),
        ("tokenizer__ggml__merges", ["th is"], "tokenizer.ggml.merges"),
        ("tokenizer__ggml__eos_token_id", 999, "tokenizer.ggml.eos_token_id"),
    ],
)
def test_metadata_that_cannot_be_used_is_named(tmp_path, key, value, said):
    assert said in refusal(write_gguf(tmp_path / "x.gguf", hf_tensors(), **{key: value}))


def test_a_tensor_that_the_model_has_no_place_for_is_named(tmp_path):
    tensors = hf_tensors() | {"blk.0.attn_q.bias": np.ones(96, np.float32)}
    assert "blk.0.attn_q.bias" in refusal(write_gguf(tmp_path / "x.gguf", tensors))


def test_a_layer_more_than_the_file_says_is_named(tmp_path):
    assert "model.layers.1." in refusal(write_gguf(tmp_path / "x.gguf", hf_tensors(), llama__block_count=1))


def test_a_missing_tensor_is_named(tmp_path):
    tensors = hf_tensors()
    del tensors["model.layers.1.mlp.up_proj.weight"]
    assert "model.layers.1.mlp.up_proj.weight" in refusal(write_gguf(tmp_path / "x.gguf", tensors))


def test_a_tensor_of_another_shape_is_named(tmp_path):
    tensors = hf_tensors()
    tensors["model.norm.weight"] = np.ones(63, np.float32)
    text = refusal(write_gguf(tmp_path / "x.gguf", tensors))
    assert "model.norm.weight" in text
    assert "(64,)" in text
    assert "(63,)" in text


def test_a_file_cut_anywhere_is_refused(tmp_path, whole):
    content = whole.read_bytes()
    metadata = min(tensor.data_offset for tensor in gguf.GGUFReader(whole).tensors)
    # All over the metadata, every way to cut its first fields, and within the weights.
    cuts = [*range(40), *range(40, metadata, 331), metadata - 1, metadata, len(content) // 2, len(content) - 1]
    for cut in cuts:
        file = tmp_path / f"{cut}.gguf"
        file.write_bytes(content[:cut])
        refusal(file)
        file.unlink()


@pytest.mark.parametrize("content", [b"", b"text, not weights\n" * 20, b"GGUF", b"GGUF" + bytes(60), b"\xff" * 64])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    assert "GGUF" in refusal(tmp_path / "x.gguf")


def test_a_safetensors_file_in_place_of_its_folder_is_refused(tmp_path, tiny):
    shutil.copy(tiny / "model.safetensors", tmp_path / "model.safetensors")
    assert "GGUF" in refusal(tmp_path / "model.safetensors")


@pytest.mark.slow
def test_smollm2s_config_is_the_one_that_its_authors_published(smollm2):
    hf = smollm2.hf_config
    expected = {
        "model_type": "llama",
        "num_hidden_layers": 30,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    assert {key: hf.get(key) for key in expected} == expected
    assert smollm2.cfg.head_dim == 64
    assert eos_id(smollm2) == 2


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
