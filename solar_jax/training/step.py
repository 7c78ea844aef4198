"""The training step and the evaluation step: pure functions of state and batch, compiled for a mesh."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AbstractMesh, Mesh

from solar_jax.config import Config, ModelConfig
from solar_jax.data.pipeline import Batch
from solar_jax.errors import UserError
from solar_jax.model import llama
from solar_jax.model.attention import attention_mask, attention_of_rows
from solar_jax.model.llama import Params
from solar_jax.model.precision import compute_dtype, precision
from solar_jax.model.quantised import quantised_einsum
from solar_jax.parallel import rules
from solar_jax.parallel.attention import attention_kernel
from solar_jax.parallel.collectives import constrain_on, over_slices, tokens_of_devices, zigzag
from solar_jax.parallel.mesh import axis_size
from solar_jax.training.objectives import head_loss
from solar_jax.training.optimizer import masked

State = dict[str, Any]  # {"params", "opt_state"}
LOGITS = 2**26  # of one chunk of the loss, on one device: 256 MiB in float32


def state_shardings(cfg: ModelConfig, optimizer: optax.GradientTransformation, mesh: Mesh | AbstractMesh) -> State:
    """Where parameters and optimiser state rest: every moment where its parameter does."""
    opt_state = jax.eval_shape(optimizer.init, llama.shapes(cfg))
    return {
        "params": rules.parameter_shardings(cfg, mesh),
        "opt_state": rules.like_parameters(opt_state, cfg, mesh),
    }


def abstract_state(
    cfg: ModelConfig, config: Config, optimizer: optax.GradientTransformation, shardings: State
) -> State:
    """Shapes, dtypes and shardings of the state, nothing allocated."""
    params = llama.shapes(cfg, precision(config.train).weights)
    shapes = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
    return jax.tree.map(lambda s, sh: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sh), shapes, shardings)


def loss_chunks(logits: int, length: int) -> int:
    """Into how many chunks of its T tokens a row is cut, so that a device's logits do not outgrow `LOGITS`."""
    return next((n for n in range(1, length) if length % n == 0 and logits <= n * LOGITS), length)


def _summed_loss(
    cfg: ModelConfig, config: Config, mesh: Mesh, projections: str
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """(params, one slice's batch) -> summed loss in nats, number of targets; `projections`: as `Precision` has it."""
    if config.train.remat not in llama.REMAT:
        raise UserError(f"config.train.remat must be one of {', '.join(llama.REMAT)}, found {config.train.remat!r}.")

    constrain, kernel = constrain_on(mesh), attention_kernel(cfg, config, mesh)
    narrow = {"einsum": quantised_einsum(projections)} if projections else {}
    shards = axis_size(mesh, "data", "fsdp", "context")

    def summed_loss(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        attend = kernel
        if kernel is None and mesh.size == 1:  # rows end to end, so that matmuls are of matrices: see `llama._einsum`
            rows, length = batch["tokens"].shape
            attend = attention_of_rows(rows, attention_mask(length, batch["segment_ids"], cfg.sliding_window))
            batch = jax.tree.map(lambda x: x.reshape(1, -1), batch)
        split = zigzag(mesh, batch)
        x, head = llama.hidden(
            cfg, params, split["tokens"], split["positions"], batch["segment_ids"],
            compute_dtype=compute_dtype(config.train),
            remat=config.train.remat, constrain=constrain, attend=attend, **narrow,
        )  # fmt: skip
        x, targets, weights = (tokens_of_devices(mesh, a) for a in (x, split["targets"], split["weights"]))
        rows, length = targets.shape
        chunks = loss_chunks(rows // shards * length * cfg.vocab_size // mesh.shape["tensor"], length)
        by_token = constrain_on(mesh, rules.TOKENS)
        return head_loss(x, head, targets, weights, chunks=chunks, shards=shards, constrain=by_token)

    return summed_loss


def make_train_step(
    cfg: ModelConfig,
    config: Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    mask: Params | None = None,
) -> jax.stages.Wrapped:
    """A jitted (state, batch) -> (state, {"loss", "grad_norm"}); the old state's memory is given to the new one.

    The loss is the mean over the targets of the whole batch, and so is the gradient, however many microbatches it
    is summed from. The norm is that of what trains by the optimiser's `mask`, which is what clipping sees. Where
    `train.max_skipped` is not 0, a step whose loss or norm is not finite leaves the state as it was, step counts too.
    """
    summed_loss = _summed_loss(cfg, config, mesh, precision(config.train).projections)
    shardings = state_shardings(cfg, optimizer, mesh)
    microbatches = max(1, config.train.accumulation)
    constrain = constrain_on(mesh)

    def gradients(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, Params]:
        (loss, targets), grads = jax.value_and_grad(summed_loss, has_aux=True)(params, batch)
        return loss, targets, jax.lax.with_sharding_constraint(grads, shardings["params"])

    def accumulated(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array, Params]:
        if microbatches == 1:
            return gradients(params, batch)
        # [B, T] -> [microbatches, B / microbatches, T] with each device keeping its own rows.
        split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

        def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
            microbatch = jax.tree.map(lambda x: constrain(x, "B."), microbatch)
            return jax.tree.map(jnp.add, total, gradients(params, microbatch)), None

        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params)
        zero = (jnp.float32(0), jnp.float32(0), zeros)
        return jax.lax.scan(add, zero, split)[0]

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        params = state["params"]
        loss, targets, grads = over_slices(mesh, accumulated)(params, batch)
        targets = jnp.maximum(targets, 1.0)
        grads = jax.tree.map(lambda g: g / targets, grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], params)
        new_state = {"params": optax.apply_updates(params, updates), "opt_state": opt_state}
        measured = {"loss": loss / targets, "grad_norm": optax.global_norm(masked(grads, mask))}
        if config.train.max_skipped:
            fine = jnp.isfinite(measured["loss"]) & jnp.isfinite(measured["grad_norm"])
            new_state = jax.tree.map(lambda new, old: jnp.where(fine, new, old), new_state, state)
        return new_state, measured

    return jax.jit(
        train_step,
        in_shardings=(shardings, rules.batch_sharding(mesh)),
        out_shardings=(shardings, rules.replicated(mesh)),
        donate_argnums=0,
    )


@functools.cache  # evaluations come again and again; each new jit would compile again
def make_eval_step(
    cfg: ModelConfig, config: Config, mesh: Mesh
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted (params, batch) -> summed loss in nats, number of targets; of the model that is kept, unquantised."""
    return jax.jit(
        over_slices(mesh, _summed_loss(cfg, config, mesh, projections="")),
        in_shardings=(rules.parameter_shardings(cfg, mesh), rules.batch_sharding(mesh)),
        out_shardings=rules.replicated(mesh),
    )


def mean_loss(
    eval_step: Callable[[Params, Batch], tuple[jax.Array, jax.Array]], params: Params, batches: list[Batch]
) -> float:
    """Mean loss a target over all batches, in nats; the sums are added in float64."""
    sums = [eval_step(params, batch) for batch in batches]
    return sum(float(loss) for loss, _ in sums) / sum(float(targets) for _, targets in sums)
