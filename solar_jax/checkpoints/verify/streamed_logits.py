"""Computes logits of models that do not fit in memory: one layer at a time, several runs side by side.

The maths is the model's own. A run is a batch of prompts part-way through a model. Two runs' logits are compared in
blocks of the vocabulary, so that [tokens, V] is never held in memory.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from solar_jax.checkpoints.checkpoint import row_blocks
from solar_jax.checkpoints.tensor_table import from_hf, hf_shape
from solar_jax.config import ModelConfig
from solar_jax.model.attention import attention_mask
from solar_jax.model.llama import Block, rms_norm, scaled, unconstrained
from solar_jax.model.rope import rope_angles
from solar_jax.model.shapes import layer_axes

# (path, layer or None, rows of the file's first axis) -> float array in HF's layout
ReadRows = Callable[[str, int | None, slice], np.ndarray]
Layer = dict[str, jax.Array]  # the arrays of `layer_axes`, float32


@dataclasses.dataclass(frozen=True)
class Model:
    """Config of a model and access to its stored weights."""

    cfg: ModelConfig
    read: ReadRows

    def embed(self, tokens: np.ndarray) -> np.ndarray:
        """Returns float32 embeddings [B, T, D] of tokens [B, T]; the table is read once, block by block."""
        out = np.empty((*tokens.shape, self.cfg.hidden_size), np.float32)
        for rows in row_blocks(hf_shape("embed", self.cfg)):
            here = (rows.start <= tokens) & (tokens < rows.stop)
            if here.any():
                out[here] = self.read("embed", None, rows)[tokens[here] - rows.start]
        return out * np.float32(self.cfg.embedding_multiplier or 1.0)

    def layer(self, layer: int) -> Layer:
        """Loads one layer in the form that the model takes."""
        plain = dataclasses.replace(self.cfg, num_hidden_layers=1)
        arrays = {
            name: _as_ours(np.ascontiguousarray(self.read(f"layers/{name}", layer, slice(None))), name, plain)
            for name in layer_axes(self.cfg)
        }
        return arrays | ({"rotates": jnp.asarray(layer not in self.cfg.no_rope_layers)} if plain.no_rope_layers else {})

    def head(self, rows: slice) -> np.ndarray:
        """Returns rows [v, D] of the output head."""
        return self.read("embed" if self.cfg.tie_word_embeddings else "lm_head", None, rows)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _as_ours(x: jax.Array, name: str, cfg: ModelConfig) -> jax.Array:
    """Converts a full tensor from HF's layout to our float32 array; compiled, since numpy transposes slowly."""
    moved: Any = from_hf  # only reshapes and transposes, which both kinds of array support
    return moved(x, f"layers/{name}", cfg).astype(jnp.float32)


class Pass:
    """Prompts at some depth of a model; `step` advances them by one layer."""

    def __init__(self, model: Model, prompts: Sequence[tuple[np.ndarray, np.ndarray]], cfg: ModelConfig | None = None):
        """Args:
        model: the model to run.
        prompts: (tokens [B, T], their embeddings [B, T, D]).
        cfg: config of the layers; the model's own if None.
        """
        self.model, self.cfg = model, cfg or model.cfg
        self.x = [jnp.asarray(x) for _, x in prompts]
        self._graph = _block_graph(dataclasses.replace(self.cfg, num_hidden_layers=1))
        self._places = []
        for tokens, _ in prompts:
            length = tokens.shape[1]
            rope = rope_angles(jnp.arange(length)[None], self.cfg)
            self._places.append((rope, attention_mask(length, None, self.cfg.sliding_window)))

    def step(self, layer: Layer) -> None:
        self.x = [_block(self._graph, layer, x, *p) for x, p in zip(self.x, self._places, strict=True)]
        jax.block_until_ready(self.x)  # or the next layer is read while this one is still in memory

    def hidden(self) -> jax.Array:
        """Returns the final norm's output [P, D] at all P positions, prompt after prompt."""
        scale = jnp.asarray(self.model.read("final_norm", None, slice(None)).astype(np.float32))
        flat = jnp.concatenate([x.reshape(-1, x.shape[-1]) for x in self.x])
        return scaled(rms_norm(flat, scale, self.cfg.rms_norm_eps), self.cfg.logits_multiplier)


@functools.cache
def _block_graph(cfg: ModelConfig) -> nnx.GraphDef:
    """Returns a decoder layer's graph definition, without arrays."""
    return nnx.split(nnx.eval_shape(lambda: Block(cfg, nnx.Rngs(0))))[0]


@functools.partial(jax.jit, static_argnums=0)
def _block(graph: nnx.GraphDef, layer: Layer, x: jax.Array, rope: tuple[jax.Array, jax.Array], mask: jax.Array):
    """Runs one decoder layer, [B, T, D] -> [B, T, D]."""
    return nnx.merge(graph, layer)(x, rope, mask, unconstrained)


