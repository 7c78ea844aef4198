"""Quantised GGUF tensors against the package that made them and blocks worked out by hand; rows read alone."""

import io
import pathlib
import typing

import gguf
import numpy as np
import pytest
from gguf.constants import GGML_QUANT_SIZES
from gguf.constants import GGMLQuantizationType as Type

from solar_jax.checkpoints import gguf as ours
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from tests.checkpoints.test_gguf import hf_tensors, llama_cpp_order, refusal, write_gguf
from tests.conftest import TINY

# Rows of 256 weights, which the K types need.
WIDE = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
KEYS = {
    "llama__embedding_length": 256,
    "llama__feed_forward_length": 256,
    "llama__attention__key_length": 64,
}
MADE = [Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.TQ2_0, Type.MXFP4]
Q_PROJ = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    return hf_tensors(**WIDE)


@pytest.mark.parametrize("kind", MADE)
def test_what_the_package_quantises_comes_back_as_it_dequantises(tmp_path, tensors, kind):
    c = open_checkpoint(str(write_gguf(tmp_path / "x.gguf", tensors, kind=kind, **KEYS)))
    for name, x in tensors.items():
        # Rows are quantised one by one, so that their order does not matter.
        expected = x if x.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
        found = c.read(name)
        plain = {Type.F16: "float16", Type.BF16: "bfloat16"}.get(kind, "float32") if x.ndim > 1 else "float32"
        assert found.dtype.name == plain
        np.testing.assert_array_equal(found.astype(np.float32), expected)


