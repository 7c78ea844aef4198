"""Damaged GGUF files: each is refused in a sentence, soon, whatever counts and lengths it declares."""

import pathlib
import random
import shutil
import struct
import time
import tracemalloc

import gguf
import pytest

from solar_jax.checkpoints import gguf as ours
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from solar_jax.formats.gguf_header import read_header
from tests.checkpoints.test_gguf import hf_tensors, refusal, write_gguf
from tests.formats.test_gguf_tokenizer import sentencepiece

HUGE = [1 << 16, 1 << 20, 1 << 32, (1 << 63) - 1, (1 << 64) - 1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "whole.gguf", hf_tensors())


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def header(fields: bytes = b"", keys: int = 0, tensors: int = 0, infos: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + fields + infos


def info(name: str = "x", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def padded(head: bytes, data: bytes = bytes(64)) -> bytes:
    return head + bytes(-len(head) % 32) + data


def test_a_header_made_by_hand_is_read(tmp_path):
    file = tmp_path / "x.gguf"  # or the refusals below would be of something else
    fields = text("a") + struct.pack("<Iq", 11, -5) + text("b") + struct.pack("<I", 8) + text("é")
    fields += text("c") + struct.pack("<IIQ3h", 9, 3, 3, 1, -2, 3) + text("d") + struct.pack("<IIQ", 9, 8, 2)
    fields += text("p") + text("") + text("e") + struct.pack("<If", 6, 0.1) + text("f") + struct.pack("<I?", 7, True)
    file.write_bytes(padded(header(fields, 6, 2, info("x") + info("y", (2, 3), 1, 32)), bytes(44)))
    found, entries = read_header(file)
    assert found == found | {"a": -5, "b": "é", "d": ["p", ""], "e": 0.1, "f": True}
    assert list(found["c"]) == [1, -2, 3]
    assert [(e.code, e.shape, e.stop - e.start) for e in entries.values()] == [("F32", (4,), 16), ("F16", (3, 2), 12)]
    assert entries["y"].start - entries["x"].start == 32


@pytest.mark.parametrize(
    ("content", "said"),
    [
        *[(header(keys=n), "metadata keys are declared" if n > 1 << 16 else "declared at") for n in HUGE],
        *[(header(tensors=n), "tensors are declared" if n > 1 << 16 else "declared at") for n in HUGE],
        *[(header(struct.pack("<Q", n) + b"a" * 100, 1), "declared") for n in HUGE],
        *[(header(text("a") + struct.pack("<IQ", 8, n) + b"a" * 100, 1), "declared") for n in HUGE],
        *[(header(text("a") + struct.pack("<IIQ", 9, 4, n) + b"a" * 100, 1), "declared") for n in HUGE],
        *[(header(text("a") + struct.pack("<IIQ", 9, 8, n) + b"a" * 100, 1), "declared") for n in HUGE],
        (header(text("a") + struct.pack("<I", 13), 1), "type 13"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1) + bytes(99), 1), "elements of type 9"),
        (header(text("a") + struct.pack("<IIQ", 9, 99, 1) + bytes(99), 1), "elements of type 99"),
        (header((text("a") + struct.pack("<IB", 0, 1)) * 2, 2), "a appears twice"),
        (header(text(b"\xff") + struct.pack("<IB", 0, 1), 1), "UTF-8"),
        (header(text("a\n") + struct.pack("<IB", 0, 1), 1), "not printable"),
        (header(text("") + struct.pack("<IB", 0, 1), 1), "not printable"),
        (header(text("a" * 300) + struct.pack("<IB", 0, 1), 1), "too long"),
        (header(version=1), "version must be 2 or 3, found 1"),
        (header(version=3 << 24), "big-endian"),
        (b"GGML" + bytes(100), "begins with b'GGML'"),
        (padded(header(tensors=2, infos=info() * 2)), "x appears twice"),
        (padded(header(tensors=2, infos=info() + info("y"))), "share bytes"),
        (padded(header(tensors=1, infos=info(shape=()))), "x has 0 axes"),
        (padded(header(tensors=1, infos=info(shape=(1,) * 5))), "x has 5 axes"),
        (padded(header(tensors=1, infos=text("x") + struct.pack("<I", 1 << 31))), "axes"),
        (padded(header(tensors=1, infos=info(kind=4))), "unknown quantisation type 4"),  # one that llama.cpp took out
        (padded(header(tensors=1, infos=info(kind=1 << 31))), "unknown quantisation type"),
        (padded(header(tensors=1, infos=info(kind=2))), "divisible by 32"),
        (padded(header(tensors=1, infos=info(shape=(17,)))), "should end at byte"),
        (padded(header(tensors=1, infos=info(offset=64))), "should end at byte"),
        *[(padded(header(tensors=1, infos=info(offset=n))), "should end at byte") for n in HUGE],
        *[(padded(header(tensors=1, infos=info(shape=(n, n, n, n)))), "should end at byte") for n in HUGE],
    ],
)
def test_a_header_that_lies_is_refused_at_once(tmp_path, content, said):
    (tmp_path / "x.gguf").write_bytes(content)
    start = time.monotonic()
    assert said in refusal(tmp_path / "x.gguf")
    assert time.monotonic() - start < 2


