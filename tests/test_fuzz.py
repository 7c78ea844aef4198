"""2,000 damaged checkpoints: each is refused in one sentence and leaves nothing, or is converted right.

Nothing else may happen: no other exception, nothing that is waited for, no code of a pickle run, no file but the
target's. Each case has a seed of its own, which a failure names; `-s` shows the table.
"""

import collections
import contextlib
import hashlib
import io
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors
import torch

from solar_jax import convert
from solar_jax.checkpoints.convert import Target
from solar_jax.errors import UserError
from tests.checkpoints.test_gguf import write_gguf
from tests.conftest import hf_model
from tests.fuzz import damage as d
from tests.fuzz import pickles as p

CASES = 80  # of each kind
SECONDS = 5.0  # that one case may take
SIZES = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 4,
}  # fmt: skip
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # by name: dtype, shape, content


# ---- Sound checkpoints ----------------------------------------------------------------------------------------------


def content(folder: pathlib.Path) -> d.Files:
    return {f.name: f.read_bytes() for f in folder.iterdir()}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, d.Files]:
    """The same model in every form that is read, a few kB each."""
    tmp = tmp_path_factory.mktemp("bases")
    model = hf_model(**SIZES).to(torch.bfloat16)
    model.save_pretrained(tmp / "safe")
    model.save_pretrained(tmp / "shards", max_shard_size="1KB")
    safe, shards = content(tmp / "safe"), content(tmp / "shards")
    safe |= {"tokenizer_config.json": b"{}", "lineage.json": b'{"parents": []}'}
    config = {k: v for k, v in safe.items() if not k.endswith(".safetensors")}
    state = {name: x.clone() for name, x in model.state_dict().items()}
    torch.save(state, tmp / "pytorch_model.bin")
    old = dict(config)
    weight_map = {}
    for i, names in enumerate((list(state)[:9], list(state)[9:])):
        torch.save({name: state[name] for name in names}, tmp / "shard")
        old[f"pytorch_model-{i}.bin"] = (tmp / "shard").read_bytes()
        weight_map |= dict.fromkeys(names, f"pytorch_model-{i}.bin")
    old["pytorch_model.bin.index.json"] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    wide = {name: x.float().numpy() for name, x in state.items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):  # one row for each token
        wide[name] = np.resize(wide[name], (261, 8))
    sizes = {"vocab_size": 261, "embedding_length": 8, "feed_forward_length": 12, "attention__key_length": 2}
    write_gguf(tmp / "m.gguf", wide, **{f"llama__{key}": value for key, value in sizes.items()})
    return {
        "safe": safe,
        "shards": shards,
        "bin": config | {"pytorch_model.bin": (tmp / "pytorch_model.bin").read_bytes()},
        "bins": old,
        "gguf": {"m.gguf": (tmp / "m.gguf").read_bytes()},
    }


@pytest.fixture(scope="module")
def sound(bases) -> Tensors:
    return _of_safetensors(bases["safe"]["model.safetensors"])


# ---- What a folder holds, read by other means -----------------------------------------------------------------------


def _of_torch(x: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    code = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}[x.dtype]
    return code, tuple(x.shape), x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _of_safetensors(data: bytes) -> Tensors:
    start, stop = d.header(data)
    found = {}
    for name, info in json.loads(data[start:stop]).items():
        if name != "__metadata__":
            a, b = (stop + x for x in info["data_offsets"])
            found[name] = (info["dtype"], tuple(info["shape"]), data[a:b])
    return found