def random_blocks(kind: Type, rows: int, width: int) -> np.ndarray:
    """Random bytes whose float16 scales are small numbers."""
    rng = np.random.default_rng(0)
    block, size = GGML_QUANT_SIZES[kind]
    data = rng.integers(0, 256, (rows, width // block, size), np.uint8)
    scales = {Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q8_0: [0], Type.Q4_K: [0, 2], Type.Q6_K: [208]}[kind]
    for at in scales:
        values = rng.uniform(0.001, 0.1, data.shape[:2]).astype(np.float16)
        data[..., at : at + 2] = values[..., None].view(np.uint8)
    return data.reshape(rows, -1)


def half(block: np.ndarray, at: int) -> float:
    return float(block[at : at + 2].view(np.float16)[0])


def q4_0(b: np.ndarray) -> list[float]:
    low, high = [int(x) & 15 for x in b[2:]], [int(x) >> 4 for x in b[2:]]
    return [half(b, 0) * (q - 8) for q in low + high]


def q4_1(b: np.ndarray) -> list[float]:
    low, high = [int(x) & 15 for x in b[4:]], [int(x) >> 4 for x in b[4:]]
    return [half(b, 0) * q + half(b, 2) for q in low + high]


def q8_0(b: np.ndarray) -> list[float]:
    return [half(b, 0) * int(q) for q in b[2:].view(np.int8)]


def q4_k(b: np.ndarray) -> list[float]:
    """Eight runs of 32 weights, each with a scale and an offset of 6 bits; two runs share their bytes."""
    packed, qs = [int(x) for x in b[4:16]], b[16:]
    out = []
    for run in range(8):
        if run < 4:
            scale, offset = packed[run] & 63, packed[run + 4] & 63
        else:
            scale = (packed[run + 4] & 15) | (packed[run - 4] >> 6) << 4
            offset = (packed[run + 4] >> 4) | (packed[run] >> 6) << 4
        for q in qs[run // 2 * 32 : run // 2 * 32 + 32]:
            nibble = int(q) >> 4 if run % 2 else int(q) & 15
            out.append(half(b, 0) * scale * nibble - half(b, 2) * offset)
    return out


def q6_k(b: np.ndarray) -> list[float]:
    """Two halves of 128: four low bits from one place, two high bits from another, a scale for every 16."""
    out = [0.0] * 256
    for i in range(256):
        part, quarter, j = i // 128, i % 128 // 32, i % 32
        low = int(b[64 * part + 32 * (quarter % 2) + j]) >> (4 * (quarter // 2)) & 15
        high = int(b[128 + 32 * part + j]) >> (2 * quarter) & 3
        scale = int(b[192:208].view(np.int8)[i // 16])
        out[i] = half(b, 208) * scale * ((low | high << 4) - 32)
    return out


@pytest.mark.parametrize(
    ("kind", "by_hand"),
    [(Type.Q4_0, q4_0), (Type.Q4_1, q4_1), (Type.Q8_0, q8_0), (Type.Q4_K, q4_k), (Type.Q6_K, q6_k)],
)
def test_random_blocks_are_what_they_are_by_hand(tmp_path, tensors, kind, by_hand):
    rows = tensors[Q_PROJ].shape[0]
    packed = random_blocks(kind, rows, 256)
    rest = {name: x for name, x in tensors.items() if name != Q_PROJ}
    file = write_gguf(tmp_path / "x.gguf", rest, raw={"blk.1.attn_q.weight": (packed, kind)}, **KEYS)
    size = GGML_QUANT_SIZES[kind][1]
    expected = np.array([[w for b in row.reshape(-1, size) for w in by_hand(b)] for row in packed])
    found = llama_cpp_order(open_checkpoint(str(file)).read(Q_PROJ), WIDE["num_attention_heads"])
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [Type.F64, Type.I8, Type.I32, Type.Q8_1, Type.Q8_K])
def test_a_type_that_the_package_cannot_dequantise_is_named(tmp_path, tensors, kind):
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.zeros((256, 256 // block * size), np.uint8)
    rest = {name: x for name, x in tensors.items() if name != Q_PROJ}
    text = refusal(write_gguf(tmp_path / "x.gguf", rest, raw={"blk.1.attn_q.weight": (packed, kind)}, **KEYS))
    assert "blk.1.attn_q.weight" in text
    assert kind.name in text


@pytest.mark.parametrize(
    "kind",
    [Type.Q2_K, Type.Q3_K, Type.Q5_K, Type.IQ4_NL, Type.IQ4_XS, Type.IQ3_S, Type.IQ2_XXS, Type.IQ1_M, Type.TQ1_0],
)
def test_other_types_are_dequantised_as_the_package_does(tmp_path, tensors, kind):
    block, size = GGML_QUANT_SIZES[kind]
    packed = np.random.default_rng(0).integers(0, 60, (256, 256 // block * size), np.uint8)  # float16s are small
    rest = {name: x for name, x in tensors.items() if name != Q_PROJ}
    file = write_gguf(tmp_path / "x.gguf", rest, raw={"blk.1.attn_q.weight": (packed, kind)}, **KEYS)
    found = llama_cpp_order(open_checkpoint(str(file)).read(Q_PROJ), WIDE["num_attention_heads"])
    assert len(np.unique(found)) > 10
    np.testing.assert_array_equal(found, gguf.quants.dequantize(packed, kind))


@pytest.fixture(scope="module")
def q4_0_file(tmp_path_factory, tensors) -> pathlib.Path:
    return write_gguf(tmp_path_factory.mktemp("q4_0") / "x.gguf", tensors, kind=Type.Q4_0, **KEYS)


def test_rows_are_rows_of_the_whole(q4_0_file):
    file = ours.open_gguf(q4_0_file)
    for name in file.tensors:
        whole = file.read(name)
        n = whole.shape[0]
        for start, stop in [(0, n), (0, 0), (n, n), (1, 2), (63, 65), (n - 1, n), (40, 130)]:
            rows = slice(start, stop)
            found = file.read(name, rows)
            assert found.shape == whole[rows].shape
            np.testing.assert_array_equal(found, whole[rows])


class Watched(io.FileIO):
    """A file that notes which of its bytes are read."""

    ranges: typing.ClassVar[list[tuple[int, int]]] = []

    def read(self, size=-1):
        self.ranges.append((self.tell(), self.tell() + size))
        return super().read(size)


def test_reading_a_tensor_reads_its_bytes_alone(monkeypatch, q4_0_file):
    file = ours.open_gguf(q4_0_file)
    monkeypatch.setattr(pathlib.Path, "open", lambda path, mode: Watched(path, mode))
    for name, entry in file.tensors.items():
        Watched.ranges.clear()
        file.read(name)
        assert Watched.ranges == [(entry.start, entry.stop)]
    width = 256 // 32 * 18
    for name, row, rows in ((Q_PROJ, 64, 64), ("model.embed_tokens.weight", 7, 1)):  # the head that holds the row
        Watched.ranges.clear()
        file.read(name, slice(row, row + 1))
        start = file.tensors[name].start + row * width
        assert Watched.ranges == [(start, start + width * rows)]


def test_a_file_that_becomes_shorter_is_refused(tmp_path, tensors):
    path = write_gguf(tmp_path / "x.gguf", tensors, kind=Type.Q8_0, **KEYS)
    c = open_checkpoint(str(path))
    last = max(ours.open_gguf(path).tensors.items(), key=lambda item: item[1].stop)[0]
    with path.open("r+b") as f:
        f.truncate(path.stat().st_size - 4096)
    with pytest.raises(UserError, match="modified meanwhile"):
        c.read(last)
    path.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        c.read("model.norm.weight")


def test_a_width_that_is_no_multiple_of_a_block_is_refused(tmp_path, tensors):
    # TINY's rows of 96 are three blocks of Q4_0, but none of Q4_K; only a lying file can say so.
    path = write_gguf(tmp_path / "x.gguf", hf_tensors(), kind=Type.Q4_0)
    content = path.read_bytes()
    name = b"blk.1.ffn_down.weight"
    at = content.index(name) + len(name) + 4 + 16
    assert int.from_bytes(content[at : at + 4], "little") == Type.Q4_0
    path.write_bytes(content[:at] + int(Type.Q4_K).to_bytes(4, "little") + content[at + 4 :])
    text = refusal(path)
    assert "blk.1.ffn_down.weight" in text
    assert "divisible by 256" in text
    assert str(TINY["intermediate_size"]) in text
