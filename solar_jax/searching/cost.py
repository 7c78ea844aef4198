"""Predicted cost of a search on a slice, and the mesh that it runs on; from shapes, without weights."""

import dataclasses
import itertools
import math

from jax.sharding import AbstractMesh

from solar_jax.config import MeshConfig, ModelConfig
from solar_jax.errors import UserError
from solar_jax.model.shapes import is_vector, layer_axes, parameter_count, size
from solar_jax.parallel.mesh import axis_size
from solar_jax.parallel.rules import PARAMETERS, padded_rows, parameter_shardings, ways
from solar_jax.planning.hlo_cost import KERNEL_RATE
from solar_jax.planning.memory import GIB
from solar_jax.planning.search import SPARE, Devices
from solar_jax.planning.step_time import FLOAT32_PASSES

_VALUES = {"D": 12, "N": 4, "F": 4}  # activations that a layer reads and writes a token, in units of D, N H and F
_LOGIT_BYTES = 12  # a logit is written, read for its maximum and read for the sum, in float32


@dataclasses.dataclass(frozen=True)
class SearchCost:
    """Prediction of a search."""

    config: MeshConfig
    mesh: AbstractMesh
    layer: float  # seconds; NaN where the chip is unknown, as in the next of one layer over the search text
    head: float  # seconds of the output projection over it
    layers: float  # layer forwards, output projections left out
    cuts: float  # output projections
    bytes: float  # on a device: weights, layer inputs, logits

    @property
    def seconds(self) -> float:
        return self.layers * self.layer + self.cuts * self.head

    def __str__(self) -> str:
        mesh = " x ".join(f"{axis} {size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        memory = f"{self.bytes / GIB:.1f} GiB a device"
        if math.isnan(self.layer):
            return f"{mesh}: about {self.layers:,.0f} layer forwards and {self.cuts:,.0f} output projections; {memory}"
        return (
            f"{mesh}: about {self.layers:,.0f} layer forwards of {1e3 * self.layer:.2f} ms and {self.cuts:,.0f} output "
            f"projections of {1e3 * self.head:.2f} ms = {self.seconds:,.1f} s and compilation; "
            f"{memory}"
        )


def search_meshes(devices: Devices) -> list[MeshConfig]:
    """Returns every split of the devices over data, fsdp and tensor, most fsdp first."""
    sizes = [k for k in range(1, devices.count + 1) if devices.count % k == 0]
    found = [
        MeshConfig(data=data, fsdp=devices.count // (data * tensor), tensor=tensor, context=1)
        for data, tensor in itertools.product(sizes, sizes)
        if devices.count % (data * tensor) == 0 and devices.slices == 1
    ]
    return sorted(found, key=lambda m: (m.tensor, m.data)) or [MeshConfig()]


def search_cost(
    cfg: ModelConfig, devices: Devices, *, rows: int, length: int, forwards: float, width: int
) -> SearchCost:
    """Predicts a search on the mesh that is fastest and fits, or the first that fits where the chip is unknown.

    A layer takes the longer of its matmuls (2 FLOPs a weight and token) and kernels, of its weights and activations
    through HBM, and of its collectives: weights gathered over fsdp, two all-reduces of [t, D] over tensor.

    Args:
      cfg: the base.
      devices: of the search.
      rows, length: of the search text.
      forwards: budget in forwards of the base.
      width: bytes of a weight and an activation.

    Raises:
      UserError: no mesh fits the model, or none the devices' memory.
    """
    refused, options = None, []
    for config in search_meshes(devices):
        mesh = devices.mesh(config)
        try:
            parameter_shardings(cfg, mesh)
        except UserError as e:
            refused = refused or e
            continue
        options.append(_cost(cfg, devices, config, rows, length, forwards, width))
    if not options:
        raise refused or UserError(f"no mesh of {devices.count} devices fits the model.")
    fitting = [o for o in options if o.bytes <= (1 - SPARE) * devices.memory]
    if not fitting:
        least = min(o.bytes for o in options)
        raise UserError(
            f"a search of {parameter_count(cfg):,} parameters needs at least {least / GIB:.1f} GiB a device, but each "
            f"of the {devices.count} {devices.kind} device(s) has {devices.memory / GIB:.1f} GiB."
        )
    return min(fitting, key=lambda o: o.seconds) if devices.chip else fitting[0]


def _cost(
    cfg: ModelConfig, devices: Devices, config: MeshConfig, rows: int, length: int, forwards: float, width: int
) -> SearchCost:
    mesh = devices.mesh(config)
    D, NH, F = cfg.hidden_size, size(cfg, "NH"), cfg.intermediate_size
    tensor, shards = axis_size(mesh, "tensor"), ways("D", PARAMETERS, mesh)
    sharing = axis_size(mesh, "slice", "data", "fsdp", "expert", "context")
    t = padded_rows(rows, mesh) * length / sharing  # tokens of a device
    weights = sum(size(cfg, letters) for name, letters in layer_axes(cfg).items() if not is_vector(name)) / tensor
    head = size(cfg, "DV") / tensor
    n, logits = cfg.num_hidden_layers, t * cfg.vocab_size / tensor
    memory = width * (parameter_count(cfg) / (shards * tensor) + weights + head + (n + 2) * t * D)
    memory += 3 * 4 * min(logits, 2**26)
    layer = out = math.nan
    if (chip := devices.chip) is not None:
        rate = chip.matmul_rate * chip.peak / (FLOAT32_PASSES if width == 4 else 1)
        values = _VALUES["D"] * D + (_VALUES["N"] * NH + _VALUES["F"] * F) / tensor
        kernels = 4 * t * NH / tensor * min(length / 2, cfg.sliding_window or length) / (KERNEL_RATE * chip.peak)
        gathers = width * weights * (shards > 1)
        reduces = 2 * 2 * t * D * width * (tensor > 1)
        layer = max(
            2 * t * weights / rate + kernels, width * (weights + t * values) / chip.bandwidth,
            (gathers + reduces) / chip.links,
        )  # fmt: skip
        out = max(
            2 * t * head / rate, (width * head + _LOGIT_BYTES * logits) / chip.bandwidth,
            width * head * (shards > 1) / chip.links,
        )  # fmt: skip
    own = size(cfg, "DV") / (weights * tensor)  # layers that count as much as the output projection in the budget
    budget = forwards * (n + own)
    cuts = budget / (_PART * n + own)
    return SearchCost(config, mesh, layer, out, n + cuts * _PART * n, cuts, memory)


# Layers that a cut costs on average, of n: [a, b) repeated costs n - a, and blocks begin at n / 4 on average.
_PART = 0.75
