"""Our safetensors against the `safetensors` package, and files that lie."""

import json
import pathlib

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from solar_jax.errors import UserError
from solar_jax.hf.safetensors import DTYPES, read, read_header, write

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPES = {"b": (3, 5), "a": (7,), "model.c": (2, 3, 4), "empty": (0, 4)}  # 7 and 15: the next one lies unaligned


def random_bits(code: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits: NaNs with payloads and subnormal numbers too."""
    size = int(np.prod(shape)) * DTYPES[code].itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), DTYPES[code]).reshape(shape)


def to_torch(x: np.ndarray, code: str) -> torch.Tensor:
    if not x.size:  # frombuffer refuses it
        return torch.empty(x.shape, dtype=TORCH[code])
    return torch.frombuffer(bytearray(x.tobytes()), dtype=TORCH[code]).reshape(x.shape)


def torch_bytes(x: torch.Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("code", DTYPES)
def test_a_file_of_the_package_is_read_to_the_bit(tmp_path, code):
    arrays = {name: random_bits(code, shape, i) for i, (name, shape) in enumerate((SHAPES | {"scalar": ()}).items())}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({k: to_torch(x, code) for k, x in arrays.items()}, file, {"format": "pt", "k": "v"})
    entries = read_header(file)
    assert set(entries) == set(arrays)
    for name, entry in entries.items():
        found = read(name, entry)
        assert (entry.code, entry.shape, found.dtype) == (code, arrays[name].shape, DTYPES[code])
        assert (found.shape, found.tobytes()) == (arrays[name].shape, arrays[name].tobytes())


def test_dtypes_mixed_in_one_file_are_told_apart(tmp_path):
    arrays = {code: random_bits(code, (3, 3), 0) for code in DTYPES}
    safetensors.torch.save_file({k: to_torch(x, k) for k, x in arrays.items()}, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors")
    for code, x in arrays.items():
        assert entries[code].code == code
        assert read(code, entries[code]).tobytes() == x.tobytes()


@pytest.mark.parametrize("code", DTYPES)
def test_the_package_reads_our_file_to_the_bit(tmp_path, code):
    arrays = {name: random_bits(code, shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    file = tmp_path / "x.safetensors"
    write(file, list(SHAPES.items()), DTYPES[code], arrays.__getitem__)
    assert int.from_bytes(file.read_bytes()[:8], "little") % 8 == 0  # the format asks for aligned data
    with safetensors.safe_open(file, "pt") as f:
        assert set(f.keys()) == set(SHAPES)
        assert f.metadata() == {"format": "pt"}  # transformers refuses a file without it
        for name, x in arrays.items():
            found = f.get_tensor(name)
            assert (found.dtype, tuple(found.shape)) == (TORCH[code], x.shape)
            assert torch_bytes(found) == x.tobytes()


def test_a_transposed_array_is_written_in_its_logical_order(tmp_path):
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(tmp_path / "x.safetensors", [("x", (3, 2))], DTYPES["F32"], lambda _: x)
    assert safetensors.torch.load_file(tmp_path / "x.safetensors")["x"].tolist() == x.tolist()


def refusal(file: pathlib.Path) -> str:
    """The one line that reading the header of `file` ends with."""
    with pytest.raises(UserError) as e:
        read_header(file)
    text = str(e.value)
    assert text.startswith(f"{file}: ")
    assert len(text.splitlines()) == 1
    return text


def two_tensors(file: pathlib.Path) -> int:
    """Writes a sound file and returns where its data begin."""
    write(file, [("a", (4, 4)), ("b", (4,))], DTYPES["F32"], lambda name: np.ones((4, 4) if name == "a" else 4))
    assert set(read_header(file)) == {"a", "b"}
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize("cut", ["empty", "in the length", "after the length", "in the header", "before the data",
                                 "between tensors", "last byte"])  # fmt: skip
def test_a_file_cut_short_is_refused(tmp_path, cut):
    file = tmp_path / "x.safetensors"
    data = two_tensors(file)
    whole = file.read_bytes()
    keep = {"empty": 0, "in the length": 5, "after the length": 8, "in the header": data - 9, "before the data": data,
            "between tensors": data + 64, "last byte": len(whole) - 1}[cut]  # fmt: skip
    file.write_bytes(whole[:keep])
    assert "cut short" in refusal(file)


def raw(file: pathlib.Path, header: bytes, data: bytes = b"", length: int | None = None) -> pathlib.Path:
    """A file of that header, which may claim another length than it has."""
    file.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + data)
    return file


@pytest.mark.parametrize("length", [40, 2**62, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused(tmp_path, length):
    assert str(length) in refusal(raw(tmp_path / "x.safetensors", b"{}", b" " * 30, length))


@pytest.mark.parametrize(
    "header",
    [b"{", b"\xff\xfe", b"", b"[" * 100_000, b"[]", b"3", b"null"],
    ids=["cut JSON", "not UTF-8", "nothing", "endless nesting", "a list", "a number", "null"],
)
def test_a_header_that_is_no_json_object_is_refused(tmp_path, header):
    assert "JSON" in refusal(raw(tmp_path / "x.safetensors", header, b" " * 16))


GOOD = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (GOOD | {"data_offsets": [8, 24]}, "cut short"),
        (GOOD | {"data_offsets": [2**70, 2**70 + 16]}, "cut short"),
        (GOOD | {"data_offsets": [16, 0]}, "w"),
        (GOOD | {"data_offsets": [0, 12]}, "does not take 12 bytes"),
        (GOOD | {"shape": [2, 3]}, "(2, 3) does not take 16 bytes"),
        (GOOD | {"dtype": "F16"}, "F16 (2, 2) does not take 16 bytes"),
        (GOOD | {"shape": [-2, -2]}, "malformed"),
        (GOOD | {"data_offsets": [-16, 0]}, "malformed"),
        (GOOD | {"data_offsets": [0, 8, 16]}, "malformed"),
        (GOOD | {"data_offsets": [0.0, 16.0]}, "malformed"),
        (GOOD | {"data_offsets": None}, "malformed"),
        (GOOD | {"shape": "22"}, "malformed"),
        (GOOD | {"shape": [2, True]}, "malformed"),
        (GOOD | {"shape": 4}, "malformed"),
        (GOOD | {"dtype": ["F32"]}, "malformed"),
        ({"dtype": "F32", "shape": [2, 2]}, "malformed"),
        ([], "malformed"),
        (None, "malformed"),
    ],
    ids=str,
)
def test_a_tensor_whose_entry_cannot_be_true_is_refused_by_name(tmp_path, entry, said):
    file = tmp_path / "x.safetensors"
    assert read_header(raw(file, json.dumps({"w": GOOD}).encode(), bytes(16)))["w"].shape == (2, 2)
    text = refusal(raw(file, json.dumps({"w": entry}).encode(), bytes(16))).removeprefix(f"{file}: ")
    assert "w" in text.split()
    assert said in text


def test_a_line_break_in_a_name_does_not_break_the_message(tmp_path):
    refusal(raw(tmp_path / "x.safetensors", json.dumps({"w\nx": []}).encode()))


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "x.safetensors")


def test_an_integer_tensor_is_refused_when_read(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(3, dtype=torch.int64), "v": torch.ones(2)}, file)
    entries = read_header(file)
    assert read("v", entries["v"]).tolist() == [1, 1]
    with pytest.raises(UserError) as e:
        read("w", entries["w"])
    assert str(e.value) == f"{file}: w must be one of F32, BF16, F16, found I64."
