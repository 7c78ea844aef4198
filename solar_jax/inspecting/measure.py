"""All measurements of one model, as the JSON of seam.json's `models`."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.lineage import public
from solar_jax.checkpoints.load import load_params
from solar_jax.config import ModelConfig, TrainConfig
from solar_jax.data.pipeline import heldout_batches
from solar_jax.inspecting.ablations import Reruns, Visits, exchanged, first_change, repeats, shared, twin_pairs, without
from solar_jax.inspecting.ancestry import Ancestry, FirstWeights
from solar_jax.inspecting.heldout_text import Sample
from solar_jax.inspecting.statistics import Statistics, Stream, Values
from solar_jax.inspecting.weights import ALL, GROUPS, array_group, moved_from, twin_distances
from solar_jax.model.precision import precision
from solar_jax.model.shapes import layer_axes, param_shapes, parameter_count, size
from solar_jax.parallel import rules
from solar_jax.training.layer_run import LayerRunner, mean_of_rows

ABLATE = ("all", "new", "none")  # which layers are left out, one at a time
_BACKWARD = 3  # layers that a layer's gradient costs
Done = Callable[[int, str], None]  # takes the work done since its last call, and a note


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model that will be measured."""

    name: str
    checkpoint: Checkpoint
    ancestry: Ancestry
    start: FirstWeights
    ablate: str = "all"  # a name in `ABLATE`

    @property
    def layers(self) -> int:
        return self.checkpoint.cfg.num_hidden_layers

    @property
    def pairs(self) -> list[tuple[int, int]]:
        return twin_pairs(self.ancestry.layer_map)

    @property
    def blocks(self) -> list[Visits]:
        return repeats(self.ancestry.layer_map)

    @property
    def left_out(self) -> list[int]:
        """The layers that are left out, one at a time."""
        new = self.ancestry.layer_map.new
        return [i for i in range(self.layers) if self.ablate == "all" or (self.ablate == "new" and new[i])]

    def orders(self) -> dict[tuple[Any, ...], list[int]]:
        """Returns the lists of layers whose losses are measured, by what they are."""
        n = self.layers
        found: dict[tuple[Any, ...], list[int]] = {("without", i): without(n, i) for i in self.left_out}
        for block in self.blocks:
            found[("exchanged", block)] = exchanged(n, block)
            found |= {(name, block): shared(n, block, visit) for visit, name in enumerate(("first", "second"))}
            if block.size > 1:
                pairs = zip(*block.visits, strict=True)
                found |= {("twins", i, j): exchanged(n, Visits(i, j, 1)) for i, j in pairs}
        return found

    def work(self) -> int:
        """Returns the work of `measured`, in layers run; reading weights counts as one each."""
        lists = self.orders().values()
        runs = sum(len(order) - first_change(order) for order in lists)
        weights = len(self.pairs) + (self.layers if self.start.checkpoint else 0)
        logits = (len(lists) + 1 + self.layers + 1) * self.head_work  # of the lists, the model itself, and the lens
        return runs + weights + logits + (2 + _BACKWARD) * self.layers

    @property
    def head_work(self) -> int:
        """The layers that one computation of logits costs, at least 1."""
        cfg = self.checkpoint.cfg
        of_layer = sum(size(cfg, letters) for letters in layer_axes(cfg).values())
        return max(1, round(size(cfg, "DV") / of_layer))


@functools.cache  # models of one shape share what is compiled
def _programs(cfg: ModelConfig, train: TrainConfig, length: int, mesh: jax.sharding.Mesh) -> Statistics:
    return Statistics(LayerRunner(cfg, train, length, mesh))


def measured(one: Subject, sample: Sample, train: TrainConfig, mesh: jax.sharding.Mesh, done: Done) -> dict[str, Any]:
    """Measures a model and returns JSON; its weights are on the devices only meanwhile.

    Args:
      one: the model.
      sample: rows to measure on.
      train: precision and attention.
      mesh: of parameters and rows.
      done: called with the work done since its last call, in the unit of `Subject.work`.
    """
    c, layer_map = one.checkpoint, one.ancestry.layer_map
    weights = precision(train).weights
    dtypes = jax.tree.map(lambda s: s.dtype, param_shapes(c.cfg, weights))
    params = load_params(c, rules.parameter_shardings(c.cfg, mesh), dtypes)
    rows = len(sample.rows)
    batch = heldout_batches(sample.rows, rules.padded_rows(rows, mesh), rules.batch_sharding(mesh))[0]
    statistics = _programs(c.cfg, train, len(sample.rows[0]["tokens"]), mesh)
    stream = statistics.stream(params, batch)
    done(2 * one.layers, "stream")
    lens = statistics.lens(params, batch, stream.inputs)
    done(one.head_work * (one.layers + 1), "lens")
    gradients = statistics.gradients(params, batch, stream.inputs)
    done(_BACKWARD * one.layers, "gradients")
    counted = np.stack([row["weights"] for row in sample.rows])
    return {
        "name": one.name,
        "where": public(c.where),
        "layers": one.layers,
        "parameters": parameter_count(c.cfg),
        "layer_map": {
            "operator": layer_map.operator,
            "base_layers": layer_map.base_layers,
            "source": list(layer_map.source),
            "partner": None if layer_map.partner == layer_map.source else list(layer_map.partner),
            "scale": None if set(layer_map.scale) == {1.0} else list(layer_map.scale),
            "new": [i for i, new in enumerate(layer_map.new) if new],
            "seams": list(layer_map.seams),
            "notes": list(one.ancestry.notes),
        },
        **_losses(one, Reruns(statistics.runner, params, batch, stream.inputs), rows, done),
        "stream": _stream_json(stream, counted),
        "lens": {name: [_mean(x, counted) for x in values] for name, values in lens.items()},
        "gradients": _gradient_json(gradients),
        "seams": _seams(one, statistics, stream, counted),
        "twins": {"pairs": [list(pair) for pair in one.pairs], **twin_distances(c, one.pairs, done)},
        "moved": _moved(one, done),
    }  # fmt: skip


