"""Rematerialisation policies: which values of a layer are saved for the backward pass, and which are recomputed."""

from collections.abc import Callable
from typing import Any

import jax

from solar_jax.model.quantised import ROW_SCALES

# Names of a layer's saveable values -> their axes, ordered by memory per recompute time saved, cheapest first.
# "attention" holds the residuals of the attention kernel, "mid" the residual stream after attention.
SAVEABLE = {
    "attention": "BTNH", "q": "BTNH", "k": "BTKH", "v": "BTKH", "mid": "BTD", "gate": "BTF", "up": "BTF",
}  # fmt: skip

# Policy -> values saved for the backward pass; the others are recomputed, and a layer's input is always saved. None
# saves whatever differentiation asks for.
REMAT: dict[str, tuple[str, ...] | None] = {
    "none": None,
    "matmuls": ("attention", "q", "k", "v", "mid", "gate", "up"),
    "mlp": ("attention", "k", "v", "gate", "up"),
    "half_mlp": ("attention", "q", "k", "v", "mid", "gate"),
    "mid": ("attention", "q", "k", "v", "mid"),
    "qkv": ("attention", "q", "k", "v"),
    "attention": ("attention",),
    "offload": ("attention",),
    "full": (),
}
# Values that a policy also offloads to host memory, trading transfer time for HBM.
OFFLOADED: dict[str, tuple[str, ...]] = {"offload": ("q", "k", "v", "mid")}


def rematerialised(layer: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Makes the backward pass of a layer, the body of a scan, recompute what the policy does not save."""
    names = REMAT[name]
    if names is None:
        return layer
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=(*names, ROW_SCALES),
        names_which_can_be_offloaded=OFFLOADED.get(name, ()),
        offload_src="device",
        offload_dst="pinned_host",
    )
    return jax.checkpoint(layer, policy=policy, prevent_cse=False)
