"""Ways to damage a checkpoint, for the fuzz test: each takes a random generator and changes a folder's files in place.

A folder is {name: content}; content is bytes, or something that is no file. A name that starts with "../" lies beside
the folder.
"""

import contextlib
import dataclasses
import json
import random
import re
from collections.abc import Callable
from typing import Any

Files = dict[str, Any]
Damage = Callable[[random.Random, Files], None]


@dataclasses.dataclass(frozen=True)
class Link:
    to: str


@dataclasses.dataclass(frozen=True)
class Pipe:
    pass


@dataclasses.dataclass(frozen=True)
class Folder:
    pass


def dumps(pairs: list[tuple[str, Any]]) -> bytes:
    """A JSON object, with keys twice where they come twice, and what `nested` asks for."""
    text = ",".join(f"{json.dumps(k)}:{json.dumps(v)}" for k, v in pairs)
    return re.sub(r'"@(\d+)([a-z])@"', lambda m: _NESTS[m[2]](int(m[1])), f"{{{text}}}").encode()


_NESTS = {"l": lambda n: "[" * n + "]" * n, "d": lambda n: '{"a":' * n + "1" + "}" * n}


def nested(rng: random.Random) -> str:
    """A mark that `dumps` writes as a value of any depth; Python's own encoder stops early."""
    return f"@{rng.choice([3, 150, 250, 900, 1100, 50_000])}{rng.choice('ld')}@"


NUMBERS = [0, 1, 2, 3, 7, 8, 15, 16, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63]
NUMBERS += [2**64 - 1, 2**64, 10**30, 10**400]
TEXTS = ["", "x", "1", "F32", "../x", "a\nb", "\ud800", "\0", "x" * 3000, "é", "__metadata__", "\x1b[2J"]


def odd(rng: random.Random) -> Any:
    """A value where another was expected."""
    n = rng.choice(NUMBERS)
    values = [
        None, True, False, n, -n, n + 0.0 if n < 2**64 else 1e308, 0.5, 1e-5, -0.0, float("nan"), float("inf"),
        rng.choice(TEXTS), [], [n], [[]], [0] * 1000, {}, {"a": n}, {rng.choice(TEXTS): None},
    ]  # fmt: skip
    return nested(rng) if rng.random() < 0.05 else rng.choice(values)


def pick(rng: random.Random, files: Files, *suffixes: str) -> str:
    return rng.choice(sorted(n for n, content in files.items() if isinstance(content, bytes) and n.endswith(suffixes)))


