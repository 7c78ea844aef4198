"""Recomputes the tensors of a conversion in numpy on raw bits, independently of the code that converts.

The growth rules are stated a second time here, by the tensors' HF names, so that a mistake in either place shows.
"""

import functools
import hashlib
import math
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import gguf
import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, numpy_dtype, row_blocks, row_unit
from solar_jax.checkpoints.tensor_table import TENSORS, hf_shape, hf_tensors
from solar_jax.checkpoints.verify.expert_tensors import MADE_OF, ROUTER, expert_matrix, router_matrix, standard_normal
from solar_jax.errors import UserError
from solar_jax.growth.operators import LayerMap

# Tensors through which a layer adds to the residual stream: those that a layer map scales.
_ADDING = ("self_attn.o_proj.weight", "self_attn.o_proj.bias", "mlp.down_proj.weight", "mlp.down_proj.bias",
           "block_sparse_moe.experts.w2.weight")  # fmt: skip
_NORMS_AFTER = ("post_norm1.weight", "post_norm2.weight")  # in their place where they exist
_THREADS = 2  # tensors hashed concurrently
_PIECE = 1 << 20  # elements recomputed at a time


def widen(x: np.ndarray) -> np.ndarray:
    """Converts float32, bfloat16 or float16 to float32, exactly."""
    if x.dtype.name == "bfloat16":
        return (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32, copy=False)


def rounded_to(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Rounds float32 to the nearest value of `dtype`, ties to even."""
    if dtype.name != "bfloat16":
        with np.errstate(over="ignore", invalid="ignore"):
            return x.astype(dtype, copy=False)
    bits = x.view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet_nan = ((bits >> 16) & 0x8000 | 0x7FC0).astype(np.uint16)
    return np.where(np.isnan(x), quiet_nan, rounded).view(dtype)


def bits(x: np.ndarray) -> np.ndarray:
    """Returns the bytes of an array, flat."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _halves(x: np.ndarray) -> np.ndarray:
    """Reads bytes [..., 2k] as float16 and returns float32 [..., k]."""
    return np.ascontiguousarray(x).view(np.float16).astype(np.float32)


def _q8_0(x: np.ndarray) -> np.ndarray:
    """Dequantises blocks [n, 34] of a scale and 32 int8 values."""
    return _halves(x[:, :2]) * np.ascontiguousarray(x[:, 2:]).view(np.int8)


def _nibbles(x: np.ndarray) -> np.ndarray:
    """Unpacks bytes [n, 16] into nibbles [n, 32]: first all low ones, then all high ones."""
    return np.concatenate((x & 15, x >> 4), axis=1).astype(np.float32)


# GGUF type -> (bytes per block, dequantiser of blocks [n, .] to float32 [n, .]); the gguf package does other types.
_DEQUANTISED: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "F32": (4, lambda x: x.view(np.float32)),
    "F16": (2, _halves),
    "BF16": (2, lambda x: (x.view(np.uint16).astype(np.uint32) << 16).view(np.float32)),
    "Q8_0": (34, _q8_0),
    "Q4_0": (18, lambda x: _halves(x[:, :2]) * (_nibbles(x[:, 2:]) - 8)),
    "Q4_1": (20, lambda x: _halves(x[:, :2]) * _nibbles(x[:, 4:]) + _halves(x[:, 2:4])),
}
_PLAIN = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # types that are plain dtypes


