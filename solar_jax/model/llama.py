"""The Llama-family decoder: one block, stacked over a leading layer axis and scanned.

The state is a plain pytree with the layers stacked on axis L. Array names and axes are defined once, in `LAYER_AXES`,
`OPTIONAL` and `axes`; shapes, sharding rules and the conversion table are all derived from them.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from solar_jax.config import ModelConfig
from solar_jax.model.attention import Attend, attention_mask, rotated_attention
from solar_jax.model.experts import Dispatch, Load, grouped_mlp, route
from solar_jax.model.lora import INPUTS, norm_of
from solar_jax.model.matmul import Einsum, down_projection, plain_einsum
from solar_jax.model.quantised import exact_of, gathered_weights, narrowed, products
from solar_jax.model.remat import rematerialised
from solar_jax.model.rope import rope_angles
from solar_jax.model.shapes import LAYER_AXES, Params, is_vector, layer_axes, sizes

# (array, its axis letters) -> the same array, laid out on a mesh; a dot is an unsharded axis. An array with a B is an
# activation. One without is a parameter: it is all-gathered for use, and its gradient is sharded as it is at rest.
# (parameters, the letters of each), tuples, -> all of them, gathered together.
Constrain = Callable[[Any, Any], Any]
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def unconstrained(x: Any, axes: Any) -> Any:
    """No-op `Constrain` for a single device."""
    del axes
    return x


def _initial(rngs: nnx.Rngs, cfg: ModelConfig, name: str, letters: str) -> nnx.Param:
    """Initialises a float32 parameter: ones (norm scale), zeros (bias) or normal(0, 0.02) (HF `initializer_range`)."""
    shape = tuple(sizes(cfg)[x] for x in letters)
    if is_vector(name):
        return nnx.Param(jnp.ones(shape) if name.endswith("norm") else jnp.zeros(shape))
    return nnx.Param(0.02 * jax.random.normal(rngs.params(), shape))


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """RMSNorm over the last axis in HF's order: normalise in float32, cast to x's dtype, multiply by the scale."""
    x32 = x.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + eps)
    return x32.astype(x.dtype) * scale.astype(x.dtype)


def scaled(x: jax.Array, multiplier: float) -> jax.Array:
    """Multiplies in float32; returns x unchanged if the multiplier is 0, which stands for none."""
    return (x.astype(jnp.float32) * multiplier).astype(x.dtype) if multiplier else x


def _add_bias(x: jax.Array, bias: nnx.Param | None) -> jax.Array:
    """Adds a bias over x's last axes, in float32; returns x unchanged if the architecture has none."""
    return x if bias is None else (x.astype(jnp.float32) + bias[...]).astype(x.dtype)


