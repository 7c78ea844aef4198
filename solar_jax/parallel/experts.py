"""Experts on a mesh: each device multiplies by its own experts the tokens of all devices that share its batch rows."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from solar_jax.model.experts import Dispatch, grouped_mlp
from solar_jax.parallel.mesh import fsdp_groups
from solar_jax.parallel.rules import ACTIVATIONS, EXPERTS, spec

LETTERS = ("EDF", "EDF", "EFD")  # of gate, up and down


def expert_dispatch(mesh: Mesh) -> Dispatch:
    """Returns the experts' MLPs for a mesh; it takes their weights as they are at rest.

    Each device gathers the weights of its own experts, and their gradients are scattered: left to XLA, outside of the
    experts' part of the program, both would be all-reduces of full matrices, of twice the bytes.

    Tokens are all-gathered over `expert`, each device adds what its experts give to all of them, and the sums are
    reduce-scattered: no token is dropped, whatever the routing, and the cost is even only if the routing is.
    """
    if mesh.size == 1:
        return grouped_mlp
    shards, tensor, groups = mesh.shape["expert"], mesh.shape["tensor"], fsdp_groups(mesh)
    activations, each = spec("BTD", ACTIVATIONS), spec("BT.", ACTIVATIONS)
    weights = [spec(letters, EXPERTS) for letters in LETTERS]

    def gathered(x: jax.Array, axis: int) -> jax.Array:
        """Gathers a matrix along D, which fsdp and, within it, context shard."""
        if mesh.shape["context"] > 1:
            x = jax.lax.all_gather(x, "context", axis=axis, tiled=True)
        if mesh.shape["fsdp"] > 1:
            for stage in groups:
                x = jax.lax.all_gather(x, "fsdp", axis=axis, axis_index_groups=stage, tiled=True)
        return x

    def local(h: jax.Array, shares: jax.Array, chosen: jax.Array, *matrices: jax.Array) -> jax.Array:
        if shards > 1:
            h, shares, chosen = (jax.lax.all_gather(x, "expert", axis=0, tiled=True) for x in (h, shares, chosen))
            chosen = chosen - jax.lax.axis_index("expert") * len(matrices[0])
        dtype = h.dtype
        full = (gathered(x, letters.index("D")) for x, letters in zip(matrices, LETTERS, strict=True))
        out = grouped_mlp(h, shares, chosen, *full).astype(jnp.float32)
        if tensor > 1:
            out = jax.lax.psum(out, "tensor")
        if shards > 1:
            out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
        return out.astype(dtype)

    in_specs = (activations, each, each, *weights)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=activations, check_vma=False)