class Stored:
    """Tensors of a view's source by HF name: the bytes in its file, and the values that they encode."""

    def __init__(self, view: Checkpoint):
        self.c = c = view.source
        self.layer_map, self.dtype = view.layer_map, view.cast_to
        self.derived = Derived(self)
        self._gguf: dict[str, Any] = {}
        self._interleaved = ()  # tensors that llama.cpp's converter stores with rotary pairs side by side
        if len(c.files) == 1 and _starts_with(c.files[0], b"GGUF"):
            reader = gguf.GGUFReader(c.files[0])
            by_name = {t.name: t for t in reader.tensors}
            for name, path, layer in hf_tensors(c.cfg):
                row = TENSORS[path].gguf.format("" if layer is None else layer)
                tied = row == TENSORS["embed"].gguf and row not in by_name
                self._gguf[name] = by_name[TENSORS["lm_head"].gguf if tied else row]
            if reader.fields["general.architecture"].contents() == "llama":
                self._interleaved = tuple(name for name in self._gguf if re.search(r"\.self_attn\.[qk]_proj\.", name))

    def raw(self, name: str, rows: slice) -> np.ndarray:
        """Returns rows of a tensor as bytes; for GGUF those in the file, otherwise in HF's layout."""
        return bits(self._packed(name, rows) if name in self._gguf else self.c.read(name, rows))

    def nbytes(self, name: str) -> int:
        if name in self._gguf:
            return int(self._gguf[name].n_bytes)
        return math.prod(self.c.shape_of[name]) * self.c.dtype_of[name].itemsize

    def made(self, name: str) -> str:
        """Describes how values are decoded from the bytes; empty if they are stored as they are."""
        if name not in self._gguf:
            return ""
        kind, stored = self._gguf[name].tensor_type.name, self.c.dtype_of[name]
        how = "" if _PLAIN.get(kind) == stored.name else f"dequantised {kind}"
        if kind not in _DEQUANTISED:
            how += " by the gguf package"
        return ", ".join(filter(None, (how, "rotary pairs reordered" if name in self._interleaved else "")))

    def values(self, name: str, rows: slice = slice(None)) -> np.ndarray:
        """Returns rows of a tensor in HF's layout and the checkpoint's dtype; only full heads if the rows are heads."""
        if name not in self._gguf:
            return self.c.read(name, rows)
        data, kind = self._packed(name, rows), self._gguf[name].tensor_type
        if kind.name in _DEQUANTISED:
            size, dequantise = _DEQUANTISED[kind.name]
            x = dequantise(bits(data).reshape(-1, size))
        else:
            x = gguf.quants.dequantize(data, kind).astype(np.float32, copy=False)
        x = rounded_to(x.reshape(-1, *self.c.shape_of[name][1:]), self.c.dtype_of[name])
        if name not in self._interleaved:
            return x
        # Row 2i + p of a head in the file is row i + p H/2 in HF's: the file has rotary pairs side by side.
        half = self.c.cfg.head_dim // 2
        order = np.arange(2 * half).reshape(half, 2).T.reshape(-1)
        heads = np.arange(0, len(x), 2 * half)[:, None]
        return x[(heads + order).reshape(-1)]

    def _packed(self, name: str, rows: slice) -> np.ndarray:
        """Returns rows as stored in a GGUF file; a vector in full, since its blocks run along its only axis."""
        data = self._gguf[name].data
        return data if len(self.c.shape_of[name]) == 1 else data[rows]


def _starts_with(file: pathlib.Path, magic: bytes) -> bool:
    with file.open("rb") as f:
        return f.read(len(magic)) == magic


def _source_path(layer_map: LayerMap, path: str) -> str:
    """Returns the base's path of a tensor: of a layer's experts, the MLP's that they were made of."""
    return MADE_OF[path][0] if layer_map.experts and path in MADE_OF else path


def source_names(layer_map: LayerMap, path: str, layer: int | None) -> list[str]:
    """Returns the base's tensors that a tensor of the grown model is made from."""
    path = _source_path(layer_map, path)
    if layer is None:
        return [TENSORS[path].hf]
    return [TENSORS[path].hf.format(i) for i in dict.fromkeys((layer_map.source[layer], layer_map.partner[layer]))]