class Block(nnx.Module):
    """One decoder layer: pre-norm attention and SwiGLU with residual connections."""

    attn_norm: nnx.Param  # [D]
    q_proj: nnx.Param  # [D, N, H]
    k_proj: nnx.Param  # [D, K, H]
    v_proj: nnx.Param  # [D, K, H]
    o_proj: nnx.Param  # [N, H, D]
    q_bias: nnx.Param | None  # [N, H]; this and others that may be None only where `OPTIONAL` says so
    k_bias: nnx.Param | None  # [K, H]
    v_bias: nnx.Param | None  # [K, H]
    o_bias: nnx.Param | None  # [D]
    q_norm: nnx.Param | None  # [H]
    k_norm: nnx.Param | None  # [H]
    attn_out_norm: nnx.Param | None  # [D]
    mlp_norm: nnx.Param  # [D]
    gate_proj: nnx.Param | None  # [D, F]
    up_proj: nnx.Param | None  # [D, F]
    down_proj: nnx.Param | None  # [F, D]
    router: nnx.Param | None  # [D, E]
    experts_gate: nnx.Param | None  # [E, D, F]
    experts_up: nnx.Param | None  # [E, D, F]
    experts_down: nnx.Param | None  # [E, F, D]
    gate_bias: nnx.Param | None  # [F]
    up_bias: nnx.Param | None  # [F]
    down_bias: nnx.Param | None  # [D]
    mlp_out_norm: nnx.Param | None  # [D]

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, adapters: tuple[str, ...] = ()):
        self.cfg, self.eps = cfg, cfg.rms_norm_eps
        self.adapters = nnx.Dict({name: nnx.Param(jnp.zeros(())) for name in adapters})
        self.query_scale = cfg.attention_multiplier * cfg.head_dim**0.5  # attention itself scales by H ** -0.5
        self.residual_scale = cfg.residual_multiplier
        # Whether this layer rotates queries and keys; absent where all do.
        self.rotates = nnx.Variable(jnp.ones((), bool)) if cfg.no_rope_layers else None
        present = layer_axes(cfg)
        for name, letters in LAYER_AXES.items():
            setattr(self, name, _initial(rngs, cfg, name, letters) if name in present else None)

    def __call__(self, x: jax.Array, *how: Any) -> jax.Array:
        """Applies the layer as `with_load` does: x [B, T, D] -> [B, T, D]."""
        return self.with_load(x, *how)[0]

    def with_load(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        seen: jax.Array | None,
        constrain: Constrain,
        attend: Attend = rotated_attention,
        einsum: Einsum = plain_einsum,
        dispatch: Dispatch = grouped_mlp,
        counted: jax.Array | None = None,
    ) -> tuple[jax.Array, Load]:
        """Applies the layer: x [B, T, D] -> [B, T, D]; `seen` is the mask or segment ids that `attend` takes.

        Also returns how it routed the `counted` tokens; {} without experts.
        """

        attention = gathered_weights({name: getattr(self, name)[...] for name in _ATTENTION}, constrain)

        def weight(name: str) -> Any:
            if name in attention:
                return attention[name]
            return gathered_weights({name: getattr(self, name)[...]}, constrain)[name]

        def adapted(y: jax.Array, h: jax.Array, name: str) -> jax.Array:
            """Adds a projection's adapter: y + (h A) B, scaled to DoRA's magnitude where there is one."""
            if name + "_lora_a" not in self.adapters:
                return y
            w = LAYER_AXES[name + "_proj"]
            n = INPUTS[name]
            a = constrain(self.adapters[name + "_lora_a"][...], w[:n] + "R")
            b = constrain(self.adapters[name + "_lora_b"][...], "R" + w[n:])
            low = plain_einsum(f"bt{w[:n].lower()},{w[:n].lower()}r->btr", h, a)
            y += plain_einsum(f"btr,r{w[n:].lower()}->bt{w[n:].lower()}", low, b)
            if name + "_lora_norm" in self.adapters:
                norm = jax.lax.stop_gradient(norm_of(exact_of(weight(name + "_proj")), a, b, n))
                y = (y.astype(jnp.float32) * (self.adapters[name + "_lora_norm"][...] / norm)).astype(y.dtype)
            return y

        def project(h: jax.Array, letters: dict[str, str]) -> list[jax.Array]:
            """Returns the projections of h, by the letters of their outputs."""
            weights = [weight(name + "_proj") for name in letters]
            subscripts = [f"btd,d{out[2:].lower()}->{out.lower()}" for out in letters.values()]
            found = dict(zip(letters, products(einsum, subscripts, h, weights), strict=True))
            found = {name: _add_bias(adapted(y, h, name), getattr(self, name + "_bias")) for name, y in found.items()}
            return [checkpoint_name(constrain(y, letters[name]), name) for name, y in found.items()]

        def added(subscripts: str, h: jax.Array, name: str, einsum: Einsum) -> jax.Array:
            (o,) = products(einsum, [subscripts], h, [weight(name + "_proj")])
            return adapted(o, h, name)

        with jax.named_scope("attention"):
            h = rms_norm(x, self.attn_norm[...], self.eps)
            (q,), (k,), (v,) = (project(h, {name: out}) for name, out in (("q", "BTNH"), ("k", "BTKH"), ("v", "BTKH")))
            if self.q_norm is not None and self.k_norm is not None:
                q, k = rms_norm(q, self.q_norm[...], self.eps), rms_norm(k, self.k_norm[...], self.eps)
            if self.rotates is not None:
                cos, sin = rope
                rope = jnp.where(self.rotates[...], cos, 1.0), jnp.where(self.rotates[...], sin, 0.0)
            h = attend(scaled(q, self.query_scale), k, v, rope, seen)
            o = _add_bias(constrain(added("btnh,nhd->btd", h, "o", einsum), "BTD"), self.o_bias)
            x = checkpoint_name(constrain(x + self._added(o, self.attn_out_norm), "BTD"), "mid")
        with jax.named_scope("mlp"):
            h = rms_norm(x, self.mlp_norm[...], self.eps)
            if self.router is not None:
                shares, chosen, load = route(h, weight("router"), self.cfg, counted)
                o = dispatch(h, shares, chosen, *(weight(f"experts_{name}") for name in ("gate", "up", "down")))
                return constrain(x + self._added(constrain(o, "BTD"), self.mlp_out_norm), "BTD"), load
            gate, up = project(h, {"gate": "BTF", "up": "BTF"})
            h = jax.nn.silu(gate) * up
            o = _add_bias(added("btf,fd->btd", h, "down", down_projection(einsum)), self.down_bias)
            return constrain(x + self._added(o, self.mlp_out_norm), "BTD"), {}

    def _added(self, o: jax.Array, norm: nnx.Param | None) -> jax.Array:
        """Returns what is added to the residual stream: `o`, normalised and scaled where the architecture does that."""
        return scaled(o if norm is None else rms_norm(o, norm[...], self.eps), self.residual_scale)


