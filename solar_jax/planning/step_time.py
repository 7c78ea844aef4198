"""Estimates a training step's time on a TPU from shapes alone, for planning without a compiler."""

import dataclasses
import math

import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh

from solar_jax.config import ModelConfig, TrainConfig
from solar_jax.hardware.chips import OFFLOADED_EXPOSED, Chip
from solar_jax.model.lora import INPUTS
from solar_jax.model.precision import compute_dtype, precision
from solar_jax.model.quantised import NARROW_KINDS, NarrowKind
from solar_jax.model.remat import OFFLOADED, REMAT, SAVEABLE
from solar_jax.model.shapes import is_vector, layer_axes, size
from solar_jax.parallel.mesh import axis_size
from solar_jax.parallel.rules import ACTIVATIONS, PARAMETERS, padded_rows, ways
from solar_jax.planning.hlo_cost import FLOAT32_PASSES, HOST, KERNEL_RATE
from solar_jax.planning.memory import each, expert_rows
from solar_jax.training.partition import Partition, everything
from solar_jax.training.step import loss_chunks

BACKWARD_KERNEL = 2.5  # FLOPs of the attention kernel's backward pass, in units of its forward pass
# Axes of the weight whose matmul gives a value of `SAVEABLE`: recomputed if a policy does not save the value.
_WEIGHT = {"q": "DNH", "k": "DKH", "v": "DKH", "mid": "NHD", "gate": "DF", "up": "DF"}
_PROJECTION = {"mid": "o"}  # value of `SAVEABLE` -> projection that gives it, where the name is another
# Added to the time of matmuls for each doubling of tensor: they are narrower, and attention's weights are not gathered
# as one. Fitted to SOLAR 10.7B on v6e-256, fsdp 128 x tensor 2: 0.742 s by the compiler's schedule.
_TENSOR = 0.15
# Values per token and layer that move between a device and its HBM outside of matmuls and kernels, by last axes: norms,
# residual sums, rotary embeddings, transposes, SwiGLU and what gathers them. Fitted to what the TPU compiler reports.
_VECTORS = {"D": 22.0, "NH": 14.0, "KH": 14.0, "F": 8.0}
# What each row of the experts' matmuls adds to that: nothing is fused into their kernels, neither SwiGLU nor the
# writing of saved values. Fitted likewise, to Mistral 7B as 8 experts on v5p-128.
_EXPERT_ROW = {"D": 60.0, "F": 28.0}
# Bytes per value of the embedding, where it or the output projection trains: XLA copies them between layouts and adds
# up the embedding's gradient, at an eighth of the bandwidth. Fitted to Llama-3.2-1B on v5e-16 and SOLAR on v5p-128.
_EMBEDDING = 48.0
# What 8-bit matmuls add to that: scales, rounding, and fusions that they prevent. Fitted likewise, to v5p, v5e and v6e.
_ROUNDED = {"D": 30.0, "F": 30.0}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one device; the first three run in sequence, host and some of links beside them."""

    matmuls: float
    kernels: float
    vectors: float
    links: float  # collectives over ICI, within a slice
    host: float  # copies to host memory and back
    network: float  # collectives over DCN, between slices, after everything else
    exposed: float = 0.0  # share of links that the first three wait for

    @property
    def total(self) -> float:
        """The step's seconds."""
        work = self.matmuls + self.kernels + self.vectors
        return max(work + self.exposed * self.links, self.links, self.host) + self.network


def tokens_a_device(train: TrainConfig, length: int, mesh: Mesh | AbstractMesh) -> float:
    """Returns the tokens of a step that one device works on, padding rows included, shared with its tensor group."""
    rows = padded_rows(train.batch_size, mesh, train.accumulation)
    return rows * length / (axis_size(mesh, "slice") * ways("BT", ACTIVATIONS, mesh))


