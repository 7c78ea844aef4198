"""Experts on a mesh: each device multiplies by its own experts the tokens of all devices that share its batch rows."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from solar_jax.model.experts import Dispatch, grouped_mlp
from solar_jax.parallel.rules import ACTIVATIONS, EXPERTS, spec


def expert_dispatch(mesh: Mesh) -> Dispatch:
    """Returns the experts' MLPs for a mesh.

    Tokens are all-gathered over `expert`, each device adds what its experts give to all of them, and the sums are
    reduce-scattered: no token is dropped, whatever the routing, and the cost is even only if the routing is.
    """
    if mesh.size == 1:
        return grouped_mlp
    shards, tensor = mesh.shape["expert"], mesh.shape["tensor"]
    activations, each = spec("BTD", ACTIVATIONS), spec("BT.", ACTIVATIONS)
    table = EXPERTS | {"D": None}
    weights = [spec(letters, table) for letters in ("EDF", "EDF", "EFD")]

    def local(h: jax.Array, shares: jax.Array, chosen: jax.Array, *matrices: jax.Array) -> jax.Array:
        if shards > 1:
            h, shares, chosen = (jax.lax.all_gather(x, "expert", axis=0, tiled=True) for x in (h, shares, chosen))
            chosen = chosen - jax.lax.axis_index("expert") * len(matrices[0])
        dtype = h.dtype
        out = grouped_mlp(h, shares, chosen, *matrices).astype(jnp.float32)
        if tensor > 1:
            out = jax.lax.psum(out, "tensor")
        if shards > 1:
            out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
        return out.astype(dtype)

    in_specs = (activations, each, each, *weights)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=activations, check_vma=False)
