"""Single table that maps our arrays to the tensors of Hugging Face and GGUF files, for both directions.

A torch linear layer stores [out, in]. Our arrays have contracted axes first and heads on an axis of their own, so each
conversion is a reshape and a transpose, never arithmetic: a round trip is bit-exact.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from solar_jax.config import ModelConfig
from solar_jax.model.shapes import LAYER_AXES, Params, param_axes, sizes


@dataclasses.dataclass(frozen=True)
class Tensor:
    axes: str  # ours, without L
    hf_axes: tuple[str, ...]  # the file's; letters in one string are merged into one file axis
    hf: str  # name in a Hugging Face checkpoint; {} is the layer
    gguf: str  # name in a GGUF file


TENSORS = {
    "embed": Tensor("VD", ("V", "D"), "model.embed_tokens.weight", "token_embd.weight"),
    "layers/q_proj": Tensor("DNH", ("NH", "D"), "model.layers.{}.self_attn.q_proj.weight", "blk.{}.attn_q.weight"),
    "layers/q_bias": Tensor("NH", ("NH",), "model.layers.{}.self_attn.q_proj.bias", "blk.{}.attn_q.bias"),
    "layers/k_proj": Tensor("DKH", ("KH", "D"), "model.layers.{}.self_attn.k_proj.weight", "blk.{}.attn_k.weight"),
    "layers/k_bias": Tensor("KH", ("KH",), "model.layers.{}.self_attn.k_proj.bias", "blk.{}.attn_k.bias"),
    "layers/v_proj": Tensor("DKH", ("KH", "D"), "model.layers.{}.self_attn.v_proj.weight", "blk.{}.attn_v.weight"),
    "layers/v_bias": Tensor("KH", ("KH",), "model.layers.{}.self_attn.v_proj.bias", "blk.{}.attn_v.bias"),
    "layers/o_proj": Tensor("NHD", ("D", "NH"), "model.layers.{}.self_attn.o_proj.weight", "blk.{}.attn_output.weight"),
    "layers/o_bias": Tensor("D", ("D",), "model.layers.{}.self_attn.o_proj.bias", "blk.{}.attn_output.bias"),
    "layers/q_norm": Tensor("H", ("H",), "model.layers.{}.self_attn.q_norm.weight", "blk.{}.attn_q_norm.weight"),
    "layers/k_norm": Tensor("H", ("H",), "model.layers.{}.self_attn.k_norm.weight", "blk.{}.attn_k_norm.weight"),
    "layers/gate_proj": Tensor("DF", ("F", "D"), "model.layers.{}.mlp.gate_proj.weight", "blk.{}.ffn_gate.weight"),
    "layers/gate_bias": Tensor("F", ("F",), "model.layers.{}.mlp.gate_proj.bias", "blk.{}.ffn_gate.bias"),
    "layers/up_proj": Tensor("DF", ("F", "D"), "model.layers.{}.mlp.up_proj.weight", "blk.{}.ffn_up.weight"),
    "layers/up_bias": Tensor("F", ("F",), "model.layers.{}.mlp.up_proj.bias", "blk.{}.ffn_up.bias"),
    "layers/down_proj": Tensor("FD", ("D", "F"), "model.layers.{}.mlp.down_proj.weight", "blk.{}.ffn_down.weight"),
    "layers/down_bias": Tensor("D", ("D",), "model.layers.{}.mlp.down_proj.bias", "blk.{}.ffn_down.bias"),
    "layers/router": Tensor(
        "DE", ("E", "D"), "model.layers.{}.block_sparse_moe.gate.weight", "blk.{}.ffn_gate_inp.weight"
    ),
    # All experts of a layer, one after another; HF files hold each by itself, see `hf_families.Family.stacked`.
    "layers/experts_gate": Tensor(
        "EDF", ("EF", "D"), "model.layers.{}.block_sparse_moe.experts.w1.weight", "blk.{}.ffn_gate_exps.weight"
    ),
    "layers/experts_down": Tensor(
        "EFD", ("ED", "F"), "model.layers.{}.block_sparse_moe.experts.w2.weight", "blk.{}.ffn_down_exps.weight"
    ),
    "layers/experts_up": Tensor(
        "EDF", ("EF", "D"), "model.layers.{}.block_sparse_moe.experts.w3.weight", "blk.{}.ffn_up_exps.weight"
    ),
    "layers/attn_norm": Tensor("D", ("D",), "model.layers.{}.input_layernorm.weight", "blk.{}.attn_norm.weight"),
    "layers/mlp_norm": Tensor("D", ("D",), "model.layers.{}.post_attention_layernorm.weight", "blk.{}.ffn_norm.weight"),
    "layers/attn_out_norm": Tensor(
        "D", ("D",), "model.layers.{}.post_norm1.weight", "blk.{}.post_attention_norm.weight"
    ),
    "layers/mlp_out_norm": Tensor("D", ("D",), "model.layers.{}.post_norm2.weight", "blk.{}.post_ffw_norm.weight"),
    "final_norm": Tensor("D", ("D",), "model.norm.weight", "output_norm.weight"),
    "lm_head": Tensor("DV", ("V", "D"), "lm_head.weight", "output.weight"),
}
assert {f"layers/{name}" for name in LAYER_AXES} == {path for path in TENSORS if "/" in path}


def paths(cfg: ModelConfig) -> list[str]:
    """Returns the table rows that a model of `cfg` has."""
    tree = param_axes(cfg)
    present = set(tree) | {f"layers/{name}" for name in tree["layers"]}
    return [path for path in TENSORS if path in present]


def hf_shape(path: str, cfg: ModelConfig) -> tuple[int, ...]:
    """Returns the shape that the file's tensor must have."""
    size = sizes(cfg)
    return tuple(math.prod(size[x] for x in group) for group in TENSORS[path].hf_axes)


def hf_tensors(cfg: ModelConfig) -> Iterator[tuple[str, str, int | None]]:
    """Yields (HF name, path, layer) of every checkpoint tensor, in the order HF writes them."""
    per_layer = [path for path in paths(cfg) if path.startswith("layers/")]
    for path in paths(cfg):
        if path == per_layer[0]:
            for layer in range(cfg.num_hidden_layers):
                for p in per_layer:
                    yield TENSORS[p].hf.format(layer), p, layer
        elif path not in per_layer:
            yield TENSORS[path].hf, path, None


def pick(params: Params, path: str, layer: int | None = None) -> Any:
    """Returns the array at a path of the stacked state, or one layer of it if a layer is given."""
    group, _, leaf = path.rpartition("/")
    x = params[group][leaf] if group else params[leaf]
    return x if layer is None else x[layer]


def from_hf(x: np.ndarray, path: str, cfg: ModelConfig) -> np.ndarray:
    """Converts a file tensor, e.g. [N*H, D], to our layout, e.g. [D, N, H]; a view where numpy can make one.

    `x` may be a block of rows; where rows are heads, it must hold complete heads.
    """
    row, size = TENSORS[path], sizes(cfg)
    letters = "".join(row.hf_axes)
    return x.reshape([-1, *(size[a] for a in letters[1:])]).transpose([letters.index(a) for a in row.axes])


def to_hf(x: np.ndarray, path: str, cfg: ModelConfig) -> np.ndarray:
    """Inverse of `from_hf`, also for a block of rows."""
    row = TENSORS[path]
    letters = "".join(row.hf_axes)
    return x.transpose([row.axes.index(a) for a in letters]).reshape(-1, *hf_shape(path, cfg)[1:])