class Llama(nnx.Module):
    """Full decoder: embedding, L scanned blocks, final norm, logits."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, adapters: tuple[str, ...] = ()):
        self.cfg = cfg
        self.embed = _initial(rngs, cfg, "embed", "VD")
        self.layers = nnx.vmap(lambda r: Block(cfg, r, adapters))(rngs.fork(split=cfg.num_hidden_layers))
        self.final_norm = _initial(rngs, cfg, "final_norm", "D")
        if not cfg.tie_word_embeddings:
            self.lm_head = _initial(rngs, cfg, "lm_head", "DV")

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        *,
        compute_dtype: Any,
        remat: str,
        constrain: Constrain,
        attend: Attend | None,
        dispatch: Dispatch,
        counted: jax.Array | None,
        stacks: Sequence[Any],
    ) -> tuple[jax.Array, Load]:
        """Returns the final-norm output [B, T, D] in compute_dtype for tokens, positions and segment ids [B, T].

        With it comes the routing of every layer, [L, ...] in no particular order.
        """
        rope = rope_angles(positions, self.cfg)
        seen = segment_ids
        if attend is None:
            attend, seen = rotated_attention, attention_mask(tokens.shape[1], segment_ids, self.cfg.sliding_window)
        # All-gather the table before the look-up: with a table sharded over D and V, XLA falls back to full
        # rematerialisation of the result.
        x = constrain(constrain(self.embed[...].astype(compute_dtype), ".D")[tokens], "BTD")
        x = scaled(x, self.cfg.embedding_multiplier)

        def body(x: jax.Array, block: Block) -> tuple[jax.Array, Load]:
            return block.with_load(x, rope, seen, constrain, attend, plain_einsum, dispatch, counted)

        body = rematerialised(body, remat)

        def turn(x: jax.Array, stacks: tuple[Any, ...]) -> tuple[jax.Array, list[Load]]:
            loads = []
            for stack in stacks:
                x, load = run(x, stack)
                loads.append(load)
            return x, loads

        def run(x: jax.Array, stack: Any) -> tuple[jax.Array, Any]:
            if isinstance(stack, tuple):  # stacks in turns: [repeats, n, ...] each
                return jax.lax.scan(turn, x, stack)
            return jax.lax.scan(body, x, stack)

        loads: list[Load] = []
        for stack in stacks:
            x, load = run(x, stack)
            loads += load if isinstance(load, list) else [load]  # of stacks in turns: [repeats, n, ...] each
        x = scaled(rms_norm(x, self.final_norm[...], self.cfg.rms_norm_eps), self.cfg.logits_multiplier)
        width = {"chosen": (self.cfg.num_local_experts,), "probability": (self.cfg.num_local_experts,)}
        joined = {
            name: jnp.concatenate([load[name].reshape(-1, *width.get(name, ())) for load in loads]) for name in loads[0]
        }
        return x, joined

    def head(self) -> jax.Array:
        """Returns the output projection [D, V]."""
        return self.embed[...].T if self.cfg.tie_word_embeddings else self.lm_head[...]


def graph(cfg: ModelConfig, adapters: tuple[str, ...] = ()) -> nnx.GraphDef:
    """Returns the model structure without arrays: `nnx.merge(graph(cfg), params)` is a Llama."""
    return nnx.split(nnx.eval_shape(lambda: Llama(cfg, nnx.Rngs(0), adapters)))[0]


def initial_params(cfg: ModelConfig, seed: int) -> Params:
    """Creates random float32 parameters; wrap in `jax.jit(..., out_shardings=...)` to create them sharded."""
    return nnx.to_pure_dict(nnx.state(Llama(cfg, nnx.Rngs(seed)), nnx.Param))


def rotates(layers: Any, cfg: ModelConfig) -> Any:
    """Adds to the stacks of layers what `Block.rotates` is of each layer; returns them as they are if all rotate."""
    if not cfg.no_rope_layers:
        return layers
    which = ~np.isin(np.arange(cfg.num_hidden_layers), cfg.no_rope_layers)
    done = 0

    def taken(*shape: int) -> np.ndarray:
        nonlocal done
        done += math.prod(shape)
        return which[done - math.prod(shape) : done].reshape(shape)

    def filled(stack: Any) -> Any:
        if isinstance(stack, dict):
            return stack | {"rotates": jnp.asarray(taken(len(stack["attn_norm"])))}
        sizes = [part["attn_norm"].shape[1] for part in stack]  # stacks in turns: [repeats, n, ...] each
        both = np.split(taken(len(stack[0]["attn_norm"]), sum(sizes)), np.cumsum(sizes)[:-1], axis=1)
        return tuple(part | {"rotates": jnp.asarray(of)} for part, of in zip(stack, both, strict=True))

    return tuple(map(filled, layers)) if isinstance(layers, tuple) else filled(layers)


def compute_copy(params: Params, compute_dtype: Any) -> Params:
    """Casts matrices to compute_dtype for matmuls; norm scales and biases are left as they are.

    The cast happens before the scan, so that each layer's all-gather moves the narrow copy.
    """
    return jax.tree.map_with_path(lambda path, p: p if is_vector(path[-1].key) else p.astype(compute_dtype), params)


def hidden_and_loads(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "none",
    constrain: Constrain = unconstrained,
    attend: Attend | None = None,
    projections: str = "",
    groups: int = 1,
    dispatch: Dispatch = grouped_mlp,
    counted: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array, Load]:
    """Computes the two factors of the logits, hidden states and output projection, and the routing of the layers.

    Args:
      cfg: the architecture.
      params: the state, in any float dtype.
      tokens: [B, T] integers.
      positions: [B, T], each token's position in its document; counted from the row's start if None.
      segment_ids: [B, T], document index of each token within its row; one document if None.
      compute_dtype: dtype of matmuls and activations.
      remat: a name of `remat.REMAT`.
      constrain: lays out activations and gathered parameters on a mesh.
      attend: attention that takes segment ids; None for plain array operations.
      projections: a key of `quantised.NARROW_KINDS` if the layers' projections multiply in 8 bits.
      groups: into how many parts the mesh splits B.
      dispatch: the experts' MLPs.
      counted: [B, T], weights of the tokens whose routing is summed; all count if None.

    Returns:
      The final norm's output [B, T, D] and the output projection [D, V], both in compute_dtype; `experts.Load` of all
      layers, [L, ...], {} without experts.
    """
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    params = compute_copy(params, compute_dtype)
    params = narrowed(params, projections, groups) if projections else params
    layers = rotates(params["layers"], cfg)

    def blocks(stack: Any) -> Any:
        return tuple(map(blocks, stack)) if isinstance(stack, tuple) else merge(stack).layers

    def merge(stack: Any) -> Llama:
        its = tuple(sorted(stack.get("adapters", ())))
        return nnx.merge(graph(cfg, its), params | {"layers": stack})

    stacks = tuple(map(blocks, layers)) if isinstance(layers, tuple) else None
    model = merge(jax.tree.leaves(layers, is_leaf=lambda x: isinstance(x, dict))[0])
    x, loads = model.hidden(
        tokens, positions, segment_ids,
        compute_dtype=compute_dtype, remat=remat, constrain=constrain, attend=attend,
        dispatch=dispatch, counted=counted, stacks=stacks or (model.layers,),
    )  # fmt: skip
    return x, model.head(), loads


def hidden(cfg: ModelConfig, params: Params, *batch: Any, **how: Any) -> tuple[jax.Array, jax.Array]:
    """Computes the two factors of the logits, as `hidden_and_loads` does and with its arguments."""
    return hidden_and_loads(cfg, params, *batch, **how)[:2]


def unembed(x: jax.Array, head: jax.Array) -> jax.Array:
    """Projects to logits: [..., D] x [D, V] -> float32 [..., V]."""
    return plain_einsum("...d,dv->...v", x, head, jnp.float32)


def logits(
    cfg: ModelConfig,
    params: Params,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    *,
    constrain: Constrain = unconstrained,
    **how: Any,
) -> jax.Array:
    """Computes next-token logits, float32 [B, T, V]; arguments as in `hidden`."""
    x, head = hidden(cfg, params, tokens, positions, segment_ids, constrain=constrain, **how)
    return constrain(unembed(x, constrain(head, "DV")), "BTV")
