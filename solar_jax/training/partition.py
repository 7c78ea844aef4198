"""Trained and frozen parts of a model: only the trained part has gradients, optimiser state and reductions.

The state keeps every parameter in one stacked tree, whatever trains. A step takes the trained part out of it,
differentiates with respect to that part alone, and puts the result back in place.
"""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from solar_jax.config import LoraConfig, ModelConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import LayerMap
from solar_jax.model.lora import adapter_shapes, merged_layers, scale
from solar_jax.model.precision import Precision
from solar_jax.model.shapes import Params, param_shapes

OTHERS = ("embed", "final_norm", "lm_head")  # the arrays outside the layers
MOST_SEGMENTS = 4  # scans written one after another; longer patterns are searched for a repetition

# config.train.trainable -> (which layers train, which arrays outside the layers train)
TRAINABLE: dict[str, Callable[[LayerMap], tuple[tuple[bool, ...], tuple[str, ...]]]] = {
    "all": lambda layer_map: ((True,) * layer_map.layers, OTHERS),
    "new": lambda layer_map: (layer_map.new, ()),
    "seam": lambda layer_map: (
        tuple(i in layer_map.seams or i - 1 in layer_map.seams for i in range(layer_map.layers)),
        (),
    ),
    "no_embed": lambda layer_map: ((True,) * layer_map.layers, ("final_norm",)),
    "router": lambda layer_map: ((True,) * layer_map.layers, ()),
    "experts": lambda layer_map: ((True,) * layer_map.layers, ()),
}
# Of those, the arrays of a layer that train; all of them where there is no entry
ARRAYS = {"router": ("router",), "experts": ("router", "experts_gate", "experts_up", "experts_down")}


