"""PyTorch's .bin files against torch itself, and files that would run something or lie."""

import json
import math
import pathlib
import random
import shutil
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.errors import UserError
from solar_jax.formats import safetensors
from solar_jax.formats.safetensors import read_tensor
from solar_jax.formats.torch_zip import read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
# What a pickle of a dict {"x": tensor of 4 float32} has for the tensor, piece by piece.
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQ"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x04\x85K\x01\x85\x89}tR"
NAME = b"X\x01\x00\x00\x00x"


def state(value: bytes = TENSOR, after: bytes = b"") -> bytes:
    """A pickle of {"x": value}."""
    return b"\x80\x02}" + NAME + value + b"s" + after + b"."


def archive(file: pathlib.Path, pickled: bytes = state(), root: str = "x", **members: bytes | None) -> pathlib.Path:
    """A file as torch.save writes it; `members` replace its own, "__" for "/", or leave them out if None."""
    content = {"data.pkl": pickled, "version": b"3\n", "byteorder": b"little", "data/0": struct.pack("<4f", 1, 2, 3, 4)}
    content |= {name.replace("__", "/"): data for name, data in members.items()}  # type: ignore[dict-item]
    with zipfile.ZipFile(file, "w") as z:
        for name, data in content.items():
            if data is not None:
                z.writestr(f"{root}/{name}", data)
    return file


def refusal(file: pathlib.Path) -> str:
    """The one line that reading the header of `file` ends with."""
    with pytest.raises(UserError) as e:
        read_header(file)
    text = str(e.value)
    assert text.startswith(f"{file}: ")
    assert text.endswith((".", "?"))
    assert len(text.splitlines()) == 1
    assert len(text) < 1000
    return text.removeprefix(f"{file}: ")


def torch_bytes(x: torch.Tensor) -> bytes:
    return x.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def check(file: pathlib.Path) -> dict[str, safetensors.Entry]:
    """Every tensor of the file has the bytes and the shape that torch gives it."""
    entries, content = read_header(file), file.read_bytes()
    expected = torch.load(file, weights_only=True)
    assert list(entries) == list(expected)
    for name, entry in entries.items():
        assert entry.file == file
        assert entry.shape == tuple(expected[name].shape)
        assert DTYPES[entry.code] == expected[name].dtype
        assert content[entry.start : entry.stop] == torch_bytes(expected[name])
    return entries


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    size = math.prod(shape) * dtype.itemsize
    return torch.frombuffer(bytearray(random.Random(0).randbytes(size)), dtype=dtype).reshape(shape)


@pytest.mark.parametrize("code", DTYPES)
def test_every_dtype_is_where_torch_put_it(tmp_path, code):
    dtype = DTYPES[code]
    tensors = {f"{shape}": random_tensor(dtype, shape) for shape in [(3, 5), (1,), (), (2, 1, 7)]}
    tensors |= {f"{shape}": torch.empty(shape, dtype=dtype) for shape in [(0, 4), (3, 0), (2, 0, 3)]}
    torch.save(tensors, tmp_path / "x.bin")
    assert {entry.code for entry in check(tmp_path / "x.bin").values()} == {code}


@pytest.mark.parametrize("code", safetensors.DTYPES)
def test_the_ranges_are_read_as_those_of_safetensors(tmp_path, code):
    x = random_tensor(DTYPES[code], (6, 5))
    torch.save({"a": torch.ones(3), "x": x}, tmp_path / "x.bin")
    entry = read_header(tmp_path / "x.bin")["x"]
    assert read_tensor("x", entry).tobytes() == torch_bytes(x)
    assert read_tensor("x", entry, slice(2, 4)).tobytes() == torch_bytes(x[2:4])