def step_time(
    cfg: ModelConfig,
    train: TrainConfig,
    length: int,
    mesh: Mesh | AbstractMesh,
    chip: Chip,
    partition: Partition | None = None,
) -> StepTime:
    """Estimates the step time; t is a device's tokens, `/ tensor` the share of heads, mlp and vocabulary.

      matmuls  [3 x 2 x weights + 2 x weights that remat recomputes with] x t / tensor, at the chip's matmul rate, and
               `_TENSOR` more for each doubling of tensor;
               the loss recomputes nothing; six times as long in float32; those of 8-bit operands at their own rate
               of experts, those of a token alone
      kernels  4 N H keys t / tensor per layer, times 1 + 2.5, plus 1 if attention is not saved, at half the peak;
               keys are T / 2, at most the sliding window; six times as long in float32. Without kernels the same,
               as matmuls.
      vectors  `_VECTORS` per token and layer, `_EXPERT_ROW` for each of its experts, and `_ROUNDED` in 8 bits;
               parameters, moments and gradients that the optimiser reads and writes; with microbatches, their sum read
               and written; at HBM bandwidth; `_EMBEDDING`; and what the sum of the output projection's gradient, read
               and written once a chunk of the loss, takes longer than that chunk's matmul
      links    per microbatch, a layer's weights gathered twice, those of 8 bits in one byte, and their gradients
               scattered once, in the compute dtype, or all-reduced: `Chip.reduce_factor`; the embedding and the output
               projection the same, once; over tensor, four all-reduces of [t, D] per layer, a fifth if `mid` is not
               saved; over context, keys and values gathered and their gradients scattered; over data, an all-reduce
               of the gradients. An all-reduce moves its bytes twice. `Chip.exposed` of all that is not hidden.
      host     what the policy offloads to host memory, there and back
      network  an all-reduce of the float32 gradients over n slices: a device sends 2 (n - 1) / n of its bytes

    Args:
      cfg: the grown model.
      train: the run's, with a remat policy of `REMAT`.
      length: T.
      mesh: of devices that need not exist.
      chip: of the mesh's devices.
      partition: which parameters train; all if None. A frozen layer has no weight gradients, and a layer below the
        first that trains has no backward pass.
    """
    partition = partition or everything(cfg)
    behind = cfg.num_hidden_layers - partition.first  # layers with a backward pass
    t, width, L = tokens_a_device(train, length, mesh), compute_dtype(train).itemsize, cfg.num_hidden_layers
    tensor, slices = axis_size(mesh, "tensor"), axis_size(mesh, "slice")
    names = REMAT[train.remat]
    offloaded = OFFLOADED.get(train.remat, ())
    again = [] if names is None else [name for name in SAVEABLE if name not in (*names, *offloaded)]

    parts = {name: size(cfg, letters) for name, letters in layer_axes(cfg).items() if not is_vector(name)}
    experts = sum(n for name, n in parts.items() if name.startswith("experts_"))
    used = cfg.num_experts_per_tok if experts else 1  # MLPs that a token goes through
    idle = experts * (1 - used / cfg.num_local_experts) if experts else 0
    weights = sum(parts.values())
    through = {"gate": used, "up": used}
    repeated = sum(size(cfg, _WEIGHT[name]) * through.get(name, 1) for name in again if name in _WEIGHT)
    head = size(cfg, "DV")
    differentiated = partition.count if partition.lora is None else 0  # layers whose own weights have gradients
    per_layer = 2 * L + 2 * behind + 2 * differentiated
    head_passes = 4 + 2 * partition.trains_head(cfg)
    matmul_flops = t / tensor * (per_layer * (weights - idle) + 2 * behind * repeated + head_passes * head)
    narrow = 0  # weights of a layer that have 8 bits
    kind = NARROW_KINDS.get(precision(train).projections)
    if kind:
        of = {name: parts[f"{name}_proj"] for name in INPUTS if f"{name}_proj" in parts}
        narrow = sum(of.values())
        narrow_again = sum(of.get(_PROJECTION.get(name, name), 0) for name in again)
        gradients = sum(of.get(name, 0) for name in kind.weight_gradients)
        narrow_flops = 2 * (L + behind) * narrow + 2 * behind * narrow_again + 2 * differentiated * gradients
        matmul_flops -= t / tensor * narrow_flops * (1 - 1 / _rate(kind, chip))

    keys = length / 2
    keys = min(keys, cfg.sliding_window or keys)
    passes = L + behind * (BACKWARD_KERNEL + ("attention" in again))
    kernel_flops = t / tensor * 4 * size(cfg, "NH") * keys * passes

    values = sum(count * each(cfg, mesh, letters) for letters, count in _VECTORS.items())
    if experts:
        values += expert_rows(cfg, mesh) * sum(
            n * size(cfg, x) / ways(x, ACTIVATIONS, mesh) for x, n in _EXPERT_ROW.items()
        )
    if kind and kind.activations:
        values += sum(count * each(cfg, mesh, letters) for letters, count in _ROUNDED.items())
    state = partition.parameter_count(cfg) / ways("DF", PARAMETERS, mesh)  # of what trains
    count, times = train.accumulation, FLOAT32_PASSES if width == 4 else 1
    vector_bytes = t * L * values * width + 4 * (8 + (3 * count if count > 1 else 0)) * state

    outside = "embed" in partition.others or partition.trains_head(cfg)
    vector_bytes += _EMBEDDING * head / tensor if outside else 0
    summed = 0.0  # seconds
    if partition.trains_head(cfg):
        chunks = loss_chunks(round(t / count * each(cfg, mesh, "V")), length)
        product = 2 * t / count / chunks / (chip.matmul_rate * chip.peak)
        summed = count * chunks * head / tensor * max(0.0, 8 / chip.bandwidth - product)

    return StepTime(
        matmuls=times * matmul_flops * (1 + _TENSOR * math.log2(tensor)) / (chip.matmul_rate * chip.peak),
        kernels=times * kernel_flops / (KERNEL_RATE * chip.peak),
        vectors=vector_bytes / chip.bandwidth + summed,
        links=_ici_bytes(
            cfg,
            train.accumulation,
            mesh,
            t,
            weights - experts * (1 - 1 / axis_size(mesh, "expert")),
            narrow,
            width,
            "mid" in again,
            partition,
            chip.reduce_factor,
        )
        / chip.links,
        host=2 * t * behind * width * sum(each(cfg, mesh, SAVEABLE[name]) for name in offloaded) / HOST,
        network=2 * (slices - 1) / slices * 4 * state / chip.network,
        exposed=OFFLOADED_EXPOSED if train.offload_collectives else chip.exposed,
    )