def flipped(rng: random.Random, data: bytes, start: int, stop: int) -> bytes:
    """Some bytes of a range changed."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(start, stop)
        out[at] = rng.choice([out[at] ^ (1 << rng.randrange(8)), rng.randrange(256), 0, 0xFF])
    return bytes(out)


def overwritten(rng: random.Random, data: bytes, start: int, stop: int) -> bytes:
    """A number of a range made another."""
    size = rng.choice([1, 2, 4, 8])
    at = rng.randrange(start, max(stop - size, start + 1))
    number = rng.choice(NUMBERS) + rng.randrange(-2, 3)
    return data[:at] + (number % (1 << 8 * size)).to_bytes(size, "little") + data[at + size :]


def moved(rng: random.Random, data: bytes, start: int, stop: int) -> bytes:
    """Bytes lost, added, doubled or swapped."""
    a, b = sorted(rng.randrange(start, stop) for _ in range(2))
    c = min(b + rng.choice([1, 4, 8, 100]), stop)
    cut = data[:b] + data[c:]
    added = data[:b] + rng.randbytes(c - b) + data[b:]
    return rng.choice([cut, added, data[:b] + data[a:], data[:a] + data[b:c] + data[a:b] + data[c:]])


def truncated(*suffixes: str) -> Damage:
    def damage(rng: random.Random, files: Files) -> None:
        name = pick(rng, files, *suffixes)
        size = len(files[name])
        files[name] = files[name][: rng.choice([0, 1, 7, 8, 9, size - 1, size - 2, rng.randrange(size)]) % size]

    return damage


def changed(how: Any, region: Callable[[bytes], tuple[int, int]], *suffixes: str) -> Damage:
    """`how` applied to a region of one file."""

    def damage(rng: random.Random, files: Files) -> None:
        name = pick(rng, files, *suffixes)
        files[name] = how(rng, files[name], *region(files[name]))

    return damage


# ---- safetensors ----------------------------------------------------------------------------------------------------


def header(data: bytes) -> tuple[int, int]:
    return 8, 8 + int.from_bytes(data[:8], "little")


def after_header(data: bytes) -> tuple[int, int]:
    return header(data)[1], len(data)


def whole(data: bytes) -> tuple[int, int]:
    return 0, len(data)


def _lie(rng: random.Random, pairs: list[tuple[str, Any]], size: int) -> None:
    """Makes one statement of a header another."""
    tensors = [i for i, (name, _) in enumerate(pairs) if name != "__metadata__"]
    i, j = rng.sample(tensors, 2)
    (name, info), (other_name, other) = pairs[i], pairs[j]
    start, stop = info["data_offsets"]
    shape, n = info["shape"], rng.choice(NUMBERS)
    d = rng.choice([-8, -2, -1, 1, 2, 8])
    offsets = [
        other["data_offsets"], [start + d, stop + d], [start, stop + d], [start + d, stop], [stop, start],
        [-start - 1, stop], [n, n + stop - start], [start, n], [size - 1, size - 1 + stop - start], [start + 0.0, stop],
        [float("nan"), stop], [start, stop, stop], [start], odd(rng), [odd(rng), stop], [start, odd(rng)], [0, 0],
    ]  # fmt: skip
    shapes = [
        shape[::-1], [*shape, 1], [1, *shape], [*shape, 0], [n, *shape], [-shape[0], *shape[1:]], [], [stop - start],
        [float(x) for x in shape], [2**32] * 70, [shape], other["shape"], odd(rng), [odd(rng)], [x * 2 for x in shape],
    ]  # fmt: skip
    codes = ["F16", "F32", "F64", "I16", "I8", "U8", "BOOL", "F8_E4M3", "bf16", "", "BF16 ", "x" * 5000, "B\nF"]
    names = [other_name, "model.layers.2.mlp.up_proj.weight", "", *TEXTS, f"{name}.rotary_emb.inv_freq"]
    match rng.choice(
        ["offsets", "offsets", "shape", "shape", "dtype", "name", "swap", "twice", "lost", "more", "info"]
    ):
        case "offsets":
            pairs[i] = (name, info | {"data_offsets": rng.choice(offsets)})
        case "shape":
            pairs[i] = (name, info | {"shape": rng.choice(shapes)})
        case "dtype":
            pairs[i] = (name, info | {"dtype": rng.choice([*codes, odd(rng)])})
        case "name":
            pairs[i] = (rng.choice(names), info)
        case "swap":
            pairs[i], pairs[j] = (name, other), (other_name, info)
        case "twice":
            pairs.insert(rng.randrange(len(pairs)), (name, rng.choice([info, other])))
        case "lost":
            del pairs[i]
        case "more":
            pairs.append(
                (rng.choice(names), rng.choice([other, info | {"data_offsets": [0, 0], "shape": [0]}, odd(rng)]))
            )
        case "info":
            key = rng.choice(["dtype", "shape", "data_offsets", "more"])
            pairs[i] = (name, rng.choice([odd(rng), info | {key: odd(rng)}, nested(rng)]))


def header_lies(rng: random.Random, files: Files) -> None:
    name = pick(rng, files, ".safetensors")
    data = files[name]
    start, stop = header(data)
    pairs = list(json.loads(data[start:stop]).items())
    _lie(rng, pairs, len(data) - stop)
    if rng.random() < 0.3:
        with contextlib.suppress(AttributeError, IndexError, KeyError, TypeError, ValueError):  # too broken for more
            _lie(rng, pairs, len(data) - stop)
    text = dumps(pairs)
    text += b" " * (-len(text) % 8)
    files[name] = len(text).to_bytes(8, "little") + text + data[stop:]


def header_length(rng: random.Random, files: Files) -> None:
    name = pick(rng, files, ".safetensors")
    data = files[name]
    n, size = int.from_bytes(data[:8], "little"), len(data)
    lengths = [0, 1, n - 1, n + 1, n - 8, n + 8, size, size - 8, size - 7, 10**8 + 1, 2**63, 2**64 - 1, n | 1 << 40]
    files[name] = rng.choice(lengths).to_bytes(8, "little") + data[8:]


# ---- Indexes and things that are no files ---------------------------------------------------------------------------

PLACES = [
    "../x", "../model.safetensors", "/etc/passwd", "/dev/zero", "..", ".", "", "\0", "a\0b", "sub/x", "nothing", None,
    3, True, [], {}, "x" * 300, "a\nb", "\ud800", "config.json", "pipe", "loop", "folder", "out", "~/x", "C:\\x",
]  # fmt: skip


def index_lies(rng: random.Random, files: Files) -> None:
    name = pick(rng, files, ".index.json")
    index = json.loads(files[name])
    weight_map = index["weight_map"]
    files |= {"pipe": Pipe(), "loop": Link("loop2"), "loop2": Link("loop"), "folder": Folder(), "out": Link("../x")}
    files["../x"] = files[rng.choice(sorted(set(weight_map.values())))]  # whole: only its place is wrong
    tensor, other = rng.sample(sorted(weight_map), 2)
    match rng.choice(["place", "place", "place", "place", "elsewhere", "lost", "more", "map", "all"]):
        case "place":
            weight_map[tensor] = rng.choice(PLACES)
        case "elsewhere":
            weight_map[tensor] = weight_map[other]
        case "lost":
            del weight_map[tensor]
        case "more":
            weight_map[rng.choice(["x", *TEXTS])] = weight_map[tensor]
        case "map":
            index["weight_map"] = odd(rng)
        case "all":
            index["weight_map"] = dict.fromkeys(weight_map, rng.choice(PLACES))
    files[name] = dumps(list(index.items()))


def other_things(rng: random.Random, files: Files) -> None:
    """A file gone, empty, or something that is no file in its place."""
    name = pick(rng, files, "")
    files["../elsewhere"] = files[name]
    files["within"] = Link("../elsewhere")
    things = [None, b"", Pipe(), Folder(), Link("../elsewhere"), Link("within"), Link(name), Link("nothing")]
    thing = rng.choice([*things, Link("/dev/zero"), files[pick(rng, files, "")], rng.randbytes(100), Link("..")])
    if thing is None:
        del files[name]
    else:
        files[name] = thing


# ---- config.json ----------------------------------------------------------------------------------------------------

KEYS = [
    "model_type", "architectures", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "attention_bias", "mlp_bias", "sliding_window", "layer_types",
    "hidden_act", "dtype", "torch_dtype", "use_sliding_window", "max_window_layers", "quantization_config", "auto_map",
    "id2label", "eos_token_id", "bos_token_id", "partial_rotary_factor", "new_key", "num_experts", "x" * 3000, "a\nb",
]  # fmt: skip
ROPE = ["rope_type", "type", "rope_theta", "factor", "low_freq_factor", "high_freq_factor", "attention_factor", "x"]


def config_values(rng: random.Random, files: Files) -> None:
    config = json.loads(files["config.json"])
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        key = rng.choice(KEYS)
        values = [
            odd(rng),
            {rng.choice(ROPE): odd(rng)},
            {"rope_type": rng.choice(["default", "linear", "llama3", "yarn"])},
        ]
        values += [[odd(rng)], "mistral", "qwen2", "qwen3", "bfloat16", ["full_attention"] * 2]
        config[key] = rng.choice([odd(rng), odd(rng), rng.choice(values)])
    if rng.random() < 0.1:
        config.pop(rng.choice(sorted(config)))
    files["config.json"] = dumps(list(config.items()))
