"""Our safetensors against the `safetensors` package, and files that lie."""

import errno
import json
import os
import pathlib
import time

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from solar_jax.errors import UserError
from solar_jax.formats import safetensors as st
from solar_jax.formats.safetensors import DTYPES, Piece, read_header, read_tensor, write_safetensors

TORCH = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
SHAPES = {"b": (3, 5), "a": (7,), "model.c": (2, 3, 4), "empty": (0, 4)}  # 7 and 15: the next one lies unaligned


def random_bits(code: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Any bits: NaNs with payloads and subnormal numbers too."""
    size = int(np.prod(shape)) * DTYPES[code].itemsize
    return np.frombuffer(np.random.default_rng(seed).bytes(size), DTYPES[code]).reshape(shape)


def pieces(arrays: dict[str, np.ndarray], rows: int = 1 << 30) -> list[Piece]:
    """The arrays in blocks of so many rows."""

    def blocks(x: np.ndarray):
        return lambda: (x[i : i + rows] for i in range(0, len(x), rows))

    return [Piece(name, x.shape, x.dtype, blocks(x)) for name, x in arrays.items()]


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
        found = read_tensor(name, entry)
        assert (entry.code, entry.shape, found.dtype) == (code, arrays[name].shape, DTYPES[code])
        assert (found.shape, found.tobytes()) == (arrays[name].shape, arrays[name].tobytes())


def test_dtypes_mixed_in_one_file_are_told_apart(tmp_path):
    arrays = {code: random_bits(code, (3, 3), 0) for code in DTYPES}
    safetensors.torch.save_file({k: to_torch(x, k) for k, x in arrays.items()}, tmp_path / "x.safetensors")
    entries = read_header(tmp_path / "x.safetensors")
    for code, x in arrays.items():
        assert entries[code].code == code
        assert read_tensor(code, entries[code]).tobytes() == x.tobytes()


@pytest.mark.parametrize("rows", [1, 2, 100])
@pytest.mark.parametrize("code", DTYPES)
def test_the_package_reads_our_file_to_the_bit(tmp_path, code, rows):
    arrays = {name: random_bits(code, shape, i) for i, (name, shape) in enumerate(SHAPES.items())}
    file = tmp_path / "x.safetensors"
    told: list[int] = []
    write_safetensors(file, pieces(arrays, rows), told.append)
    assert sum(told) == sum(x.nbytes for x in arrays.values())
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
    write_safetensors(tmp_path / "x.safetensors", pieces({"x": x}))
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
    write_safetensors(file, pieces({"a": np.ones((4, 4), np.float32), "b": np.ones(4, np.float32)}))
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
        (GOOD | {"data_offsets": [0, 12]}, "has 12 bytes, which does not match"),
        (GOOD | {"shape": [2, 3]}, "16 bytes, which does not match F32 (2, 3)"),
        (GOOD | {"dtype": "F16"}, "16 bytes, which does not match F16 (2, 2)"),
        (GOOD | {"shape": [-2, -2]}, "malformed"),
        (GOOD | {"data_offsets": [-16, 0]}, "malformed"),
        (GOOD | {"data_offsets": [0, 8, 16]}, "malformed"),
        (GOOD | {"data_offsets": [0.0, 16.0]}, "malformed"),
        (GOOD | {"data_offsets": None}, "malformed"),
        (GOOD | {"shape": "22"}, "malformed"),
        (GOOD | {"shape": [2, True]}, "malformed"),
        (GOOD | {"shape": 4}, "malformed"),
        (GOOD | {"shape": [2**64, 2**64, 0]}, "malformed"),
        (GOOD | {"shape": [1] * 100_000}, "malformed"),
        (GOOD | {"shape": [2, float("nan")]}, "malformed"),
        (GOOD | {"data_offsets": [0, float("inf")]}, "malformed"),
        (GOOD | {"dtype": ["F32"]}, "malformed"),
        ({"dtype": "F32", "shape": [2, 2]}, "malformed"),
        ([], "malformed"),
        (None, "malformed"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_a_tensor_whose_entry_cannot_be_true_is_refused_by_name(tmp_path, entry, said):
    file = tmp_path / "x.safetensors"
    assert read_header(raw(file, json.dumps({"w": GOOD}).encode(), bytes(16)))["w"].shape == (2, 2)
    text = refusal(raw(file, json.dumps({"w": entry}).encode(), bytes(16))).removeprefix(f"{file}: ")
    assert "w" in text.split()
    assert said in text
    assert len(text) < 400


def test_a_line_break_in_a_name_does_not_break_the_message(tmp_path):
    refusal(raw(tmp_path / "x.safetensors", json.dumps({"w\nx": []}).encode()))


@pytest.mark.parametrize("depth", [100, 900, 3000, 20_000])
def test_an_entry_that_is_nested_without_end_is_refused(tmp_path, depth):
    header = b'{"w":' + b"[" * depth + b"]" * depth + b"}"
    assert "malformed" in (text := refusal(raw(tmp_path / "x.safetensors", header))) or "not JSON" in text


@pytest.mark.parametrize(
    "header",
    [
        '{"w": ENTRY, "w": ENTRY}',
        '{"w": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16], "shape": [4]}}',
        '{"__metadata__": {"a": "1", "a": "2"}, "w": ENTRY}',
    ],
)
def test_a_name_that_comes_twice_is_refused(tmp_path, header):
    header = header.replace("ENTRY", json.dumps(GOOD))
    assert "appears twice" in refusal(raw(tmp_path / "x.safetensors", header.encode(), bytes(16)))


def test_many_names_of_which_the_last_comes_twice_are_refused_within_seconds(tmp_path):
    names = ",".join(f'"{i}":0' for i in range(200_000))
    begin = time.monotonic()
    assert "'199999' appears twice" in refusal(raw(tmp_path / "x.safetensors", f'{{{names},"199999":0}}'.encode()))
    assert time.monotonic() - begin < 10


@pytest.mark.parametrize("second", [[0, 16], [8, 16], [15, 31], [1, 5]])
def test_tensors_that_share_bytes_are_refused(tmp_path, second):
    shape = [(second[1] - second[0]) // 4]
    header = {"a": GOOD, "b": {"dtype": "F32", "shape": shape, "data_offsets": second}}
    text = refusal(raw(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(32)))
    assert "share bytes" in text
    assert {"a", "b"} <= set(text.split())


def test_neighbours_and_empty_tensors_share_no_bytes(tmp_path):
    empty = {"dtype": "F32", "shape": [0, 4], "data_offsets": [8, 8]}
    header = {"a": GOOD, "b": GOOD | {"data_offsets": [16, 32]}, "c": empty}
    found = read_header(raw(tmp_path / "x.safetensors", json.dumps(header).encode(), bytes(32)))
    assert set(found) == {"a", "b", "c"}


# ---- Byte ranges that the kernel copies -----------------------------------------------------------------------------


def copy_of(source: pathlib.Path, target: pathlib.Path, progress=lambda n: None) -> None:
    """The file's tensors in the opposite order, as byte ranges."""
    entries = reversed(read_header(source).items())
    write_safetensors(target, [Piece(name, e.shape, DTYPES[e.code], e) for name, e in entries], progress)


def source_of(folder: pathlib.Path) -> pathlib.Path:
    arrays = {f"{code}{i}": random_bits(code, (100, 7 + i), i) for i, code in enumerate((*DTYPES, *DTYPES))}
    write_safetensors(folder / "source", pieces(arrays))
    return folder / "source"


def fails_at(call: int, function):
    """`function`, which from a certain call on says that the file system cannot do it."""
    calls = iter(range(10**9))

    def one(*args):
        if next(calls) >= call:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        return function(*args)

    return one


@pytest.mark.parametrize("how", ["kernel", "sendfile", "sendfile halfway", "a few bytes at a time", "no such call"])
def test_a_range_is_copied_to_the_bit_however_the_kernel_does_it(tmp_path, monkeypatch, how):
    source = source_of(tmp_path)
    few = {"copy_file_range": os.copy_file_range, "sendfile": os.sendfile}
    match how:
        case "sendfile":
            monkeypatch.setattr(os, "copy_file_range", fails_at(0, None))
        case "sendfile halfway":
            monkeypatch.setattr(st, "_COPY_BYTES", 1000)
            monkeypatch.setattr(os, "copy_file_range", fails_at(2, os.copy_file_range))
        case "a few bytes at a time":
            monkeypatch.setattr(os, "copy_file_range", lambda a, b, n, at: few["copy_file_range"](a, b, min(n, 97), at))
        case "no such call":
            monkeypatch.delattr(os, "copy_file_range")
            monkeypatch.setattr(os, "sendfile", lambda out, a, at, n: few["sendfile"](out, a, at, min(n, 97)))
    told: list[int] = []
    copy_of(source, tmp_path / "target", told.append)
    found, expected = (safetensors.torch.load_file(tmp_path / name) for name in ("target", "source"))
    assert {k: torch_bytes(x) for k, x in found.items()} == {k: torch_bytes(x) for k, x in expected.items()}
    assert sum(told) == sum(x.nbytes for x in expected.values())


@pytest.mark.parametrize("call", ["copy_file_range", "sendfile"])
def test_a_source_that_becomes_shorter_while_it_is_copied_is_told(tmp_path, monkeypatch, call):
    source = source_of(tmp_path)
    if call == "sendfile":
        monkeypatch.setattr(os, "copy_file_range", fails_at(0, None))
    monkeypatch.setattr(st, "_COPY_BYTES", 1000)
    told: list[int] = []

    def cut(n: int) -> None:
        told.append(n)
        os.truncate(source, 2000)

    with pytest.raises(UserError) as e:
        copy_of(source, tmp_path / "target", cut)
    assert str(e.value).startswith(f"{source}: ends at byte ")
    assert "was it modified meanwhile?" in str(e.value)
    assert len(told) >= 1


def test_a_source_that_is_gone_when_it_is_copied_is_named(tmp_path):
    source = source_of(tmp_path)
    entries = read_header(source)
    source.unlink()
    for content in (lambda name: entries[name], lambda name: lambda: [read_tensor(name, entries[name])]):
        tensors = [Piece(n, x.shape, DTYPES[x.code], content(n)) for n, x in entries.items()]
        with pytest.raises(UserError) as e:
            write_safetensors(tmp_path / "t", tensors)
        assert str(e.value).startswith(f"{source}: ")
        assert "No such file" in str(e.value)


def test_a_disk_that_refuses_the_target_is_no_fault_of_the_source(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "copy_file_range", full)
    monkeypatch.setattr(os, "sendfile", full)
    with pytest.raises(OSError, match="No space left"):
        copy_of(source_of(tmp_path), tmp_path / "target")


def test_blocks_that_do_not_make_up_their_tensor_are_a_bug_that_is_told(tmp_path):
    (piece,) = pieces({"x": np.ones((4, 4), np.float32)})
    half = Piece("x", (4, 4), piece.dtype, lambda: [np.ones((2, 4), np.float32)])
    with pytest.raises(ValueError, match="x has 32 bytes, the header says 64"):
        write_safetensors(tmp_path / "x", [half])


@pytest.mark.parametrize("rows", [slice(0, 3), slice(2, 5), slice(4, 5), slice(3, 3), slice(0, 100), slice(None)])
@pytest.mark.parametrize("code", DTYPES)
def test_rows_are_read_alone(tmp_path, code, rows):
    x = random_bits(code, (5, 3, 2), 0)
    write_safetensors(tmp_path / "x", pieces({"x": x}))
    entry = read_header(tmp_path / "x")["x"]
    os.truncate(tmp_path / "x", entry.start + min(rows.indices(5)[1], 5) * 6 * x.dtype.itemsize)  # no byte more is read
    found = read_tensor("x", entry, rows)
    assert (found.shape, found.tobytes()) == (x[rows].shape, x[rows].tobytes())


def test_a_missing_file_is_refused(tmp_path):
    assert "No such file" in refusal(tmp_path / "x.safetensors")


def test_an_integer_tensor_is_refused_when_read(tmp_path):
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(3, dtype=torch.int64), "v": torch.ones(2)}, file)
    entries = read_header(file)
    assert read_tensor("v", entries["v"]).tolist() == [1, 1]
    with pytest.raises(UserError) as e:
        read_tensor("w", entries["w"])
    assert str(e.value) == f"{file}: w must be one of F32, BF16, F16, found I64."
