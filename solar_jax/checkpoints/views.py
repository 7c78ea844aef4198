"""Views: checkpoints computed from others as they are read. Each function takes a checkpoint and returns one."""

import dataclasses
import functools
import math

import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint, Origin, View, numpy_dtype, row_blocks, row_unit, tensor_name
from solar_jax.checkpoints.hf_config import grown_hf_config, with_dtype
from solar_jax.checkpoints.tensor_table import TENSORS, hf_tensors
from solar_jax.checkpoints.upcycled import with_experts
from solar_jax.config import ModelConfig
from solar_jax.growth.apply import grown_config, is_scaled
from solar_jax.growth.derived import Pair, deviation, fitted, mixed, moments, noise
from solar_jax.growth.operators import LayerMap
from solar_jax.model.shapes import is_vector


@dataclasses.dataclass(frozen=True)
class _Made:
    """Recipe for one grown tensor: source mixed with partner, or noise, times scale; each step rounded to its dtype."""

    path: str
    source: str  # HF name in the base
    partner: str  # the source itself if there is none
    scale: float
    mix: str
    noise: bool

    @property
    def is_copy(self) -> bool:
        return self.partner == self.source and self.scale == 1.0 and not self.noise


def _made(path: str, layer: int | None, layer_map: LayerMap, cfg: ModelConfig) -> _Made:
    if layer is None:
        return _Made(path, TENSORS[path].hf, TENSORS[path].hf, 1.0, "", False)
    source, partner = (TENSORS[path].hf.format(of[layer]) for of in (layer_map.source, layer_map.partner))
    name = path.rpartition("/")[2]
    scale = layer_map.scale[layer] if is_scaled(name, cfg) else 1.0
    return _Made(path, source, partner, scale, layer_map.mix, layer_map.noise[layer] and not is_vector(name))


def grown(c: Checkpoint, layer_map: LayerMap) -> Checkpoint:
    """Grows `c` by a layer map: the result of `growth.apply.grow`, without holding the model in memory.

    Tensors keep their dtypes. A copied tensor has its source's origin.

    Args:
      c: a checkpoint with as many layers as the layer map's base.
      layer_map: the identity returns `c` itself.
    """
    if layer_map.is_identity:
        return c
    if layer_map.experts:
        deeper = grown(c, dataclasses.replace(layer_map, experts=None))
        return dataclasses.replace(with_experts(deeper, layer_map.experts), view=View(c, layer_map=layer_map))
    cfg = grown_config(c.cfg, layer_map)
    made = {name: _made(path, layer, layer_map, cfg) for name, path, layer in hf_tensors(cfg)}

    @functools.cache
    def pair(path: str) -> Pair:
        """The coefficients of a fitted mixture, from one read of all layers."""
        return _pair(c, path)

    @functools.cache
    def spread(source: str) -> float:
        return deviation(c.read(source, rows) for rows in row_blocks(c.shape_of[source], c.cfg.head_dim))

    def origin(name: str, m: _Made) -> Origin:
        source = c.origin(m.source)
        if m.noise:
            return (source, name, m.scale)
        return source if m.is_copy else (source, c.origin(m.partner), m.scale, m.mix)

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        m = made[name]
        dtype = c.dtype_of[m.source]
        if m.noise:
            height, *width = c.shape_of[m.source]
            x = noise(name, range(height)[rows], math.prod(width), spread(m.source)).astype(dtype)
            x = x.reshape(-1, *width)
        else:
            x = c.read(m.source, rows)
        if m.partner != m.source:
            x = mixed(x, c.read(m.partner, rows), m.mix, lambda: pair(m.path))
        return x if m.scale == 1.0 else x * np.asarray(m.scale, x.dtype)

    return dataclasses.replace(
        c,
        hf_config=grown_hf_config(c.hf_config, layer_map.source),
        cfg=cfg,
        shape_of={name: c.shape_of[m.source] for name, m in made.items()},
        dtype_of={name: c.dtype_of[m.source] for name, m in made.items()},
        read=read,
        entry_of={name: c.entry_of[m.source] for name, m in made.items() if m.is_copy and m.source in c.entry_of},
        origins={name: origin(name, m) for name, m in made.items()},
        view=View(c, layer_map=layer_map),
    )


def _pair(c: Checkpoint, path: str) -> Pair:
    """Fits a tensor of every inner layer to its neighbours."""
    names = [tensor_name(path, i) for i in range(c.cfg.num_hidden_layers)]
    blocks = row_blocks(c.shape_of[names[0]], row_unit(path, c.cfg))
    found = [moments(lambda i, rows=rows: c.read(names[i], rows), len(names)) for rows in blocks]
    return fitted(np.sum(found, axis=0))


def cast(c: Checkpoint, dtype: str | None) -> Checkpoint:
    """Casts every tensor to one dtype; returns `c` itself if None. Values out of float16's range become inf."""
    if dtype is None:
        return c
    wanted = numpy_dtype(dtype)
    kept = {name for name, stored in c.dtype_of.items() if stored == wanted}

    def read(name: str, rows: slice = slice(None)) -> np.ndarray:
        with np.errstate(over="ignore"):
            return c.read(name, rows).astype(wanted, copy=False)

    return dataclasses.replace(
        c,
        hf_config=with_dtype(c.hf_config, dtype),
        dtype_of=dict.fromkeys(c.dtype_of, wanted),
        read=read,
        entry_of={name: entry for name, entry in c.entry_of.items() if name in kept},
        origins={name: c.origin(name) if name in kept else (c.origin(name), dtype) for name in c.shape_of},
        view=View(c, dtype=dtype),
    )
