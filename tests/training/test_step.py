"""The training step: one result on every mesh, PyTorch's result, and state that stays sharded."""

import contextlib
import dataclasses
import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import NamedSharding, PartitionSpec

from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.data.pipeline import Batch
from solar_jax.errors import UserError
from solar_jax.model import llama
from solar_jax.model.precision import precision
from solar_jax.model.remat import REMAT
from solar_jax.parallel import rules
from solar_jax.training.state import State, abstract_state, state_shardings
from solar_jax.training.step import make_eval_step, make_train_step, mean_loss
from tests.conftest import hf_model, optimizer_of, save_hf, step_args
from tests.hlo import crossing_bytes
from tests.parallel.test_mesh import mesh_of
from tests.parallel.test_rules import SMALL
from tests.training.small_run import (
    FAST_COMPILE,
    LEARNING_RATE,
    LENGTH,
    ROWS,
    STEPS,
    config,
    initial,
    make_batch,
    model,
)

MESHES = [
    (1, 1, 1),
    (2, 1, 1), (1, 2, 1), (1, 1, 2),
    (2, 2, 1), (1, 2, 2),
    (8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2),
    (1, 1, 1, 4), (2, 1, 2, 2), (1, 4, 1, 2), (1, 4, 1, 1, 2), (1, 2, 1, 2, 2),
]  # fmt: skip
SHARDED = [(1, 4, 2), (1, 8, 1), (1, 4, 1, 2), (1, 2, 1, 2, 2), (2, 1, 2, 2)]  # data, fsdp, tensor, context, slice
# conftest's cache of compiled programs is new in each session, so XLA really compiles here and says what it says.
REMATERIALISED = "Involuntary full rematerialization"