def _mean(x: np.ndarray, counted: np.ndarray) -> float:
    """The mean over the tokens of real rows, [B, T] by weights [rows, T]."""
    return float(np.average(np.asarray(x[: len(counted)], np.float64), weights=counted))


def _median(x: np.ndarray, counted: np.ndarray) -> float:
    return float(np.median(x[: len(counted)][counted > 0]))


def _stream_json(stream: Stream, counted: np.ndarray) -> dict[str, list[float]]:
    found = {
        name: [_mean(x, counted) for x in getattr(stream, name)] for name in ("norm", "cosine", "attention", "mlp")
    }
    return found | {"norm_median": [_median(x, counted) for x in stream.norm]}


def _gradient_json(gradients: Values) -> dict[str, list[float]]:
    """Norms by array, and of the arrays of each group together."""
    squares = {name: np.asarray(x, np.float64) ** 2 for name, x in gradients.items() if name != "stream"}
    groups = {group: [x for name, x in squares.items() if array_group(name) == group] for group in GROUPS}
    groups[ALL] = list(squares.values())
    sums = {name: np.sqrt(np.sum(found, axis=0)) for name, found in groups.items()}
    return {name: [float(v) for v in x] for name, x in (dict(gradients) | sums).items()}


def _losses(one: Subject, reruns: Reruns, rows: int, done: Done) -> dict[str, Any]:
    """Losses of the model as it is and with other lists of layers, paired by row."""
    orders = one.orders()
    base, *others = reruns.all_losses(
        [list(range(one.layers)), *orders.values()], lambda n, note: done(n + one.head_work, note)
    )
    found = dict(zip(orders, others, strict=True))
    new = one.ancestry.layer_map.new

    def change(key: tuple[Any, ...]) -> dict[str, float | None]:
        difference, error = mean_of_rows(found[key] - base, rows)
        return {"loss": mean_of_rows(found[key], rows)[0], "difference": difference, "error": error}

    mean, error = mean_of_rows(base, rows)
    return {
        "loss": {"mean": mean, "error": error, "rows": [float(x) for x in base[:rows]]},
        "without": [{"layer": i, "new": new[i], **change(("without", i))} for i in one.left_out],
        "exchanged_twins": [
            {"layers": [i, j], **change(("exchanged", Visits(i, j, 1)) if ("twins", i, j) not in found
                                        else ("twins", i, j))}
            for i, j in one.pairs
        ],
        "blocks": [
            {"first": block.visits[0], "second": block.visits[1], "exchanged": change(("exchanged", block)),
             "first_twice": change(("first", block)), "second_twice": change(("second", block))}
            for block in one.blocks
        ],
    }  # fmt: skip


def _seams(one: Subject, statistics: Statistics, stream: Stream, counted: np.ndarray) -> list[dict[str, Any]]:
    """Input of a layer after a seam, next to that of its earlier twin."""
    layer_map, earlier, found = one.ancestry.layer_map, {j: i for i, j in one.pairs}, []
    for at in layer_map.seams:
        layer = at + 1
        seam: dict[str, Any] = {"after": at, "source": [layer_map.source[at], layer_map.source[layer]], "twin": None}
        if (twin := earlier.get(layer)) is not None:
            norms = [_median(stream.norm[i], counted) for i in (layer, twin)]
            cosine = _mean(statistics.alignment(stream.inputs, layer, twin), counted)
            seam |= {"twin": twin, "norm_ratio": norms[0] / norms[1], "input_cosine": cosine}
        found.append(seam)
    return found


def _moved(one: Subject, done: Done) -> dict[str, Any]:
    if one.start.checkpoint is None:
        return {"left_out": one.start.said}
    return {"from": one.start.said, **moved_from(one.checkpoint, one.start.checkpoint, done)}


def paired_with_first(models: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the differences of the other models' losses from the first one's, paired by row."""
    first, *others = models
    found = []
    for other in others:
        rows = np.subtract(other["loss"]["rows"], first["loss"]["rows"])
        difference, error = mean_of_rows(rows, len(rows))
        found.append({"model": other["name"], "minus": first["name"], "difference": difference, "error": error})
    return found