def recomputed(parts: Sequence[np.ndarray], scale: float, pair: tuple[float, float] | None = None) -> np.ndarray:
    """Returns the mixture of one or two arrays times `scale`, each step rounded to the first one's dtype, as float32.

    Two arrays give their mean, or a x + b y where `pair` is (a, b).
    """
    dtype = parts[0].dtype
    x = widen(parts[0])
    if len(parts) == 2:
        y = widen(parts[1])
        x = (x + y) / np.float32(2) if pair is None else np.float32(pair[0]) * x + np.float32(pair[1]) * y
        x = widen(rounded_to(x, dtype))
    if scale != 1.0:
        x = widen(rounded_to(x * widen(rounded_to(np.array([scale], np.float32), dtype)), dtype))
    return x


class Derived:
    """Values that growth derives from the base: coefficients of fits, and noise."""

    def __init__(self, stored: Stored):
        self._stored, self._pairs, self._spreads = stored, {}, {}

    def pair(self, path: str) -> tuple[float, float] | None:
        """(a, b) of a W_i + b W_{i+1}, or None where two layers give their mean."""
        if self._stored.layer_map.mix != "fit":
            return None
        if path not in self._pairs:
            c, n, gram, right = self._stored.c, self._stored.layer_map.base_layers, np.zeros((2, 2)), np.zeros(2)
            for rows in row_blocks(hf_shape(path, c.cfg), row_unit(path, c.cfg)):
                wide = [self._flat(TENSORS[path].hf.format(i), rows) for i in range(n)]
                for before, here, after in zip(wide, wide[1:], wide[2:], strict=False):
                    both = np.stack((before, after))
                    gram += both @ both.T
                    right += both @ here
            a, b = np.linalg.pinv(gram, rcond=1e-12, hermitian=True) @ right
            self._pairs[path] = float(np.float32(a)), float(np.float32(b))
        return self._pairs[path]

    def _flat(self, name: str, rows: slice) -> np.ndarray:
        return widen(np.ascontiguousarray(self._stored.values(name, rows))).reshape(-1).astype(np.float64)

    def noise(self, name: str, source: str, rows: slice) -> np.ndarray:
        """Rows of a matrix of noise with the standard deviation of `source`, in its dtype."""
        if source not in self._spreads:
            self._spreads[source] = np.float32(np.std(self._flat(source, slice(None))))
        shape = self._stored.c.shape_of[source]
        drawn = standard_normal(name, range(shape[0])[rows], math.prod(shape[1:]))
        return rounded_to(drawn * self._spreads[source], self._stored.c.dtype_of[source])


def grown_tensor(stored: Stored, path: str, layer: int | None, rows: slice) -> np.ndarray:
    """Computes rows of a tensor of the grown model from the base alone, float32 in HF's layout."""
    if layer is not None and _source_path(stored.layer_map, path) != path:
        return np.concatenate(list(_experts(stored, path, layer)))[rows]
    parts, scale = _parts(stored, path, layer, rows), _scale(stored, path, layer)
    pair = stored.derived.pair(path) if len(parts) == 2 else None
    out = np.empty(parts[0].shape, np.float32)
    flat = [part.reshape(-1) for part in parts]
    for start in range(0, out.size, _PIECE):  # a mean needs several times its own memory
        piece = slice(start, start + _PIECE)
        out.reshape(-1)[piece] = recomputed([part[piece] for part in flat], scale, pair)
    return out


def _experts(stored: Stored, path: str, layer: int) -> Iterator[np.ndarray]:
    """Yields the router [E, D], or one expert's matrix after the other, float32 in HF's layout."""
    made, name = stored.layer_map.experts, TENSORS[path].hf.format(layer)
    assert made is not None
    dtype = stored.c.dtype_of[source_names(stored.layer_map, path, layer)[0]]

    def rounded(x: np.ndarray) -> np.ndarray:
        return widen(rounded_to(x.astype(np.float32, copy=False), dtype))

    if path == ROUTER:
        yield router_matrix(name, made, stored.c.cfg.hidden_size, rounded)
        return
    mlp = grown_tensor(stored, MADE_OF[path][0], layer, slice(None))
    for expert in range(made.experts * made.granularity):
        yield expert_matrix(name, path, expert, made, mlp, rounded)