@contextlib.contextmanager
def captured_stderr(into: list[str]):
    """Collects what XLA writes to file descriptor 2, past Python's sys.stderr."""
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            into.append(file.read().decode(errors="replace"))


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step for a mesh, with what it takes."""

    step: Callable[..., Any]
    new_state: Callable[[], State]
    batch: Callable[[dict[str, np.ndarray]], Batch]
    stderr: str  # of compiling


@functools.cache
def _compiled(shape: tuple[int, ...], tied: bool, accumulation: int) -> Compiled:
    cfg, mesh, run = model(tied), mesh_of(*shape), config(accumulation)
    optimizer = optimizer_of(run)
    shardings = state_shardings(cfg, optimizer, mesh)
    init = jax.jit(optimizer.init, out_shardings=shardings["opt_state"])

    def new_state() -> State:
        params = jax.device_put(initial(tied), shardings["params"])
        return {"params": params, "opt_state": init(params)}

    def batch(rows: dict[str, np.ndarray]) -> Batch:
        return jax.device_put(rows, rules.batch_sharding(mesh))

    lowered = make_train_step(cfg, run.train, run.data.sequence_length, optimizer, mesh).lower(
        new_state(), batch(make_batch(0))
    )
    stderr: list[str] = []
    with captured_stderr(stderr):
        step = lowered.compile(FAST_COMPILE)
    return Compiled(step, new_state, batch, stderr[0])


def compiled(shape: tuple[int, ...], *, tied: bool = False, accumulation: int = 1) -> Compiled:
    """Compiled once for all tests of this file."""
    return _compiled(shape, tied, accumulation)


@dataclasses.dataclass(frozen=True)
class Trained:
    losses: list[float]
    norms: list[float]
    first: State  # shardings of the state before any step
    state: State


@functools.cache
def _trained(shape: tuple[int, ...], tied: bool, accumulation: int) -> Trained:
    c = compiled(shape, tied=tied, accumulation=accumulation)
    state = c.new_state()
    first = jax.tree.map(lambda x: x.sharding, state)
    losses, norms = [], []
    for i in range(STEPS):
        state, measured = c.step(state, c.batch(make_batch(i)))
        losses.append(float(measured["loss"]))
        norms.append(float(measured["grad_norm"]))
    return Trained(losses, norms, first, state)


def trained(shape: tuple[int, ...], *, tied: bool = False, accumulation: int = 1) -> Trained:
    """Three steps from `initial`, done once for all tests of this file."""
    return _trained(shape, tied, accumulation)


def host(tree):
    return jax.tree.map(np.asarray, tree)


def assert_close(found: State, expected: State):
    """Parameters and moments to float32 rounding, as that of a sum in another order.

    Adam divides a gradient by its own size: where that is hardly above rounding, so is the sign of a step of the whole
    learning rate. Moments have no such element; of parameters one in a thousand may be off by a thousandth of a step.
    """
    for (path, a), b in zip(jax.tree.leaves_with_path(host(found)), jax.tree.leaves(host(expected)), strict=True):
        where = jax.tree_util.keystr(path)
        off = ~np.isclose(a, b, rtol=1e-5, atol=1e-6)
        if where.startswith("['params']") and off.mean() <= 1e-3:
            a = np.where(off & np.isclose(a, b, rtol=0, atol=1e-3 * LEARNING_RATE), b, a)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, err_msg=where)


def test_kernels_of_streamed_rows_split_over_devices_give_the_loss_of_plain_attention_on_one():
    size = {"rows": 2, "length": 512}

    def losses(shape: tuple[int, ...], attention: str) -> list[float]:
        run, mesh = config(attention=attention, **size), mesh_of(*shape)
        optimizer = optimizer_of(run)
        shardings = state_shardings(SMALL, optimizer, mesh)
        params = jax.device_put(initial(False), shardings["params"])
        state = {"params": params, "opt_state": jax.jit(optimizer.init)(params)}
        batches = [jax.device_put(make_batch(i, **size), rules.batch_sharding(mesh)) for i in range(STEPS)]
        step = make_train_step(SMALL, run.train, run.data.sequence_length, optimizer, mesh)
        step = step.lower(state, batches[0]).compile(FAST_COMPILE)
        found = []
        for batch in batches:
            state, measured = step(state, batch)
            found.append(float(measured["loss"]))
        return found

    assert losses((1, 1, 1, 2), "streamed") == pytest.approx(losses((1, 1, 1), "xla"), rel=1e-5)


@pytest.mark.parametrize("shape", MESHES[1:])
def test_every_mesh_gives_the_loss_of_one_device(shape):
    expected, found = trained((1, 1, 1)), trained(shape)
    assert found.losses == pytest.approx(expected.losses, rel=1e-5)
    assert found.norms == pytest.approx(expected.norms, rel=1e-5)
    assert_close(found.state, expected.state)


@pytest.mark.parametrize("shape", [(1, 1, 1, 2), (2, 1, 2, 2)])
def test_a_window_over_a_split_row_gives_the_loss_of_one_device(shape):
    # 5 keys, fewer than a device's 8 tokens: windows reach over the borders of its chunks of 4, and so do documents.
    cfg, run, found = dataclasses.replace(SMALL, sliding_window=5), config(), []
    for mesh in (mesh_of(1, 1, 1), mesh_of(*shape)):
        params = jax.device_put(initial(False), rules.parameter_shardings(cfg, mesh))
        batch = jax.device_put(make_batch(0), rules.batch_sharding(mesh))
        found.append(mean_loss(make_eval_step(cfg, run.train, run.data.sequence_length, mesh), params, [batch]))
    assert found[1] == pytest.approx(found[0], rel=1e-6)
    assert found[0] != pytest.approx(trained((1, 1, 1)).losses[0], rel=1e-4)  # the window matters


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_cross_slices_once_a_step_each_device_its_share(accumulation):
    shape = (1, 2, 1, 2, 2)  # two slices of four devices, each holding a quarter
    hlo = compiled(shape, accumulation=accumulation).step.as_text()
    mine = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(trained(shape).state["params"]))
    assert mine <= crossing_bytes(hlo, lambda d: d // 4) <= mine + 64  # and a few scalars
    assert crossing_bytes(hlo, lambda d: d % 2) > 3 * mine  # the reader sees collectives: these are within a slice


def test_training_moves_the_loss():
    # Otherwise the tests around here would compare steps that do nothing.
    losses = trained((1, 1, 1)).losses
    assert abs(losses[2] - losses[0]) > 0.01


@pytest.mark.parametrize("shape", SHARDED)
def test_tied_embeddings_give_the_loss_of_one_device_too(shape):
    assert trained(shape, tied=True).losses == pytest.approx(trained((1, 1, 1), tied=True).losses, rel=1e-5)


@pytest.mark.parametrize("shape", [(1, 2, 2), (1, 8, 1), (1, 4, 2), (2, 2, 2), (1, 2, 1, 2, 2)])
@pytest.mark.parametrize("when", ["created", "after three steps"])
def test_no_moment_is_kept_whole_where_its_parameter_is_split(shape, when):
    result = trained(shape)
    after = jax.tree.map(lambda x: x.sharding, result.state)
    found = (result.first if when == "created" else after)["opt_state"]
    expected = rules.parameter_shardings(SMALL, mesh_of(*shape))
    for kind in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(found, kind)
        assert jax.tree.structure(moments) == jax.tree.structure(expected)
        for (path, moment), sharding, x in zip(
            jax.tree.leaves_with_path(moments),
            jax.tree.leaves(expected),
            jax.tree.leaves(result.state["params"]),
            strict=True,
        ):
            assert moment.is_equivalent_to(sharding, x.ndim), (kind, jax.tree_util.keystr(path))
            assert not moment.is_fully_replicated


@pytest.mark.parametrize("shape", [(1, 8, 1), (1, 4, 2)])
def test_a_device_holds_its_share_of_the_state_after_a_step(shape):
    # Counted in bytes of what lies there, not by what a sharding says.
    state = trained(shape).state
    whole = sum(x.nbytes for x in jax.tree.leaves(state))
    mine = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert mine < whole / 8 * 1.05  # norm scales are not split over tensor


@pytest.mark.parametrize("accumulation", [2, 4])
def test_accumulation_gives_the_step_of_the_whole_batch(accumulation):
    whole, found = trained((1, 2, 1)), trained((1, 2, 1), accumulation=accumulation)
    assert found.losses == pytest.approx(whole.losses, rel=1e-6)
    assert found.norms == pytest.approx(whole.norms, rel=1e-5)
    assert_close(found.state, whole.state)


def test_rows_of_weight_zero_change_no_step():
    # What fills a batch up to the number of devices must not count, in the loss or the gradient.
    batch = make_batch(0)
    batch["weights"][5:] = 0
    other = batch | {"tokens": batch["tokens"].copy(), "targets": batch["targets"].copy()}
    other["tokens"][5:] = 7
    other["targets"][5:] = 9
    c = compiled((1, 1, 1))
    (a, measured_a), (b, measured_b) = (c.step(c.new_state(), c.batch(rows)) for rows in (batch, other))
    assert host(measured_a) == host(measured_b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_two_steps_are_those_of_transformers_and_torch(tmp_path, tied):
    theirs = hf_model(tie_word_embeddings=tied)
    checkpoint = open_checkpoint(str(save_hf(theirs, tmp_path / "m")))
    cfg, mesh, run = checkpoint.cfg, mesh_of(1, 1, 1), config(remat="none")
    optimizer = optimizer_of(run)
    params = load_params(checkpoint)
    state = {"params": params, "opt_state": optimizer.init(params)}
    place = functools.partial(jax.tree.map, jnp.array)
    step = (
        make_train_step(cfg, run.train, run.data.sequence_length, optimizer, mesh)
        .lower(state, place(make_batch(0)))
        .compile(FAST_COMPILE)
    )

    named = dict(theirs.named_parameters())
    o = run.optimizer
    adamw = torch.optim.AdamW(
        [
            {"params": [p for n, p in named.items() if "norm" not in n], "weight_decay": o.weight_decay},
            {"params": [p for n, p in named.items() if "norm" in n], "weight_decay": 0.0},
        ],
        lr=o.learning_rate, betas=(o.b1, o.b2), eps=o.eps,
    )  # fmt: skip
    for i in range(2):
        batch = make_batch(i, cfg.vocab_size)
        # transformers takes one document a row, counted from its start
        batch["positions"] = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH)).copy()
        batch["segment_ids"] = np.zeros((ROWS, LENGTH), np.int32)
        state, measured = step(state, place(batch))

        logits = theirs(torch.tensor(batch["tokens"], dtype=torch.long)).logits
        targets, weights = torch.tensor(batch["targets"], dtype=torch.long), torch.tensor(batch["weights"])
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        adamw.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(named.values(), o.clip_norm)
        adamw.step()
        assert float(measured["loss"]) == pytest.approx(float(loss.detach()), rel=1e-4)
        assert float(measured["grad_norm"]) == pytest.approx(float(norm), rel=1e-4)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("shape", SHARDED)
def test_compiling_a_sharded_step_copies_no_array_to_every_device(shape, tied):
    # XLA says so on stderr and goes on, with an array as large as the whole on each chip.
    assert REMATERIALISED not in compiled(shape, tied=tied).stderr


def test_the_check_above_sees_what_xla_prints():
    # A look-up in a table that is split on both axes, which is what the model avoids.
    mesh = mesh_of(1, 4, 2)
    table, rows = NamedSharding(mesh, PartitionSpec("tensor", "fsdp")), rules.batch_sharding(mesh)

    def loss(table, tokens):
        return jnp.sum(jax.lax.with_sharding_constraint(table[tokens], rows) ** 2)

    stderr: list[str] = []
    with captured_stderr(stderr):
        jax.jit(jax.grad(loss), in_shardings=(table, rows), out_shardings=table).lower(
            jax.ShapeDtypeStruct((64, 32), jnp.float32), jax.ShapeDtypeStruct((8, 16), jnp.int32)
        ).compile()
    assert REMATERIALISED in stderr[0]


def test_the_old_state_gives_its_memory_to_the_new_one():
    # Without donation a step would hold parameters and moments twice.
    mesh, run = mesh_of(1, 1, 1), config()
    optimizer = optimizer_of(run)
    abstract = abstract_state(SMALL, precision(run.train).weights, optimizer, state_shardings(SMALL, optimizer, mesh))
    lowered = make_train_step(SMALL, run.train, run.data.sequence_length, optimizer, mesh).lower(
        abstract, jax.tree.map(jnp.array, make_batch(0))
    )
    donated = [info.donated for info in jax.tree.leaves(lowered.args_info[0][0])]
    assert len(donated) == len(jax.tree.leaves(abstract))
    assert all(donated)


def test_the_evaluation_is_the_mean_over_all_targets():
    mesh = mesh_of(2, 2, 2)
    params = jax.device_put(initial(False), rules.parameter_shardings(SMALL, mesh))
    batches = [jax.device_put(make_batch(i), rules.batch_sharding(mesh)) for i in range(2)]
    found = mean_loss(make_eval_step(SMALL, *step_args(config()), mesh), params, batches)

    logits = jax.jit(functools.partial(llama.logits, SMALL))
    total = weight = 0.0
    for batch in (make_batch(i) for i in range(2)):
        x = logits(initial(False), batch["tokens"], batch["positions"], batch["segment_ids"])
        losses = torch.nn.functional.cross_entropy(
            torch.tensor(np.asarray(x)).double().flatten(0, 1),
            torch.tensor(batch["targets"], dtype=torch.long).flatten(),
            reduction="none",
        )
        total += float((losses * torch.tensor(batch["weights"]).flatten()).sum())
        weight += float(batch["weights"].sum())
    assert found == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize(
    ("shape", "length", "attention", "words"),
    [
        ((1, 1, 1, 4), 20, "auto", "config.mesh.context=4 needs a config.data.sequence_length that is a multiple of 8"),
        ((1, 1, 1, 2), 256, "splash", "'splash' needs a config.data.sequence_length that is a multiple of 512"),
        ((1, 1, 1, 2), 256, "streamed", "'streamed' needs a config.data.sequence_length that is a multiple of 512"),
        ((1, 1, 1, 1), 192, "splash", "'splash' needs a config.data.sequence_length that is a multiple of 128"),
        ((1, 1, 1, 1), 192, "flash", "'flash' needs a config.data.sequence_length that is a multiple of 128"),
    ],
)
def test_a_row_that_cannot_be_cut_is_refused_with_what_could(shape, length, attention, words):
    run = config()
    run = dataclasses.replace(
        run,
        data=dataclasses.replace(run.data, sequence_length=length),
        train=dataclasses.replace(run.train, attention=attention),
    )
    with pytest.raises(UserError, match=f"{words}, found {length}"):
        make_train_step(SMALL, run.train, run.data.sequence_length, optimizer_of(run), mesh_of(*shape))


def test_an_unknown_remat_is_refused_with_the_known_ones():
    run = config(remat="some")
    with pytest.raises(UserError, match=rf"config\.train\.remat must be one of {', '.join(REMAT)}, found 'some'"):
        make_train_step(SMALL, run.train, run.data.sequence_length, optimizer_of(run), mesh_of(1, 1, 1))
