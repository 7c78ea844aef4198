"""How long a training step takes on a TPU, estimated from shapes alone: what the planner knows without a compiler."""

import dataclasses

from jax.sharding import AbstractMesh, Mesh

from solar_jax.config import Config, ModelConfig
from solar_jax.hardware.chips import Chip
from solar_jax.model.llama import OFFLOADED, REMAT, SAVEABLE
from solar_jax.model.precision import compute_dtype
from solar_jax.model.shapes import is_vector, layer_axes, parameter_count, size
from solar_jax.parallel.mesh import axis_size
from solar_jax.parallel.rules import ACTIVATIONS, PARAMETERS, padded_rows, ways
from solar_jax.planning.hlo_cost import HOST, KERNEL_RATE
from solar_jax.planning.memory import each
from solar_jax.training.partition import Partition, everything

FLOAT32_PASSES = 6  # bfloat16 products that a TPU makes of one in float32 (`Precision.HIGHEST`)
BACKWARD_KERNEL = 2.5  # FLOPs of the attention kernel's backward pass, in units of its forward pass
# Axes of the weight whose product gives a value of `SAVEABLE`: computed again where a policy does not save the value.
_WEIGHT = {"q": "DNH", "k": "DKH", "v": "DKH", "mid": "NHD", "gate": "DF", "up": "DF"}
# Values a token and layer that pass between a device and its HBM outside of matmuls and kernels, by their last axes:
# norms, residual sums, rotations, transposes, SwiGLU and what gathers them. Fitted to what the TPU compiler reports.
_VECTORS = {"D": 22.0, "NH": 14.0, "KH": 14.0, "F": 8.0}


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one step on one device; the first three run one after the other, links and host beside them."""

    matmuls: float
    kernels: float
    vectors: float
    links: float  # collectives within a slice
    host: float  # copies to the host's memory and back
    network: float  # collectives between slices, after everything else

    @property
    def total(self) -> float:
        return max(self.matmuls + self.kernels + self.vectors, self.links, self.host) + self.network


def tokens_a_device(config: Config, mesh: Mesh | AbstractMesh) -> float:
    """Tokens of a step that one device works on, those of empty rows included, shared with its tensor group."""
    rows = padded_rows(config.train.batch_size, mesh, config.train.accumulation)
    return rows * config.data.sequence_length / (axis_size(mesh, "slice") * ways("BT", ACTIVATIONS, mesh))


def step_time(
    cfg: ModelConfig, config: Config, mesh: Mesh | AbstractMesh, chip: Chip, partition: Partition | None = None
) -> StepTime:
    """The estimate; t are the tokens of a device, `/ tensor` the share of them that heads, mlp and vocabulary have.

      matmuls  [3 x 2 x weights + 2 x weights of what remat computes again] x t / tensor, at the chip's matmul rate;
               the loss computes nothing again; in float32 six times as long
      kernels  4 N H keys t / tensor a layer, times 1 + 2.5, and 1 more where attention is not saved, at half the
               peak; keys are T / 2, at most the sliding window. Without kernels the same, as matmuls.
      vectors  `_VECTORS` a token and layer; of the optimiser parameters, moments and gradients read and written;
               of microbatches their sum read and written; at the HBM's bandwidth
      links    a layer's weights gathered twice and their gradients scattered once, in the compute dtype, a
               microbatch; the embedding and the output projection the same once; over tensor four all-reduces of
               [t, D] a layer, a fifth where `mid` is not saved; over context keys and values gathered and their
               gradients scattered; over data an all-reduce of the gradients. An all-reduce moves its bytes twice.
      host     what the policy keeps in the host's memory, there and back
      network  an all-reduce of the float32 gradients between n slices: of its bytes a device sends (n - 1) / n twice

    Args:
      cfg: the grown model.
      config: the run, with a remat policy of `REMAT`.
      mesh: of devices that need not be there.
      chip: of its devices.
      partition: which parameters train; all if None. A frozen layer has no gradient of its weights, and one below the
        first that trains no backward pass.
    """
    partition = partition or everything(cfg)
    behind = cfg.num_hidden_layers - partition.first  # layers with a backward pass
    t, width, L = tokens_a_device(config, mesh), compute_dtype(config.train).itemsize, cfg.num_hidden_layers
    tensor, slices = axis_size(mesh, "tensor"), axis_size(mesh, "slice")
    names = REMAT[config.train.remat]
    offloaded = OFFLOADED.get(config.train.remat, ())
    again = [] if names is None else [name for name in SAVEABLE if name not in (*names, *offloaded)]

    weights = sum(size(cfg, letters) for name, letters in layer_axes(cfg).items() if not is_vector(name))
    repeated = sum(size(cfg, _WEIGHT[name]) for name in again if name in _WEIGHT)
    head = size(cfg, "DV")
    per_layer = 2 * L + 2 * behind + 2 * partition.count
    head_passes = 4 + 2 * (("embed" if cfg.tie_word_embeddings else "lm_head") in partition.others)
    matmul_flops = t / tensor * (per_layer * weights + 2 * behind * repeated + head_passes * head)

    keys = config.data.sequence_length / 2
    keys = min(keys, cfg.sliding_window or keys)
    passes = L + behind * (BACKWARD_KERNEL + ("attention" in again))
    kernel_flops = t / tensor * 4 * size(cfg, "NH") * keys * passes

    values = sum(count * each(cfg, mesh, letters) for letters, count in _VECTORS.items())
    state = parameter_count(cfg) / ways("DF", PARAMETERS, mesh)
    count = config.train.accumulation
    vector_bytes = t * L * values * width + 4 * (8 + (3 * count if count > 1 else 0)) * state

    return StepTime(
        matmuls=(FLOAT32_PASSES if width == 4 else 1) * matmul_flops / (chip.matmul_rate * chip.peak),
        kernels=kernel_flops / (KERNEL_RATE * chip.peak),
        vectors=vector_bytes / chip.bandwidth,
        links=_link_bytes(cfg, config, mesh, t, weights, width, "mid" in again) / chip.links,
        host=2 * t * L * width * sum(each(cfg, mesh, SAVEABLE[name]) for name in offloaded) / HOST,
        network=2 * (slices - 1) / slices * 4 * state / chip.network,
    )


def _link_bytes(
    cfg: ModelConfig, config: Config, mesh: Mesh | AbstractMesh, t: float, weights: int, width: int, mid_again: bool
) -> float:
    """Bytes of a device's collectives within a slice."""
    L, D = cfg.num_hidden_layers, cfg.hidden_size
    tensor, context = axis_size(mesh, "tensor"), axis_size(mesh, "context")
    shards = ways("D", PARAMETERS, mesh)
    moved = 0.0
    if shards > 1:
        moved += config.train.accumulation * L * 3 * width * weights / tensor
        moved += config.train.accumulation * 2 * (2 * width + 4) * size(cfg, "DV") / tensor
    if tensor > 1:
        moved += L * (5 if mid_again else 4) * 2 * t * D * width
    if context > 1:
        moved += L * 2 * 3 * t * context * size(cfg, "KH") / tensor * width
    if axis_size(mesh, "data") > 1:
        moved += 2 * 4 * parameter_count(cfg) / (shards * tensor)
    return moved