def _check_experts(
    stored: Stored, result: Checkpoint, progress: Callable[[int], None], name: str, path: str, layer: int
) -> dict[str, Any]:
    """Compares a router or a layer's experts, and returns the record."""
    made, sources = stored.layer_map.experts, source_names(stored.layer_map, path, layer)
    what = "random" if path == ROUTER else f"{made} of {' and '.join(sources)}"
    after, digest, start, difference = result.dtype_of[name], hashlib.sha256(), 0, 0.0
    for x in _experts(stored, path, layer):
        found = np.ascontiguousarray(result.read(name, slice(start, start + len(x))))
        if not np.array_equal(bits(rounded_to(x, after)), bits(found)):
            raise UserError(f"{result.where}: {name} is not {what}, from row {start} on.")
        digest.update(bits(found).data)
        difference = max(difference, _distance(widen(found), x))
        progress(found.nbytes)
        start += len(x)
    return {
        "source": sources, "dtype": after.name, "sha256": digest.hexdigest(), "bitwise_equal": False, "made": what,
        "equals_recomputation": True, "max_abs_difference": difference,
    }  # fmt: skip


def _parts(stored: Stored, path: str, layer: int | None, rows: slice) -> list[np.ndarray]:
    """Rows of a tensor's sources, or of noise, from which it is mixed."""
    sources = source_names(stored.layer_map, path, layer)
    if layer is not None and _is_noise(stored, path, layer):
        return [stored.derived.noise(TENSORS[path].hf.format(layer), sources[0], rows)]
    return [np.ascontiguousarray(stored.values(source, rows)) for source in sources]


def _is_noise(stored: Stored, path: str, layer: int | None) -> bool:
    """Returns whether a tensor is noise: a matrix of a layer that the layer map gives noise."""
    matrix = len(hf_shape(path, stored.c.cfg)) > 1
    return layer is not None and stored.layer_map.noise[layer] and matrix


def _scale(stored: Stored, path: str, layer: int | None) -> float:
    adding = _NORMS_AFTER if any(name.endswith(_NORMS_AFTER) for name in stored.c.shape_of) else _ADDING
    return stored.layer_map.scale[layer] if layer is not None and TENSORS[path].hf.endswith(adding) else 1.0


def hashed_bytes(stored: Stored, result: Checkpoint) -> int:
    """Returns the bytes that `compare_tensors` hashes."""
    used = {name for _, path, layer in hf_tensors(result.cfg) for name in source_names(stored.layer_map, path, layer)}
    made = [(result.shape_of[name], result.dtype_of[name]) for name, _, _ in hf_tensors(result.cfg)]
    return sum(map(stored.nbytes, used)) + sum(math.prod(shape) * dtype.itemsize for shape, dtype in made)


