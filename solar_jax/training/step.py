"""The training step and the evaluation step: pure functions of state and batch, compiled for a mesh."""

import functools
import math
import typing
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from solar_jax.config import ModelConfig, TrainConfig
from solar_jax.errors import UserError
from solar_jax.model import llama
from solar_jax.model.attention import attention_mask, attention_of_rows
from solar_jax.model.experts import Load
from solar_jax.model.precision import compute_dtype, precision
from solar_jax.model.remat import REMAT
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.parallel.attention import attention_kernel
from solar_jax.parallel.collectives import constrain_on, over_slices, tokens_of_devices, zigzag
from solar_jax.parallel.experts import expert_dispatch
from solar_jax.parallel.mesh import axis_size
from solar_jax.training.objectives import (
    Batch,
    Forward,
    Measures,
    Objective,
    Sums,
    head_loss,
    next_token,
    text_measures,
    token_values,
    with_router,
)  # fmt: skip
from solar_jax.training.partition import Partition, everything
from solar_jax.training.state import State, model_shardings, state_shardings

# (params, batch) -> sums by name, each with what it is summed over; "loss" is among them
EvalStep = Callable[[Params, Batch], Mapping[str, tuple[jax.Array, jax.Array]]]
LOGITS = 2**26  # of one chunk of the loss, on one device: 256 MiB in float32


def loss_chunks(logits: int, length: int, most: int = LOGITS) -> int:
    """Into how many chunks of its T tokens a row is cut, so that a device's logits do not outgrow `most`."""
    return next((n for n in range(1, length) if length % n == 0 and logits <= n * most), length)