def test_a_modules_state_dict_with_metadata_and_parameters_is_read(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    state_dict = module.state_dict(keep_vars=True)  # an OrderedDict with the attribute _metadata, of Parameters
    state_dict["0.weight"].note = "a parameter with an attribute"  # type: ignore[union-attr]
    torch.save(state_dict, tmp_path / "x.bin")
    expected = {k: p.detach() for k, p in state_dict.items()}
    entries, content = read_header(tmp_path / "x.bin"), (tmp_path / "x.bin").read_bytes()
    assert {k: content[e.start : e.stop] for k, e in entries.items()} == {
        k: torch_bytes(x) for k, x in expected.items()
    }


def test_several_thousand_tensors_are_read(tmp_path):
    # The pickler writes a thousand keys at a time, and its memo outgrows one byte.
    torch.save({f"layer.{i}.weight": torch.full((2,), float(i)) for i in range(3000)}, tmp_path / "x.bin")
    check(tmp_path / "x.bin")


def test_tied_weights_share_a_range(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    torch.save({"embed": x, "head": x, "flat": x.view(6)}, tmp_path / "x.bin")
    entries = check(tmp_path / "x.bin")
    assert entries["embed"] == entries["head"]
    assert (entries["flat"].start, entries["flat"].stop) == (entries["embed"].start, entries["embed"].stop)


def test_a_view_begins_where_it_begins_in_its_storage(tmp_path):
    x = torch.arange(24, dtype=torch.bfloat16)
    views = {
        "middle": x[4:10].reshape(2, 3),
        "one": x[23:],
        "scalar": x[5],
        "none": x[7:7],
        "row": x.reshape(4, 6)[1:2],
    }
    torch.save(views, tmp_path / "x.bin")
    entries = check(tmp_path / "x.bin")
    assert entries["one"].start - entries["middle"].start == 2 * 19


def test_strides_of_axes_of_one_do_not_matter(tmp_path):
    x = torch.arange(6.0).reshape(2, 3)
    odd = torch.as_strided(x, (1, 2, 1, 3), (77, 3, 99, 1))
    torch.save({"x": odd, "column": torch.as_strided(x, (3, 1), (1, 5))}, tmp_path / "x.bin")
    check(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("view", "shown"),
    [
        (lambda x: x.T, "(1, 4)"),
        (lambda x: x[:, :2], "(4, 1)"),
        (lambda x: x[:, 0], "(4,)"),
        (lambda x: x[:, :1].expand(3, 4), "(4, 0)"),
        (lambda x: x[::2], "(8, 1)"),
    ],
)
def test_a_tensor_that_is_not_one_range_is_named_with_its_strides(tmp_path, view, shown):
    torch.save({"fine": torch.ones(2), "odd": view(torch.arange(12.0).reshape(3, 4))}, tmp_path / "x.bin")
    text = refusal(tmp_path / "x.bin")
    assert "odd" in text
    assert shown in text


def test_tensors_that_are_stored_negated_are_refused(tmp_path):
    torch.save({"x": torch.tensor([1 + 2j]).conj().imag}, tmp_path / "x.bin")
    assert "negated" in refusal(tmp_path / "x.bin")


def test_a_file_without_checksums_is_read_and_a_wrong_one_is_refused(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"x": torch.ones(3)}, tmp_path / "x.bin")
    finally:
        torch.serialization.set_crc32_options(True)
    check(tmp_path / "x.bin")
    file = archive(tmp_path / "y.bin")
    file.write_bytes(file.read_bytes().replace(b"K\x04tQ", b"K\x05tQ"))
    assert "checksum" in refusal(file)


def test_tensors_past_four_gigabytes_are_found(tmp_path):
    file = tmp_path / "x.bin"
    with torch.serialization.skip_data():  # leaves holes, which take no disk
        torch.save({"big": torch.empty(5 << 28), "small": torch.empty(5)}, file)
    entry = read_header(file)["small"]
    with file.open("r+b") as f:
        f.seek(entry.start)
        f.write(np.arange(5, dtype=np.float32).tobytes())
    assert torch.load(file, mmap=True)["small"].tolist() == [0, 1, 2, 3, 4]


def test_an_archive_made_by_hand_is_read(tmp_path):
    (entry,) = check(archive(tmp_path / "x.bin")).values()  # or the refusals below would be of something else
    assert read_tensor("x", entry).tolist() == [1, 2, 3, 4]
    check(archive(tmp_path / "y.bin", byteorder=None))  # files of before torch 2.1 have none


def test_torch_is_not_needed(tmp_path):
    archive(tmp_path / "x.bin")
    code = f"""
import pathlib, sys
sys.modules["torch"] = None
from solar_jax.formats.torch_zip import read_header
print(read_header(pathlib.Path({str(tmp_path / "x.bin")!r}))["x"].shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "(4,)\n"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ({"model": {"x": torch.ones(2)}}, "model must be a tensor in a flat dict, found dict"),
        ({"x": torch.ones(2), "epoch": 3}, "epoch must be a tensor in a flat dict, found int"),
        ({"x": [torch.ones(2)]}, "x must be a tensor in a flat dict, found list"),
        ({"x": None}, "found None"),
        ({"x": 0.5}, "found float"),
        ([torch.ones(2)], "must hold a dict of tensors, found list"),
        (torch.ones(2), "found a tensor"),
        ({3: torch.ones(2)}, "found 3"),
        ({(1, 2): torch.ones(2)}, "keys must be strings or integers, found tuple"),
        ({"a\nb": torch.ones(2)}, "printable"),
        ({"x": torch.float32}, "torch.float32"),
        ({"x": torch.ones(2).to_sparse()}, "_rebuild_sparse_tensor"),
        ({"x": np.ones(2)}, "numpy"),
        ({"x": pathlib.PurePosixPath("x")}, "pathlib"),
    ],
)
def test_another_layout_than_a_flat_dict_of_tensors_is_refused(tmp_path, value, said):
    torch.save(value, tmp_path / "x.bin")
    assert said in refusal(tmp_path / "x.bin")


def test_files_of_old_torch_are_told_from_files_of_no_torch(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert "before 1.6" in refusal(tmp_path / "old.bin")
    for i, content in enumerate([b"", b"PK", b"text", b"\0" * 100, b"PK\x03\x04" + bytes(100)]):
        (tmp_path / f"{i}.bin").write_bytes(content)
        assert "zip" in refusal(tmp_path / f"{i}.bin")
    assert "cannot be read" in refusal(tmp_path / "none.bin")
    assert "cannot be read" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"byteorder": b"big"}, "'big'"),
        ({"byteorder": b"little" * 9}, "byteorder"),
        ({"data.pkl": None}, "data.pkl"),
        ({"data__0": None}, "the storage '0' of x is missing"),
        ({"data__0": bytes(15)}, "must have 16 bytes, found 15"),
        ({"other__data.pkl": b""}, None),  # deeper down, it is not the one
    ],
)
def test_members_that_are_missing_or_odd_are_named(tmp_path, members, said):
    file = archive(tmp_path / "x.bin", **members)
    if said is None:
        check(file)
    else:
        assert said in refusal(file)


def test_two_roots_are_refused(tmp_path):
    file = archive(tmp_path / "x.bin")
    with zipfile.ZipFile(file, "a") as z:
        z.writestr("y/data.pkl", state())
    assert "found it 2 times" in refusal(file)


def test_a_compressed_storage_is_named(tmp_path):
    file = archive(tmp_path / "x.bin", data__0=None)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as z:
        z.writestr("x/data/0", bytes(16))
    assert "'x/data/0' must be stored uncompressed" in refusal(file)


def test_an_encrypted_storage_is_named(tmp_path):
    content = archive(tmp_path / "x.bin").read_bytes()
    flags = directory_entry(content, b"x/data/0") + 8
    (tmp_path / "x.bin").write_bytes(content[:flags] + b"\x01" + content[flags + 1 :])
    assert "'x/data/0' is encrypted" in refusal(tmp_path / "x.bin")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_the_directory_lists_twice_is_refused(tmp_path):
    file = archive(tmp_path / "x.bin")
    with zipfile.ZipFile(file, "a") as z:
        z.writestr("x/data/0", struct.pack("<4f", 5, 6, 7, 8))
    assert "'x/data/0' twice" in refusal(file)


def directory_entry(content: bytes, name: bytes) -> int:
    """Where the directory's entry of a member begins."""
    return content.rindex(b"PK\x01\x02", 0, content.rindex(name))


def test_a_local_header_that_says_otherwise_is_refused(tmp_path):
    content = archive(tmp_path / "x.bin").read_bytes()
    at = content.index(b"x/data/0")
    lies = {
        "another name": content[:at] + b"x/data/1" + content[at + 8 :],
        "no signature": content[: at - 30] + b"PK\x03\x05" + content[at - 26 :],
        "a longer name": content[: at - 4] + b"\x09" + content[at - 3 :],
        "an extra field that takes it out of the file": content[: at - 2] + b"\xff\xff" + content[at:],
        "compression": content[: at - 22] + b"\x08" + content[at - 21 :],
    }
    for i, lie in enumerate(lies.values()):
        (tmp_path / f"{i}.bin").write_bytes(lie)
        assert "x/data/0" in refusal(tmp_path / f"{i}.bin")


def test_members_that_share_bytes_are_refused(tmp_path):
    content = archive(tmp_path / "x.bin", data__1=bytes(16)).read_bytes()
    entry = directory_entry(content, b"x/data/0")
    (offset,) = struct.unpack_from("<L", content, entry + 42)
    other = struct.unpack_from("<L", content, directory_entry(content, b"x/data/1") + 42)[0]
    for i, lie in enumerate([offset + 1, other, 1 << 31]):
        file = tmp_path / f"{i}.bin"
        file.write_bytes(content[: entry + 42] + struct.pack("<L", lie) + content[entry + 46 :])
        refusal(file)
    sizes = struct.pack("<2L", 50, 50)  # the storage takes in what follows
    (tmp_path / "y.bin").write_bytes(content[: entry + 20] + sizes + content[entry + 28 :])
    assert "inside another member" in refusal(tmp_path / "y.bin")


def test_a_sharded_folder_is_read(tmp_path, tiny):
    whole = safetensors.read_header(tiny / "model.safetensors")
    names = sorted(whole)
    shards = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    weight_map = {}
    for file, held in shards.items():
        arrays = {name: read_tensor(name, whole[name]) for name in held}
        torch.save({name: torch.from_numpy(x.astype(np.float32)) for name, x in arrays.items()}, tmp_path / file)
        weight_map |= dict.fromkeys(held, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    shutil.copy(tiny / "config.json", tmp_path)
    c, expected = open_checkpoint(str(tmp_path)), open_checkpoint(str(tiny))
    assert c.cfg == expected.cfg
    for name in names:
        assert c.read(name).tobytes() == expected.read(name).tobytes()