def compare_tensors(stored: Stored, result: Checkpoint, progress: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Hashes every tensor of the result and compares it with the one that the source implies.

    Args:
      stored: the base.
      result: the checkpoint made from it.
      progress: called with the bytes hashed since the last call.

    Returns:
      By HF name: source tensors, dtypes, hashes, how it was made, and how far it is from the source.

    Raises:
      UserError: a tensor does not match.
    """
    tensors = list(hf_tensors(result.cfg))
    used = {
        name: _source_path(stored.layer_map, path)
        for _, path, layer in tensors
        for name in source_names(stored.layer_map, path, layer)
    }
    with ThreadPoolExecutor(_THREADS) as pool:
        try:
            hashes = pool.map(lambda item: _sha256(stored, item[0], item[1], progress), used.items())
            sha256 = dict(zip(used, hashes, strict=True))
            check = functools.partial(_check, stored, result, sha256, progress)
            return dict(pool.map(check, tensors))
        finally:
            pool.shutdown(cancel_futures=True)


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    """Returns the largest |a - b|; infinite where only one is, but not where both are the same infinity or NaN."""
    with np.errstate(invalid="ignore"):
        gap = np.abs(a - b)
    return float(np.max(gap, initial=0.0, where=~np.isnan(gap)))


def _sha256(stored: Stored, name: str, path: str, progress: Callable[[int], None]) -> str:
    digest = hashlib.sha256()
    for rows in row_blocks(stored.c.shape_of[name], row_unit(path, stored.c.cfg)):
        block = stored.raw(name, rows)
        digest.update(block.data)
        progress(block.size)
    return digest.hexdigest()


def _check(
    stored: Stored,
    result: Checkpoint,
    sha256: dict[str, str],
    progress: Callable[[int], None],
    tensor: tuple[str, str, int | None],
) -> tuple[str, dict[str, Any]]:
    """Checks one tensor and returns (HF name, record)."""
    name, path, layer = tensor
    if layer is not None and _source_path(stored.layer_map, path) != path:
        return name, _check_experts(stored, result, progress, name, path, layer)
    c, sources, scale = stored.c, source_names(stored.layer_map, path, layer), _scale(stored, path, layer)
    before, after = c.dtype_of[sources[0]], result.dtype_of[name]
    allowed = (
        {numpy_dtype(stored.dtype)} if stored.dtype else {before, np.dtype(np.float32)}
    )  # a stack of mixed dtypes is float32
    if after not in allowed:
        expected = " or ".join(sorted(d.name for d in allowed))
        raise UserError(f"{result.where}: {name} must be {expected}, found {after.name}.")
    made = [stored.made(source) for source in sources[:1]]
    noise, pair = _is_noise(stored, path, layer), None
    if noise:
        made.append("noise with the standard deviation")
    if len(sources) == 2:
        assert layer is not None
        pair = stored.derived.pair(path)
        mix = "mean" if pair is None else f"{pair[0]:.6g} and {pair[1]:.6g} times the values"
        made.append(f"{mix} of layers {stored.layer_map.source[layer]} and {stored.layer_map.partner[layer]}")
    made += [f"scaled by {scale}"] if scale != 1.0 else []
    made += [f"cast {before.name}->{after.name}"] if after != before else []
    digest, equal, difference = hashlib.sha256(), True, 0.0
    computed = any(made)
    for rows in row_blocks(hf_shape(path, c.cfg), row_unit(path, c.cfg)):
        found = np.ascontiguousarray(result.read(name, rows)).reshape(-1)
        digest.update(found.view(np.uint8).data)
        if computed:
            parts = [part.reshape(-1) for part in _parts(stored, path, layer, rows)]
            for start in range(0, found.size, _PIECE):
                piece = slice(start, start + _PIECE)
                x = recomputed([part[piece] for part in parts], scale, pair)
                equal &= np.array_equal(bits(rounded_to(x, after)), bits(found[piece]))
                if after != before:
                    difference = max(difference, _distance(widen(found[piece]), x))
        progress(found.nbytes)
    same = [digest.hexdigest()] == [sha256[source] for source in sources]
    if computed and not equal:
        raise UserError(f"{result.where}: {name} is not {', '.join(filter(None, made))} of {' and '.join(sources)}.")
    if not computed and not same:
        raise UserError(f"{result.where}: {name} must be bitwise equal to {sources[0]} of {c.where}, but differs.")
    if not np.isfinite(difference):
        raise UserError(f"{result.where}: {name} has values out of {after.name}'s range.")
    record: dict[str, Any] = {
        "source": sources,
        "dtype": after.name,
        "sha256": digest.hexdigest(),
        "source_sha256": [sha256[source] for source in sources],
        "bitwise_equal": same,
        "made": ", ".join(filter(None, made)) or "copied",
    }
    if computed:
        record["equals_recomputation"] = equal
    if after != before:
        record["max_abs_difference"] = difference
    return name, record
