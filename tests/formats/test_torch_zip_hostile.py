"""Hostile and damaged .bin files: pickles that would run something, lie or never end, of which none is run."""

import collections
import importlib
import os
import pathlib
import pickle
import random
import struct
import time
import tracemalloc

import pytest
import torch

from solar_jax.errors import UserError
from solar_jax.formats.torch_zip import read_header
from tests.formats.test_torch_zip import NAME, STORAGE, TENSOR, archive, refusal, state


@pytest.mark.parametrize(
    "value",
    [
        TENSOR.replace(b"K\x00K\x04\x85", b"K\x01K\x04\x85"),  # begins at 1, ends at 5 of 4
        TENSOR.replace(b"K\x00K\x04\x85", b"K\x00K\x05\x85"),
        TENSOR.replace(b"K\x00K\x04\x85", b"J\xff\xff\xff\xffK\x04\x85"),  # at -1
        TENSOR.replace(b"K\x04\x85", b"J\xff\xff\xff\xff\x85"),
        TENSOR.replace(b"K\x04\x85", b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f\x85"),  # 2^63 - 1
        TENSOR.replace(b"K\x04\x85", b"\x8a\x09\xff\xff\xff\xff\xff\xff\xff\xff\x7f\x85"),  # more than 64 bits
        TENSOR.replace(b"K\x01\x85", b"K\x01K\x01\x86"),  # a stride too many
        TENSOR.replace(b"K\x04\x85", b"\x88\x85"),  # True for a number
        TENSOR.replace(b"K\x04\x85", b"X\x01\x00\x00\x004\x85"),
        TENSOR.replace(b"K\x04tQ", b"K\x03tQ"),  # the storage has fewer
        TENSOR.replace(b"K\x04tQ", b"J\xff\xff\xff\xfftQ"),
        TENSOR.replace(b"K\x04tQ", b"NtQ"),
        TENSOR.replace(b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00another"),
        TENSOR.replace(b"ctorch\nFloatStorage\n", b"ccollections\nOrderedDict\n"),
        TENSOR.replace(b"ctorch\nFloatStorage\n", b"X\x05\x00\x00\x00Float"),
        TENSOR.replace(STORAGE, b"N"),
        TENSOR.replace(STORAGE, STORAGE[:-1]),  # the storage's tuple itself
        TENSOR[:-2] + b"tt",
        STORAGE,
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R",
        b"ctorch._utils\n_rebuild_parameter\n(N\x88NtR",
        b"ctorch\nFloatStorage\n)R",
        b"ccollections\nOrderedDict\n((X\x01\x00\x00\x00aNtttR",
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(tmp_path, value):
    refusal(archive(tmp_path / "x.bin", state(value)))


class Reduce:
    """Pickled as a call."""

    def __init__(self, call, *args, state=None):
        self.call = (call, args) if state is None else (call, args, state)

    def __reduce__(self):
        return self.call

    def __call__(self):
        """Asked for of what is called."""


def bombs(marker: pathlib.Path) -> dict[str, object]:
    """Objects whose unpickling writes `marker`, by every way of calling that a pickle has."""
    touch = f"open({str(marker)!r}, 'w').close()"
    evil = Reduce(exec, touch)
    return {
        "os.system": Reduce(os.system, f"touch {marker}"),
        "eval": Reduce(eval, f"open({str(marker)!r}, 'w')"),
        "exec": evil,
        "getattr of getattr": Reduce(Reduce(getattr, Reduce(importlib.import_module, "builtins"), "exec"), touch),
        "inside a dict": {"x": torch.ones(2), "y": evil},
        "as a key": {evil: torch.ones(2)},
        "deep down": {"x": [({"y": (evil,)},)]},
        "argument of an OrderedDict": Reduce(collections.OrderedDict, [("x", evil)]),
        "argument of a rebuild": Reduce(torch._utils._rebuild_parameter, torch.ones(2), evil, {}),
        "hooks": Reduce(torch._utils._rebuild_parameter, torch.ones(2), True, {"hook": evil}),
        "state": Reduce(collections.OrderedDict, state={"_metadata": evil}),
        "a storage's map function": Reduce(torch.storage.TypedStorage),
        "torch.hub": Reduce(torch.hub.load, "x", "y"),
        "a module": torch.nn.Linear(2, 2),
    }


@pytest.mark.parametrize("name", bombs(pathlib.Path("x")))
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_calls_something_is_refused_and_does_not_call_it(tmp_path, name, protocol):
    marker = tmp_path / "marker"
    torch.save(bombs(marker)[name], tmp_path / "x.bin", pickle_protocol=protocol)
    refusal(tmp_path / "x.bin")
    assert not marker.exists()


def test_the_marker_of_the_test_above_would_be_written(tmp_path):
    marker = tmp_path / "marker"
    with pytest.raises(TypeError):  # of _rebuild_parameter, when the argument has already done its work
        pickle.loads(pickle.dumps(Reduce(int, bombs(marker)["deep down"])))
    assert marker.exists()


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.", "os.system"),
        (state(after=b"cbuiltins\neval\n"), "builtins.eval"),
        (b"\x80\x02cbuiltins\ngetattr\n0" + state()[2:], "builtins.getattr"),  # named, dropped again
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n.", "__globals__"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "_load_from_bytes"),
        (b"\x80\x02ccollections\nOrderedDict.__init__\n.", "__init__"),
        (b"\x80\x02(ios\nsystem\n.", "INST"),
        (b"\x80\x02(cos\nsystem\no.", "os.system"),
        (b"\x80\x02(ccollections\nOrderedDict\no.", "OBJ"),
        (b"\x80\x02ccollections\nOrderedDict\n)\x81.", "NEWOBJ"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "protocol"),
        (b"\x8c\x02os\x8c\x06system\x93.", "SHORT_BINUNICODE"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93.", "STACK_GLOBAL"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02P0\n.", "PERSID"),
        (b"\x80\x02NQ.", "storage"),
        (b"\x80\x02" + TENSOR + b"}b.", "expected dict"),  # attributes of a tensor
        (b"\x80\x02ccollections\nOrderedDict\n}b.", "expected dict"),  # of a class
        (b"\x80\x02ccollections\nOrderedDict\nX\x01\x00\x00\x00aNs.", "expected dict"),  # items of a class
        (b"\x80\x02ccollections\nOrderedDict\nNa.", "expected list"),
        (b"\x80\x02)NNs.", "expected dict"),
        (b"\x80\x02}]Ns.", "keys"),
        (b"\x80\x02}(" + NAME + b"N" + NAME + b"u.", "zip"),
        (b"\x80\x02}" + (NAME + b"Ns") * 2 + b".", "twice"),
        (b"\x80\x02}}.", "values"),
        (b"\x80\x02.", "values"),
        (b"\x80\x02(.", "values"),
        (b"\x80\x02R.", "lacks"),
        (b"\x80\x02N(\x85.", "lacks"),  # a tuple of what lies before the mark
        (b"\x80\x02t.", "IndexError"),
        (b"\x80\x02h\x05.", "KeyError"),
        (b"\x80\x02q\x05.", "IndexError"),
        (b"\x80\x02}", "STOP"),
        (b"\x80\x02\xff.", "unknown"),
        (b"", "STOP"),
        (b"\x80\x02X\xff\xff\xff\x7fx.", "2147483647"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f1.", "long4"),
        (b"\x80\x02\x96" + b"\xff" * 7 + b"\x7f.", "bytearray8"),
        (b"\x80\x02X\x01\x00\x00\x00\xff.", "utf-8"),
    ],
)
def test_a_pickle_that_torch_save_does_not_write_is_refused(tmp_path, pickled, said):
    assert said.lower() in refusal(archive(tmp_path / "x.bin", pickled)).lower()


MOST = (1 << 23) - 100  # bytes of a pickle, nearly
LONG_MEMO = b"".join(b"r" + i.to_bytes(4, "little") for i in range(MOST // 5))
REBUILD = b"ctorch._utils\n_rebuild_tensor_v2\nq\x02"


@pytest.mark.parametrize(
    ("pickled", "said"),
    [
        (b"}" * MOST * 2, "bytes, the limit is"),
        (b"}" * MOST, "the stack holds more than"),
        (b"(" * MOST, "the stack holds more than"),
        (b"]" + b"(]]]t" * (MOST // 5), "the stack holds more than"),
        (b")" + b"\x85" * (1 << 19), "found tuple"),  # a tuple half a million deep
        (b"})" + b"\x85" * (1 << 19) + b"Ns", "keys must be"),  # which would be hashed as a key
        (b")" + b"q\x00h\x00\x86" * (1 << 18), "found tuple"),  # 2^(2^18) leaves, each pair shared
        (b"]q\x00h\x00a", "found list"),  # a list within itself
        (b"}q\x00" + NAME + b"h\x00s", "found dict"),
        (b"}" + LONG_MEMO + b"N", "values"),
        (b"(" + b"N" * 60000 + b"tq\x00" + b"ccollections\nOrderedDict\nh\x00R" * 10000, "60000 arguments"),
        # One tuple of 60,000 axes, which might be looked through again and again.
        (b"(" + b"K\x01" * 60000 + b"tq\x00" + REBUILD + b"(" + STORAGE + b"K\x00h\x00h\x00\x89}tR", "60000 axes"),
    ],
)
def test_a_pickle_that_grows_ends_soon_and_small(tmp_path, pickled, said):
    file = archive(tmp_path / "x.bin", b"\x80\x02" + pickled + b".")
    start = time.monotonic()
    tracemalloc.start()
    try:
        assert said in refusal(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 400 << 20
    assert time.monotonic() - start < 60


def test_numbers_of_more_than_64_bits_are_refused(tmp_path):
    for digits, said in ((8, "found int"), (9, "64 bits"), (255, "64 bits")):
        pickled = b"\x80\x02\x8a" + bytes([digits]) + b"\x01" * digits + b"."
        assert said in refusal(archive(tmp_path / f"{digits}.bin", pickled))


def test_a_directory_of_any_size_is_not_read(tmp_path):
    file = tmp_path / "x.bin"
    size = 1 << 30
    with file.open("wb") as f:  # nothing but a directory, as its end says
        f.write(b"PK\x03\x04")
        f.truncate(size)
        f.seek(size)
        f.write(struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1, 1, size - 4, 4, 0))
    tracemalloc.start()
    try:
        assert "its directory has" in refusal(file)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_a_file_cut_anywhere_is_refused(tmp_path):
    content = archive(tmp_path / "whole.bin").read_bytes()
    for cut in range(len(content)):
        (tmp_path / "x.bin").write_bytes(content[:cut])
        refusal(tmp_path / "x.bin")


@pytest.mark.parametrize("checksums", [True, False])
def test_a_damaged_file_is_refused_or_says_nothing_wrong(tmp_path, checksums):
    torch.serialization.set_crc32_options(checksums)
    tensors = {"embed.weight": torch.arange(12.0).reshape(3, 4), "norm": torch.ones(5, dtype=torch.bfloat16)}
    try:
        torch.save(tensors, tmp_path / "whole.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    content, expected = (tmp_path / "whole.bin").read_bytes(), read_header(tmp_path / "whole.bin")
    file = tmp_path / "x.bin"
    refused = 0
    for seed in range(600):
        rng = random.Random(seed)
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 3, 20])):
            at = rng.randrange(len(damaged))
            kind = rng.randrange(4)
            if kind == 0:
                damaged[at] ^= 1 << rng.randrange(8)
            elif kind == 1:
                damaged[at] = rng.randrange(256)
            elif kind == 2:
                damaged[at : at + rng.randrange(64)] = b""
            else:
                damaged[at:at] = rng.randbytes(rng.randrange(1, 16))
        file.write_bytes(damaged)
        try:
            entries = read_header(file)
        except UserError:
            refused += 1
            refusal(file)
            continue
        for entry in entries.values():
            assert 0 <= entry.start <= entry.stop <= len(damaged)
        if checksums:  # else a bit of a shape or a name can change and nothing tells
            found = {name: (e.code, e.shape, e.stop - e.start) for name, e in entries.items()}
            assert found == {name: (e.code, e.shape, e.stop - e.start) for name, e in expected.items()}
    assert 100 < refused < 600