def make_forward(
    cfg: ModelConfig, train: TrainConfig, length: int, mesh: Mesh, *, projections: str = "", trains_head: bool = True
) -> Callable[[Params], Forward]:
    """A function of parameters that gives the model as objectives use it, on a mesh.

    Args:
      cfg: the model.
      train: the run's.
      length: T.
      mesh: of the step.
      projections: a name of `model.quantised.NARROW_KINDS`; "" multiplies in the compute dtype.
      trains_head: whether a gradient of the output projection is wanted.
    """
    if train.remat not in REMAT:
        raise UserError(f"config.train.remat must be one of {', '.join(REMAT)}, found {train.remat!r}.")

    constrain, kernel = constrain_on(mesh, gather_experts=False), attention_kernel(cfg, train, length, mesh)
    experts: dict[str, Any] = {"dispatch": expert_dispatch(mesh)} if cfg.num_local_experts else {}
    shards = axis_size(mesh, "data", "fsdp", "expert", "context")

    def hidden(params: Params, loads: list[Load], batch: Batch) -> tuple[jax.Array, jax.Array, Batch]:
        attend = kernel
        if kernel is None and mesh.size == 1:  # rows end to end, for matmuls of matrices: see `matmul.plain_einsum`
            rows, length = batch["tokens"].shape
            attend = attention_of_rows(rows, attention_mask(length, batch["segment_ids"], cfg.sliding_window))
            batch = jax.tree.map(lambda x: x.reshape(1, -1), batch)
        split = zigzag(mesh, batch)
        x, head, load = llama.hidden_and_loads(
            cfg, params, split["tokens"], split["positions"], batch["segment_ids"],
            compute_dtype=compute_dtype(train),
            remat=train.remat, constrain=constrain, attend=attend, projections=projections,
            groups=rules.ways("B", rules.ACTIVATIONS, mesh), counted=split.get("weights"), **experts,
        )  # fmt: skip
        loads.append(load)
        return x, head, split

    def cross_entropy(
        x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        x, targets, weights = (tokens_of_devices(mesh, a) for a in (x, targets, weights))
        rows, length = targets.shape
        chunks = loss_chunks(rows // shards * length * cfg.vocab_size // mesh.shape["tensor"], length)
        by_token = constrain_on(mesh, rules.TOKENS)
        return head_loss(
            x, head, targets, weights, chunks=chunks, shards=shards, constrain=by_token, trains_head=trains_head
        )

    def tokens(x: jax.Array, head: jax.Array, targets: jax.Array, *, stats: bool = False) -> Sums:
        if mesh.shape["context"] > 1:
            raise UserError("config.mesh.context must be 1 for conversations and pairs, whose rows are not split.")
        rows, length = targets.shape
        chunks = loss_chunks(rows // shards * length * cfg.vocab_size // mesh.shape["tensor"], length)
        by_token = constrain_on(mesh, rules.TOKENS)
        return token_values(x, head, targets, chunks=chunks, constrain=by_token, stats=stats)

    def of(params: Params) -> Forward:
        loads: list[Load] = []
        return Forward(functools.partial(hidden, params, loads), cross_entropy, tokens, loads)

    return of


def make_train_step(
    cfg: ModelConfig,
    train: TrainConfig,
    length: int,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    partition: Partition | None = None,
    objective: Objective = next_token,
) -> jax.stages.Wrapped:
    """A jitted (state, batch) -> (state, {"loss", "grad_norm", ...}); the old state's memory is donated to the new one.

    The loss is the objective's sum over its count for the whole batch, and so is the gradient, however many
    microbatches it is summed from; further sums of the objective are divided likewise. Gradients, their norm and the
    optimiser's state are those of the trained part alone. Where `train.max_skipped` is not 0, a step whose loss or norm
    is non-finite leaves the state unchanged, step counts too.

    Args:
      cfg: the model.
      train: the run's.
      length: T.
      optimizer: of the trained part.
      mesh: of the step.
      partition: which parameters train; everything if None.
      objective: what is minimised.
    """
    partition = partition or everything(cfg)
    projections, trains_head = precision(train).projections, partition.trains_head(cfg)
    forward = make_forward(cfg, train, length, mesh, projections=projections, trains_head=trains_head)
    shardings = state_shardings(cfg, optimizer, mesh, partition)
    trained_shardings = partition.keys(shardings["params"])
    microbatches = max(1, train.accumulation)
    constrain = constrain_on(mesh)

    def train_step(state: State, batch: Batch) -> tuple[State, dict[str, jax.Array]]:
        params = state["params"]
        trained = partition.trained(params)

        def summed(trained: Params, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array, Sums]]:
            model = forward(partition.merged(params, trained))
            return with_router(objective, model, batch, train.router_balance, train.router_z)

        def gradients(trained: Params, batch: Batch) -> tuple[jax.Array, jax.Array, Sums, Params]:
            (_, (loss, count, sums)), grads = jax.value_and_grad(summed, has_aux=True)(trained, batch)
            return loss, count, sums, jax.lax.with_sharding_constraint(grads, trained_shardings)

        def accumulated(trained: Params, batch: Batch) -> tuple[jax.Array, jax.Array, Sums, Params]:
            if microbatches == 1:
                return gradients(trained, batch)
            # [B, T] -> [microbatches, B / microbatches, T] with each device keeping its own rows.
            split = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)

            def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
                microbatch = jax.tree.map(lambda x: constrain(x, "B."), microbatch)
                return jax.tree.map(jnp.add, total, gradients(trained, microbatch)), None

            _, (loss, count, sums) = jax.eval_shape(summed, trained, jax.tree.map(lambda x: x[0], split))
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), (loss, count, sums, trained))
            return jax.lax.scan(add, zeros, split)[0]

        loss, count, sums, grads = over_slices(mesh, accumulated)(trained, objective.whole(batch))
        count = jnp.maximum(count, 1.0)
        grads = partition.shared(jax.tree.map(lambda g: g / count, grads))
        updates, opt_state = optimizer.update(grads, state["opt_state"], trained)
        updates = partition.paced(typing.cast(Params, updates))
        new_params = partition.replaced(params, typing.cast(Params, optax.apply_updates(trained, updates)))
        new_state = {"params": new_params, "opt_state": opt_state}
        measured = {"loss": loss / count, "grad_norm": optax.global_norm(grads)}
        measured |= {name: total / count for name, total in sums.items()}
        if train.max_skipped:
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
    cfg: ModelConfig,
    train: TrainConfig,
    length: int,
    mesh: Mesh,
    measures: Measures = text_measures,
    partition: Partition | None = None,
) -> EvalStep:
    """A jitted (params, batch) -> sums by name, each with what it is summed over; of the unquantised model."""
    forward, partition = make_forward(cfg, train, length, mesh), partition or everything(cfg)

    def summed(params: Params, batch: Batch) -> dict[str, tuple[jax.Array, jax.Array]]:
        return dict(measures(forward(partition.merged(params, partition.trained(params))), batch))

    return jax.jit(
        over_slices(mesh, summed),
        in_shardings=(model_shardings(cfg, mesh, partition), rules.batch_sharding(mesh)),
        out_shardings=rules.replicated(mesh),
    )


def means(eval_step: EvalStep, params: Params, batches: list[Batch]) -> dict[str, tuple[float, float]]:
    """The mean of each measure over all batches, and what it is over; the sums are added in float64."""
    found = [jax.tree.map(float, eval_step(params, batch)) for batch in batches]
    total, count = ({name: sum(f[name][i] for f in found) for name in found[0]} for i in (0, 1))
    return {name: (total[name] / max(count[name], 1.0), count[name]) for name in total}


def with_error(found: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Values of measures, given with what each is a mean over; accuracies with standard error and number of pairs."""
    values = {name: value for name, (value, _) in found.items()}
    for name in ("accuracy", "likelihood_accuracy"):
        if name in found:
            value, pairs = found[name]
            values |= {f"{name}_error": math.sqrt(value * (1 - value) / max(1.0, pairs)), "pairs": pairs}
    return values


def mean_loss(eval_step: EvalStep, params: Params, batches: list[Batch]) -> float:
    """The mean loss over all batches, in nats."""
    return means(eval_step, params, batches)["loss"][0]