def _rate(kind: NarrowKind, chip: Chip) -> float:
    """Returns the rate of a kind's products next to the compute dtype's."""
    if kind.activations is None:
        return 1.0
    return chip.int8 if jnp.issubdtype(kind.activations, jnp.integer) else chip.fp8


def _ici_bytes(
    cfg: ModelConfig,
    microbatches: int,
    mesh: Mesh | AbstractMesh,
    t: float,
    weights: float,
    narrow: float,
    width: int,
    mid_again: bool,
    partition: Partition,
    reduce_factor: float,
) -> float:
    """Returns the bytes of a device's collectives over ICI, within a slice."""
    L, D = cfg.num_hidden_layers, cfg.hidden_size
    behind = L - partition.first  # layers with a backward pass
    tensor, context = axis_size(mesh, "tensor"), axis_size(mesh, "context")
    shards = ways("D", PARAMETERS, mesh)
    moved = 0.0
    if shards > 1:
        gathered = width * weights - (width - 1) * narrow  # bytes of a layer; 8-bit weights have one each
        moved += microbatches * (L + behind) * gathered / tensor
        moved += reduce_factor * microbatches * (0 if partition.lora else partition.count) * width * weights / tensor
        outside = ("embed" in partition.others) + partition.trains_head(cfg)  # embedding and output projection
        moved += microbatches * (2 * 2 * width + 4 * outside) * size(cfg, "DV") / tensor
    if tensor > 1:
        moved += (2 * L + (3 if mid_again else 2) * behind) * 2 * t * D * width
    if context > 1:
        moved += (L + 2 * behind) * 2 * t * context * size(cfg, "KH") / tensor * width
    if (shared := axis_size(mesh, "expert")) > 1:  # tokens gathered, their float32 sums scattered
        moved += (L + 2 * behind) * t * shared * D * (width + 4)
    if axis_size(mesh, "data") > 1:
        moved += 2 * 4 * partition.parameter_count(cfg) / (shards * tensor)
    return moved