def _of_bin(data: bytes) -> Tensors:
    """By torch, from an archive made anew: what ours may leave unread, such as checksums of weights, is sound there."""
    members = p.members(data)
    (root,) = (name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl"))
    sound = p.archive_of(members | {f"{root}version": b"3\n"})
    return {name: _of_torch(x) for name, x in torch.load(io.BytesIO(sound), weights_only=True).items()}


def _of_gguf(file: pathlib.Path) -> Tensors:
    """By the package `gguf`; q_proj and k_proj taken out of llama.cpp's order."""
    reader = gguf.GGUFReader(file)
    back = {
        "token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    found = {}
    for tensor in reader.tensors:
        *blk, kind, _ = tensor.name.split(".")
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        x = x.reshape([int(n) for n in reversed(tensor.shape)])
        for of, key in (("attn_q", "head_count"), ("attn_k", "head_count_kv")):
            if kind == of:
                heads = int(reader.fields[f"llama.attention.{key}"].contents())
                x = x.reshape(heads, -1, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
        name = f"{'model.layers.' + blk[1] + '.' if blk else ''}{back[kind]}.weight"
        found[name] = ("F32", x.shape, x.tobytes())
    return found


def expected(source: pathlib.Path, sound: Tensors) -> Tensors:
    """Every tensor of a source that was accepted; those of the sound one where torch refuses what is beside them."""
    if source.is_file():
        return _of_gguf(source)
    index = next(source.glob("*.index.json"), None)
    found: Tensors = {}
    if index is not None:
        files = {source / name for name in json.loads(index.read_bytes())["weight_map"].values()}
    else:
        files = {*source.glob("*.safetensors"), *source.glob("*.bin")}
    for file in files:
        if file.suffix == ".safetensors":
            found |= _of_safetensors(file.read_bytes())
            continue
        try:
            found |= _of_bin(file.read_bytes())
        except Exception:  # torch has as many as there are ways to break a pickle
            return sound
    return found


def written(out: pathlib.Path) -> Tensors:
    found: Tensors = {}
    for file in out.glob("*.safetensors"):
        for name, info in safetensors.deserialize(file.read_bytes()):
            found[name] = (info["dtype"], tuple(info["shape"]), bytes(info["data"]))
    return found


def as_float32(tensor: tuple[str, tuple[int, ...], bytes]) -> tuple[str, tuple[int, ...], bytes]:
    code, shape, data = tensor
    kind = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32}[code]
    return "F32", shape, np.frombuffer(data, kind).astype(np.float32).tobytes()


def check_result(source: pathlib.Path, out: pathlib.Path, dtype: str | None, sound: Tensors) -> None:
    """The output holds the source's tensors, bit by bit, and its config but for the dtype."""
    wanted, found = expected(source, sound), written(out)
    layers = {name for name in wanted if not name.endswith(".rotary_emb.inv_freq")}
    assert set(found) == layers, set(found) ^ layers
    for name, x in found.items():
        assert x == (as_float32(wanted[name]) if dtype else wanted[name]), name
    if source.is_dir():
        configs = (json.loads((folder / "config.json").read_bytes()) for folder in (source, out))
        base, config = ({k: v for k, v in c.items() if k not in ("dtype", "torch_dtype")} for c in configs)
        assert json.dumps(base) == json.dumps(config)  # as text, where NaN is NaN


# ---- A case ---------------------------------------------------------------------------------------------------------


class Hang(BaseException):
    """Not an Exception, which code under test might catch."""


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def put(folder: pathlib.Path, files: d.Files) -> None:
    folder.mkdir(parents=True)
    for name, what in files.items():
        path = folder / name
        if isinstance(what, d.Link):
            path.symlink_to(what.to)
        elif isinstance(what, d.Pipe):
            os.mkfifo(path)
        elif isinstance(what, d.Folder):
            path.mkdir()
        else:
            path.write_bytes(what)


def tree(folder: pathlib.Path) -> dict[str, Any]:
    """Every path below, with what stands there."""
    found: dict[str, Any] = {}
    for at, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = pathlib.Path(at, name)
            link = os.readlink(path) if path.is_symlink() else None
            whole = hashlib.sha256(path.read_bytes()).hexdigest() if link is None and path.is_file() else None
            found[str(path.relative_to(folder))] = (path.lstat().st_mode, link, whole)
    return found


def run(root: pathlib.Path, files: d.Files, dtype: str | None, sound: Tensors) -> str:
    """ "refused" or "converted"; anything else is an AssertionError or the exception that it was."""
    put(root / "source", files)
    source = root / "source" / "m.gguf" if "m.gguf" in files else root / "source"
    (root / "here").mkdir()
    before = tree(root)
    out = root / "target" / "out"
    try:
        with at_most(SECONDS), contextlib.chdir(root / "here"), contextlib.redirect_stdout(io.StringIO()):
            convert.convert(str(source), Target(out, dtype=dtype))
    except UserError as e:
        text = str(e)
        assert len(text.splitlines()) == 1, f"not one line: {text!r}"
        assert text.isprintable(), f"not printable: {text!r}"
        assert len(text) < 1000 + len(str(root)), f"{len(text)} characters: {text[:300]}"
        assert text.endswith((".", "?")), f"no sentence: {text}"
        assert {k: v for k, v in tree(root).items() if k != "target"} == before, "left something behind"
        assert not (root / "target").exists() or not any((root / "target").iterdir()), "left something at the target"
        return "refused"
    after = tree(root)
    assert {k: v for k, v in after.items() if not k.startswith("target")} == before, "wrote elsewhere"
    assert [f.name for f in (root / "target").iterdir()] == ["out"], "left something beside the target"
    check_result(source, out, dtype, sound)
    return "converted"


# ---- All of them ----------------------------------------------------------------------------------------------------

BIN, SAFE, GGUF, INDEX = ".bin", ".safetensors", ".gguf", ".index.json"


def kinds(gguf_data: int) -> dict[str, tuple[str, d.Damage]]:
    """Kind -> (bases, damage); of those that end in "data" none may be refused, since any bits are weights."""
    hostile = p.hostile("marker")  # in the working directory

    def gguf_header(data: bytes) -> tuple[int, int]:
        return 0, min(gguf_data, len(data))

    return {
        "safetensors cut short": ("safe shards", d.truncated(SAFE)),
        "safetensors header bytes": ("safe shards", d.changed(d.flipped, d.header, SAFE)),
        "safetensors header moved": ("safe shards", d.changed(d.moved, d.header, SAFE)),
        "safetensors header lies": ("safe", d.header_lies),
        "safetensors shard lies": ("shards", d.header_lies),
        "safetensors header length": ("safe shards", d.header_length),
        "safetensors bytes moved": ("safe shards", d.changed(d.moved, d.whole, SAFE)),
        "safetensors data": ("safe shards", d.changed(d.flipped, d.after_header, SAFE)),
        "index lies": ("shards", d.index_lies),
        "index lies, bin": ("bins", d.index_lies),
        "index bytes": ("shards bins", d.changed(d.flipped, d.whole, INDEX)),
        "things that are no files": ("safe shards bin bins gguf", d.other_things),
        "bin cut short": ("bin bins", d.truncated(BIN)),
        "bin zip numbers": ("bin bins", d.changed(d.overwritten, p.directory, BIN)),
        "bin zip bytes": ("bin bins", d.changed(d.flipped, p.directory, BIN)),
        "bin pickle bytes": ("bin bins", d.changed(d.flipped, p.first_members, BIN)),
        "bin bytes moved": ("bin bins", d.changed(d.moved, d.whole, BIN)),
        "bin hostile pickles": ("bin bins", hostile),
        "bin mutated pickles": ("bin bins", p.mutated_pickle),
        "bin pickles of other things": ("bin", p.any_pickle),
        "bin data": ("bin bins", p.changed_weights),
        "gguf cut short": ("gguf", d.truncated(GGUF)),
        "gguf header bytes": ("gguf", d.changed(d.flipped, gguf_header, GGUF)),
        "gguf header numbers": ("gguf", d.changed(d.overwritten, gguf_header, GGUF)),
        "gguf bytes moved": ("gguf", d.changed(d.moved, gguf_header, GGUF)),
        "gguf data": ("gguf", d.changed(d.flipped, lambda data: (gguf_data, len(data)), GGUF)),
        "config values": ("safe shards bin", d.config_values),
        "config bytes": ("safe bin", d.changed(d.flipped, d.whole, "config.json")),
    }


@pytest.mark.slow
def test_a_damaged_checkpoint_is_refused_in_one_sentence_or_converted_right(bases, sound, tmp_path):
    (tmp_path / "m.gguf").write_bytes(bases["gguf"]["m.gguf"])
    table: dict[str, collections.Counter] = {}
    failures, memory = [], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for name, files in bases.items():
        assert run(tmp_path / name, files, None, sound) == "converted", name  # and what is loaded on first use
    for kind, (names, damage) in kinds(gguf.GGUFReader(tmp_path / "m.gguf").data_offset).items():
        counts = table[kind] = collections.Counter()
        begin = time.monotonic()
        for i in range(CASES):
            rng = random.Random(f"{kind} {i}")
            files, dtype = dict(bases[rng.choice(names.split())]), rng.choice([None, None, "float32"])
            damage(rng, files)
            try:
                counts[run(tmp_path / "case", files, dtype, sound)] += 1
            except (Exception, Hang) as e:
                failures.append(f"{kind} {i}: {type(e).__name__}: {str(e)[:300]}")
            shutil.rmtree(tmp_path / "case")
        counts["ms"] = round((time.monotonic() - begin) * 1000 / CASES)
    print(f"\n{'':30}{'cases':>7}{'refused':>9}{'converted':>11}{'ms each':>9}")
    for kind, c in table.items():
        print(f"{kind:30}{CASES:7}{c['refused']:9}{c['converted']:11}{c['ms']:9}")
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(f"{len(table) * CASES} cases, {len(failures)} failed, {grown / 1024:.0f} MiB more at most")
    assert not failures, "\n".join(failures)
    assert len(table) * CASES >= 2000
    for kind, c in table.items():
        assert (c["refused"] == 0) == kind.endswith("data"), kind
    assert grown < 1 << 20  # in KiB


def _changes(name: str, change: Callable[[bytes], bytes]) -> Callable[..., None]:
    def sabotage(source: str, target: Target) -> None:
        CONVERT(source, target)
        path = target.out / name
        path.write_bytes(change(path.read_bytes() if path.exists() else b""))

    return sabotage


def _raises(error: BaseException) -> Callable[..., None]:
    def sabotage(source: str, target: Target) -> None:
        raise error

    return sabotage


CONVERT = convert.convert
SABOTAGE = {
    "another exception": (_raises(ValueError("no")), ValueError, "no"),
    "two lines": (_raises(UserError("a\nb.")), AssertionError, "not one line"),
    "no sentence": (_raises(UserError("a")), AssertionError, "no sentence"),
    "a file beside the target": (_changes("../x", lambda x: x), AssertionError, "beside the target"),
    "a file elsewhere": (_changes("../../here/x", lambda x: x), AssertionError, "wrote elsewhere"),
    "a changed source": (_changes("../../source/config.json", lambda x: x + b" "), AssertionError, "wrote elsewhere"),
    "another bit": (_changes("model.safetensors", lambda x: x[:-1] + bytes([x[-1] ^ 1])), AssertionError, "lm_head"),
    "another config": (_changes("config.json", lambda x: x.replace(b"silu", b"gelu")), AssertionError, "gelu"),
    "an endless wait": (lambda source, target: time.sleep(60), Hang, "took more than"),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_the_check_of_a_case_can_fail(bases, sound, tmp_path, monkeypatch, what):
    sabotage, error, said = SABOTAGE[what]
    assert run(tmp_path / "sound", bases["safe"], None, sound) == "converted"
    monkeypatch.setattr(convert, "convert", sabotage)
    monkeypatch.setattr("tests.test_fuzz.SECONDS", 1.0)
    with pytest.raises(error, match=said):
        run(tmp_path / "case", bases["safe"], None, sound)