@jax.jit
def _logits(x: jax.Array, head: jax.Array) -> jax.Array:
    """Returns float32 logits [P, v] of hidden states [P, D] and head rows [v, D]."""
    return jnp.einsum("pd,vd->pv", x, head.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST)


@dataclasses.dataclass(frozen=True)
class Step:
    """A layer, loaded on demand, and the runs that go through it."""

    load: Callable[[], Layer]
    runs: tuple[Pass, ...]


def stream(steps: Sequence[Step], progress: Callable[[int], None] = lambda n: None) -> None:
    """Takes the runs through the layers, one layer in memory at a time; reports the bytes of each finished layer."""
    for step in steps:
        layer = step.load()
        for run in step.runs:
            run.step(layer)
        progress(sum(x.nbytes for x in layer.values()))
        del layer


@dataclasses.dataclass(frozen=True)
class Distance:
    """Distance between two runs' logits at each of P positions."""

    max_abs: np.ndarray  # [P], over the vocabulary
    kl: np.ndarray  # [P], KL(first || second), nats
    same_top: np.ndarray  # [P] booleans

    def over(self, positions: slice | np.ndarray) -> dict[str, float]:
        """Returns the largest difference, mean KL and share of equal top tokens over some positions."""
        return {
            "max_abs_difference": float(self.max_abs[positions].max()),
            "mean_kl": float(self.kl[positions].mean()),
            "top1_agreement": float(self.same_top[positions].mean()),
        }


def all_logits(run: Pass) -> np.ndarray:
    """Returns float32 logits [P, V] of a run that has passed all layers, for vocabularies that fit in memory."""
    x = run.hidden()
    blocks = row_blocks((run.cfg.vocab_size, run.cfg.hidden_size))
    return np.concatenate([np.asarray(_logits(x, run.model.head(rows))) for rows in blocks], axis=1)


def compare(pairs: Sequence[tuple[Pass, Pass, np.ndarray | slice]]) -> list[Distance]:
    """Computes the distances between pairs of runs that have passed all layers.

    Args:
      pairs: (first, second, positions of the first [P] that match the second's).
    """
    runs = list(dict.fromkeys(run for first, second, _ in pairs for run in (first, second)))
    models = list({id(run.model): run.model for run in runs}.values())
    hidden = {run: run.hidden() for run in runs}
    sums = [_Sums(len(hidden[second])) for _, second, _ in pairs]
    for rows in row_blocks((runs[0].cfg.vocab_size, runs[0].cfg.hidden_size)):
        found: dict[Pass, np.ndarray] = {}
        for model in models:
            head = jnp.asarray(model.head(rows))
            found |= {run: np.asarray(_logits(hidden[run], head)) for run in runs if run.model is model}
            del head
        for (first, second, positions), total in zip(pairs, sums, strict=True):
            total.add(rows.start, found[first][positions], found[second])
    return [total.distance() for total in sums]


class _Sums:
    """Running sums over blocks of the vocabulary, relative to the largest logit so far."""

    def __init__(self, length: int):
        self.max_abs = np.zeros(length)
        self.top = np.full((2, length), -np.inf)  # the largest logit of each
        self.best = np.zeros((2, length), np.int64)  # its token
        self.mass = np.zeros((2, length))  # sum of exp(logit - top)
        self.cross = np.zeros(length)  # sum of exp(first - top) (first - second)

    def add(self, start: int, first: np.ndarray, second: np.ndarray) -> None:
        """Adds logits [P, v] of the tokens from `start` on, in float64."""
        a, b = first.astype(np.float64), second.astype(np.float64)
        gap = a - b
        self.max_abs = np.maximum(self.max_abs, np.abs(gap).max(axis=1))
        for i, x in enumerate((a, b)):
            best = x.argmax(axis=1)
            highest = np.maximum(self.top[i], x.max(axis=1))
            self.best[i] = np.where(x[np.arange(len(x)), best] > self.top[i], start + best, self.best[i])
            shrink = np.exp(self.top[i] - highest)
            x -= highest[:, None]
            np.exp(x, out=x)
            self.mass[i] = self.mass[i] * shrink + x.sum(axis=1)
            if i == 0:
                self.cross = self.cross * shrink + (x * gap).sum(axis=1)
            self.top[i] = highest

    def distance(self) -> Distance:
        log_mass = self.top + np.log(self.mass)
        kl = self.cross / self.mass[0] - log_mass[0] + log_mass[1]
        # Only rounding makes it negative; NaN stays NaN.
        return Distance(self.max_abs, np.maximum(kl, 0.0), self.best[0] == self.best[1])