@pytest.mark.parametrize("alignment", [0, 3, 1 << 31, 48])
def test_an_alignment_that_cannot_be_is_refused(tmp_path, alignment):
    fields = text("general.alignment") + struct.pack("<II", 4, alignment)
    (tmp_path / "x.gguf").write_bytes(padded(header(fields, 1, 1, info())))
    assert refusal(tmp_path / "x.gguf")


def test_metadata_of_any_size_are_not_read(tmp_path):
    file = tmp_path / "x.gguf"
    many = 1 << 27
    strings = struct.pack("<IIQ", 9, 8, 1 << 19) + bytes(8 << 19)  # empty ones
    for value, said in (
        (struct.pack("<IIQ", 9, 0, many), f"{many} bytes are declared"),
        (struct.pack("<IIQ", 9, 8, many), f"{many} strings are declared"),
        (struct.pack("<IQ", 8, many), f"{many} bytes are declared"),
        (strings + text("b") + struct.pack("<IQ", 8, many), f"{many} bytes are declared"),
    ):
        with file.open("wb") as f:
            f.write(header(text("a") + value, 2))
            f.truncate(1 << 31)
        tracemalloc.start()
        try:
            assert said in refusal(file)
            assert tracemalloc.get_traced_memory()[1] < 200 << 20
        finally:
            tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path, whole):
    content = whole.read_bytes()
    metadata = min(entry.start for entry in read_header(whole)[1].values())
    # All over the metadata, every way to cut its first fields, and within the weights.
    cuts = [*range(40), *range(40, metadata, 31), metadata - 1, metadata, len(content) // 2, len(content) - 1]
    for cut in cuts:
        file = tmp_path / "x.gguf"
        file.write_bytes(content[:cut])
        refusal(file)


@pytest.mark.parametrize("make", ["byte-level", "sentencepiece"])
def test_a_damaged_file_is_refused_or_read(tmp_path, whole, make):
    path = whole if make == "byte-level" else sentencepiece(tmp_path / "whole.gguf")
    content = path.read_bytes()
    metadata = min(entry.start for entry in read_header(path)[1].values())
    file = tmp_path / "x.gguf"
    refused = 0
    for seed in range(400):
        rng = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 5, 30])):
            at = rng.randrange(rng.choice([64, 1500, metadata]))
            kind = rng.randrange(5)
            if kind == 0:
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                damaged[at] = rng.randrange(256)
            elif kind == 2:
                damaged[at : at + rng.randrange(40)] = b""
            elif kind == 3:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 16))
            else:
                damaged[at : at + 8] = struct.pack("<Q", rng.choice([0, 1, 255, *HUGE]))
        file.write_bytes(damaged)
        start = time.monotonic()
        try:
            c = open_checkpoint(str(file))
        except UserError:
            refused += 1
            refusal(file)
        else:
            for name, shape in c.shape_of.items():
                assert c.read(name).shape == shape
        assert time.monotonic() - start < 5
    assert 100 < refused < 400


def test_weights_of_any_bits_are_read(tmp_path):
    kinds = gguf.GGMLQuantizationType
    for kind in (kinds.F16, kinds.BF16, kinds.Q8_0, kinds.Q4_0, kinds.Q4_1):
        path = write_gguf(tmp_path / "x.gguf", hf_tensors(), kind=kind)
        content = bytearray(path.read_bytes())
        first = min(entry.start for entry in read_header(path)[1].values())
        content[first:] = random.Random(0).randbytes(len(content) - first)
        path.write_bytes(content)
        file = ours.open_gguf(path)
        for name in file.tensors:
            kinds_of = {"F16": "float16", "BF16": "bfloat16"}
            assert file.read(name).dtype.name == kinds_of.get(file.tensors[name].code, "float32")


@pytest.mark.parametrize("content", [b"", b"text, not weights\n" * 20, b"GGUF", b"GGUF" + bytes(60), b"\xff" * 64])
def test_a_file_of_another_format_is_refused(tmp_path, content):
    (tmp_path / "x.gguf").write_bytes(content)
    assert "GGUF" in refusal(tmp_path / "x.gguf")


def test_a_safetensors_file_in_place_of_its_folder_is_refused(tmp_path, tiny):
    shutil.copy(tiny / "model.safetensors", tmp_path / "model.safetensors")
    assert "GGUF" in refusal(tmp_path / "model.safetensors")