@dataclasses.dataclass(frozen=True)
class Partition:
    """Which parameters train."""

    layers: tuple[bool, ...]  # [L]
    others: tuple[str, ...] = OTHERS  # names of arrays outside the layers
    lora: LoraConfig | None = None  # adapters of those layers train, in place of any parameter of the model
    tied: tuple[int, ...] = ()  # [L], layers of one number share their weights; (): none do
    rates: tuple[float, ...] = ()  # [L], factors of the layers' learning rates; (): all 1
    arrays: tuple[str, ...] = ()  # names of the layers' arrays that train; (): all

    @property
    def count(self) -> int:
        """Layers that train."""
        return sum(self.layers)

    def trains_head(self, cfg: ModelConfig) -> bool:
        """True if the output projection trains, which is the embedding where they are tied."""
        return ("embed" if cfg.tie_word_embeddings else "lm_head") in self.others

    def parameter_count(self, cfg: ModelConfig) -> int:
        """Parameters that train."""
        return sum(s.size for s in jax.tree.leaves(self.shapes(cfg)))

    def base_dtype(self, policy: Precision) -> str:
        """The dtype of the model's matrices: what only adapters train needs no wider copy than matmuls take."""
        return policy.weights if self.lora is None else policy.compute

    @property
    def first(self) -> int:
        """The lowest layer that a gradient reaches: 0 where the embedding trains."""
        return 0 if "embed" in self.others else self.layers.index(True)

    def keys(self, tree: Params) -> Params:
        """The entries of a parameters' tree that train, with all their layers."""
        if self.lora is not None:
            return {"lora": tree["lora"]}
        found = {name: x for name, x in tree.items() if name == "layers" or name in self.others}
        return found if not self.arrays else found | {"layers": {name: found["layers"][name] for name in self.arrays}}

    def trained(self, params: Params) -> Params:
        """The trained part of the parameters; `layers` arrays are [trained layers, ...]."""
        if self.lora is not None or all(self.layers):
            return self.keys(params)
        return self.keys(params) | {"layers": self.taken(params["layers"])}

    def saved(self, params: Params) -> Params:
        """The part of the parameters that a checkpoint holds: all of them, or the adapter."""
        return params if self.lora is None else self.keys(params)

    def shapes(self, cfg: ModelConfig, weights: str = "float32") -> Params:
        """Abstract arrays of the trained part, with matrices of dtype `weights`."""
        if self.lora is not None:
            return {"lora": adapter_shapes(cfg, self.lora, self.count, weights)}
        shapes = param_shapes(cfg, weights)
        if self.arrays and not cfg.num_local_experts:
            raise UserError("config.train.trainable router and experts need a model of experts, found a dense one.")
        shapes = self.keys(shapes)
        cut = {k: jax.ShapeDtypeStruct((self.count, *s.shape[1:]), s.dtype) for k, s in shapes["layers"].items()}
        return shapes | {"layers": cut}

    def config(self, cfg: ModelConfig) -> ModelConfig:
        """A config whose layer count is that of the trained part."""
        return dataclasses.replace(cfg, num_hidden_layers=self.count)

    def replaced(self, params: Params, trained: Params) -> Params:
        """The parameters with their trained part replaced; in place where the old parameters are donated."""
        if self.arrays:
            return params | trained | {"layers": params["layers"] | trained["layers"]}
        if self.lora is not None or all(self.layers):
            return params | trained
        index = self._index()

        def put(x: jax.Array, part: jax.Array) -> jax.Array:
            return x.at[index].set(part)

        return params | trained | {"layers": jax.tree.map(put, params["layers"], trained["layers"])}

    def merged(self, params: Params, trained: Params) -> Params:
        """Parameters for `model.llama.hidden` that depend on `trained` alone; `layers` are stacks run in order.

        Frozen layers are in stacks of their own, so that no gradient of theirs is computed.
        """
        frozen = jax.lax.stop_gradient({name: x for name, x in params.items() if name not in trained})
        if self.lora is not None:
            return frozen | {"layers": self._adapted(frozen["layers"], trained["lora"], scale(self.lora))}
        if self.arrays:
            return frozen | trained | {"layers": jax.lax.stop_gradient(params["layers"]) | trained["layers"]}
        if all(self.layers):
            return frozen | trained
        return frozen | trained | {"layers": self._stacks(jax.lax.stop_gradient(params["layers"]), trained["layers"])}

    def shared(self, grads: Params) -> Params:
        """Gradients of layers that share weights: their sum over the root of their number, for each of them.

        Layers that start equal then stay equal, the global norm is that of the shared weights, and the optimisers
        are invariant to a constant factor of a gradient.
        """
        if not self.tied:
            return grads
        groups = np.unique(self.tied, return_inverse=True)[1]
        root = np.sqrt(np.bincount(groups))[groups]

        def one(g: jax.Array) -> jax.Array:
            total = jax.ops.segment_sum(g, groups, num_segments=int(groups.max()) + 1)[groups]
            return total / root.reshape(-1, *(1,) * (g.ndim - 1)).astype(g.dtype)

        return grads | {"layers": jax.tree.map(one, grads["layers"])}

    def paced(self, updates: Params) -> Params:
        """Updates times their layers' factors of the learning rate."""
        if not self.rates or self.lora is not None:
            return updates
        factors = np.asarray(self.rates, np.float32)[np.flatnonzero(self.layers)]

        def one(u: jax.Array) -> jax.Array:
            return u * factors.reshape(-1, *(1,) * (u.ndim - 1)).astype(u.dtype)

        return updates | {"layers": jax.tree.map(one, updates["layers"])}

    def whole(self, params: Params) -> Params:
        """The model's stacked state, with an adapter merged into its weights."""
        if self.lora is None:
            return params
        layers = merged_layers(params["layers"], params["lora"], scale(self.lora), self._index())
        return {name: x for name, x in params.items() if name != "lora"} | {"layers": layers}

    def follow(self, x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        """The trained layers of an array that may have all of them, as an optimiser's state of an older run does."""
        return self._taken(x) if x.shape != like.shape and x.shape[:1] == (len(self.layers),) else x

    def _index(self) -> Any:
        at = np.flatnonzero(self.layers)
        return slice(int(at[0]), int(at[-1]) + 1) if at[-1] - at[0] + 1 == len(at) else at

    def taken(self, layers: Params) -> Params:
        """The arrays of the layers that train."""
        return jax.tree.map(self._taken, layers)

    def _taken(self, x: jax.Array) -> jax.Array:
        return x[self._index()]

    def segments(self) -> list[tuple[bool, int]]:
        """(whether it trains, layers) of consecutive layers that train alike."""
        return [(trains, len(list(run))) for trains, run in itertools.groupby(self.layers)]

    def _adapted(self, layers: Params, adapter: Params, factor: float) -> Any:
        """The layers with the adapters of those that have one; B carries the scale."""
        of = {name: x * factor if name.endswith("_lora_b") else x for name, x in adapter.items()}
        if all(self.layers):
            return layers | {"adapters": of}
        at, done, stacks = 0, 0, []
        for trains, n in self.segments():
            stack = {name: x[at : at + n] for name, x in layers.items()}
            if trains:
                stack |= {"adapters": {name: x[done : done + n] for name, x in of.items()}}
            stacks.append(stack)
            at, done = at + n, done + n * trains
        return tuple(stacks)

    def _stacks(self, frozen: Params, trained: Params) -> tuple[Any, ...]:
        """The layers as stacks in order: [n, ...] of one kind, or a tuple of two kinds [repeats, n, ...] in turns."""
        runs, stacks, layer, taken = self.segments(), [], 0, 0  # taken: trained layers that are in a stack
        if len(runs) > MOST_SEGMENTS:
            pairs = list(zip(runs[::2], runs[1::2], strict=False))
            repeats = len(list(itertools.takewhile(lambda pair: pair == pairs[0], pairs)))
            layer, taken = repeats * (runs[0][1] + runs[1][1]), repeats * sum(n for trains, n in runs[:2] if trains)
            still = np.flatnonzero(np.logical_not(self.layers[:layer]))
            whole = {True: jax.tree.map(lambda x: x[:taken], trained), False: jax.tree.map(lambda x: x[still], frozen)}
            turns = [
                jax.tree.map(lambda x, n=n: x.reshape(repeats, n, *x.shape[1:]), whole[trains])
                for trains, n in runs[:2]
            ]
            stacks.append(tuple(turns))
            runs = runs[2 * repeats :]
        for trains, n in runs:
            source, begin = (trained, taken) if trains else (frozen, layer)
            stacks.append(jax.tree.map(lambda x, a=begin, n=n: x[a : a + n], source))
            layer, taken = layer + n, taken + n * trains
        return tuple(stacks)


def make_partition(name: str, layer_map: LayerMap, lora: LoraConfig | None = None, new_rate: float = 1.0) -> Partition:
    """The partition that `config.train.trainable` names; with a rank in `lora`, adapters of its layers.

    Raises:
      UserError: no such choice, or one that leaves nothing to train, or that unties layers.
    """
    if name not in TRAINABLE:
        raise UserError(f"config.train.trainable must be one of {', '.join(TRAINABLE)}, found {name!r}.")
    layers, others = TRAINABLE[name](layer_map)
    if not any(layers):
        raise UserError(
            f"config.train.trainable={name!r} leaves nothing to train: {layer_map.operator} has no such layer."
        )
    adapted = lora is not None and lora.rank > 0
    if layer_map.tied and (adapted or not all(layers)):
        raise UserError(
            f"config.growth.operator={layer_map.operator} shares weights between all layers of one source, so "
            f"config.train.trainable must be all or no_embed without config.lora.rank, found {name!r}."
        )
    if adapted:
        return Partition(layers, (), lora)
    rates = () if new_rate == 1.0 else tuple(new_rate if new else 1.0 for new in layer_map.new)
    return Partition(layers, others, None, layer_map.source if layer_map.tied else (), rates, ARRAYS.get(name, ()))


def everything(cfg: ModelConfig) -> Partition:
    """The partition in which every parameter trains."""
    return Partition((True,) * cfg.num_hidden_layers)
