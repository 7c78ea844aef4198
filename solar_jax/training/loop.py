"""One arm of a run: a model initialised, trained step by step, evaluated, checkpointed, and resumable."""

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np

from solar_jax.config import Config, ModelConfig
from solar_jax.data.pipeline import Batch, Feed
from solar_jax.growth.apply import grown_config
from solar_jax.growth.plan import GrowthPlan
from solar_jax.hf.reader import Checkpoint, load_params
from solar_jax.model import llama
from solar_jax.model.llama import Params
from solar_jax.model.precision import precision
from solar_jax.parallel import chips, rules
from solar_jax.training import metrics
from solar_jax.training.checkpoint import CheckpointStore
from solar_jax.training.clock import Ledger, StepClock, StepTime, step_note
from solar_jax.training.compilation import cache_hits
from solar_jax.training.optimizer import learning_rate, make_optimizer, trainable_layers, trainable_mask
from solar_jax.training.prefetch import Prefetcher
from solar_jax.training.profiling import Profiler
from solar_jax.training.step import abstract_state, make_eval_step, make_train_step, mean_loss, state_shardings
from solar_jax.training.watchdog import Watchdog
from solar_jax.training.writers import Writers


@dataclasses.dataclass(frozen=True)
class Run:
    """What all arms of a run share."""

    config: Config
    workdir: pathlib.Path
    checkpoint: Checkpoint  # the base
    mesh: jax.sharding.Mesh
    rows: grain.MapDataset  # training
    heldout: list[Batch]
    evals: metrics.JsonLines  # {"arm", "step", "loss"} of every held-out evaluation
    ledger: Ledger
    writers: Writers


@dataclasses.dataclass(frozen=True)
class Arm:
    """A model and where its training is recorded."""

    name: str
    plan: GrowthPlan
    folder: pathlib.Path
    trainable: str

    def cfg(self, base: ModelConfig) -> ModelConfig:
        return grown_config(base, self.plan)


def say(text: str = "") -> None:
    """Prints on the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def warn(text: str) -> None:
    """Prints on any process."""
    sys.stderr.write(f"warning: {text}\n")


def initial_params(run: Run, plan: GrowthPlan) -> Params:
    """The base's weights, grown by the plan while they are read, each device's shard on its own."""
    cfg = grown_config(run.checkpoint.cfg, plan)
    dtypes = jax.tree.map(lambda s: s.dtype, llama.shapes(cfg, precision(run.config.train).weights))
    return load_params(run.checkpoint, rules.parameter_shardings(cfg, run.mesh), dtypes, plan)


def evaluate(run: Run, arm: str, step: int, cfg: ModelConfig, params: Params) -> float:
    """Held-out loss, recorded once; a resumed run reads it instead of computing it again."""
    for record in run.evals.read():
        if record["arm"] == arm and record["step"] == step:
            return record["loss"]
    loss = mean_loss(make_eval_step(cfg, run.config, run.mesh), params, run.heldout)
    run.evals.append({"arm": arm, "step": step, "loss": loss})
    run.writers.write(arm, step, {"heldout_loss": loss})
    return loss


def arm_mask(run: Run, arm: Arm) -> Params | None:
    """Where an arm's parameters move; None: everywhere."""
    if arm.trainable == "all":
        return None
    layers, others = trainable_layers(arm.trainable, arm.plan)
    return trainable_mask(llama.shapes(arm.cfg(run.checkpoint.cfg)), layers, others)


def train(run: Run, arm: Arm) -> Params:
    """Trains an arm from where its last checkpoint left it, or from the base, to the last step.

    Returns:
      The trained parameters.
    """
    config, cfg = run.config, arm.cfg(run.checkpoint.cfg)
    optimizer = make_optimizer(config, arm_mask(run, arm), run.mesh)
    shardings = state_shardings(cfg, optimizer, run.mesh)
    lines = metrics.JsonLines(arm.folder / "metrics.jsonl")
    with CheckpointStore(arm.folder, config.checkpoint.keep) as store:
        done = store.latest_step or 0
        run.ledger.add("lost", sum(seconds(r) for r in lines.read() if r["step"] > done))
        lines.keep_if(lambda r: r["step"] <= done)
        run.evals.keep_if(lambda r: r["arm"] != arm.name or r["step"] <= done)
        if done:
            abstract = abstract_state(cfg, config, optimizer, shardings)
            if done == config.train.steps:
                return store.restore_params(done, abstract["params"])
            params, opt_state, host = store.restore(done, abstract["params"], abstract["opt_state"])
            # Checkpoints of older versions do not say how many rows were seen.
            seen = host.get("rows", done * config.train.batch_size)
            say(f"{arm.name}: going on from the checkpoint of step {done}")
        else:
            params, seen = initial_params(run, arm.plan), 0
            loss = evaluate(run, arm.name, 0, cfg, params)
            say(f"{arm.name}: held-out loss {loss:.4f} before training")
            opt_state = jax.jit(optimizer.init, out_shardings=shardings["opt_state"])(params)
        state = {"params": params, "opt_state": opt_state}
        del params, opt_state  # the step takes their memory
        with contextlib.closing(_Session(run, arm, cfg, done, seen, store, lines)) as session:
            return session.steps(optimizer, state)


def seconds(record: dict[str, Any]) -> float:
    """What a step of the metrics took; 0 for one that an older version recorded."""
    return record.get("data_seconds", 0.0) + record.get("compute_seconds", 0.0)


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A step that the devices work on. Times are of `time.perf_counter()`."""

    step: int
    asked: float  # when its batch was
    ready: float  # when that was there
    numbers: concurrent.futures.Future  # of _fetch


def _fetch(measured: dict[str, jax.Array]) -> tuple[dict[str, float], float]:
    """What a step measured, and when it was done."""
    return {name: float(value) for name, value in measured.items()}, time.perf_counter()


class _Session:
    """An arm's steps from one start of the command: batch, step, one line; held-out loss and checkpoint when due.

    The devices get a step before the host has read the last one's numbers, so they never wait for what the host
    writes. Every number is recorded under its own step, and none later than the checkpoint that holds the step.
    """

    def __init__(
        self, run: Run, arm: Arm, cfg: ModelConfig, done: int, seen: int, store: CheckpointStore,
        lines: metrics.JsonLines,
    ):  # fmt: skip
        self._run, self._arm, self._cfg, self._done, self._store, self._lines = run, arm, cfg, done, store, lines
        self._seen = seen  # rows, before this session
        config = run.config
        self._last = config.train.steps
        self._rates = _rates(config)
        self._tokens = config.train.batch_size * config.data.sequence_length  # a step
        self._flops = metrics.flops_per_token(cfg, config.data.sequence_length)
        self._peak = chips.peak_flops(jax.devices()[0])
        self._clock = StepClock(self._last - done)
        log = config.logging
        self._profiler = Profiler(run.workdir / "profiles", arm.name, log.profile_start, log.profile_steps, say)
        self._watchdog = Watchdog(run.workdir / "stalls", arm.name, log.watchdog_seconds, warn)
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "numbers")
        self._flying: _Flight | None = None

    def close(self) -> None:
        self._profiler.end()
        self._reader.shutdown(wait=False)

    def steps(self, optimizer: Any, state: Any) -> Params:
        """Takes the steps that are left; the state's memory goes to the new one.

        Returns:
          The trained parameters.
        """
        run, config, size = self._run, self._run.config, self._run.config.train.batch_size
        sharding, padded = rules.batch_sharding(run.mesh), rules.padded_rows(size, run.mesh, config.train.accumulation)
        feed = Feed(run.rows, self._seen, size, padded, sharding, config.data.workers)
        with (
            contextlib.closing(feed),
            Prefetcher(lambda step: feed(step - self._done), self._done, self._last) as batches,
        ):
            compiled = self._compile(optimizer, state, batches)
            with self._watchdog, self._landing_on_error():
                self._clock.resume()
                for step in range(self._done + 1, self._last + 1):
                    if self._profiler.opens(step):
                        self._land()
                        self._profiler.begin(step)
                        self._clock.resume()
                    state = self._step(compiled, step, state, batches)
                    self._after(step, state)
        return state["params"]

    def _compile(self, optimizer: Any, state: Any, batches: Prefetcher) -> jax.stages.Compiled:
        step = make_train_step(self._cfg, self._run.config, optimizer, self._run.mesh, arm_mask(self._run, self._arm))
        begin = time.perf_counter()
        batch = batches.first()
        with cache_hits() as hits:
            compiled = step.lower(state, batch).compile(dict(chips.compiler_options(jax.devices()[0])) or None)
        spent = time.perf_counter() - begin
        self._run.ledger.add("compilation", spent)
        cached = f" (from the cache in {jax.config.jax_compilation_cache_dir})" if hits else ""
        m = compiled.memory_analysis()
        takes = "" if m is None else (
            f"; by the compiler it takes {(m.argument_size_in_bytes + m.temp_size_in_bytes) / 2**30:.1f} GiB a device"
        )  # fmt: skip
        say(f"{self._arm.name}: step compiled in {spent:.0f} s{cached}{takes}")
        return compiled

    def _step(self, compiled: jax.stages.Compiled, step: int, state: Any, batches: Prefetcher) -> Any:
        """Hands a step to the devices and records the one before it."""
        asked = time.perf_counter()
        if self._flying and batches.is_slower_than(self._flying.numbers):
            self._land()  # the devices are idle, so the line need not wait either
        batch = batches.take()
        ready = time.perf_counter()
        state, measured = compiled(state, batch)
        before, self._flying = self._flying, _Flight(step, asked, ready, self._reader.submit(_fetch, measured))
        if before:
            self._record(before)
        return state

    def _after(self, step: int, state: Any) -> None:
        """What is due after a step; all of it needs the step to be done."""
        config = self._run.config
        last = step == self._last
        evaluates = last or (config.evaluation.every and step % config.evaluation.every == 0)
        saves = last or step % config.checkpoint.every == 0
        closes = self._profiler.closes(step)
        if not (evaluates or saves or closes):
            return
        self._land()
        if closes:
            self._profiler.end()
            self._clock.resume()
        if evaluates:
            with self._outside("evaluation", step):
                loss = evaluate(self._run, self._arm.name, step, self._cfg, state["params"])
            say(f"{self._arm.name}: held-out loss {loss:.4f} after step {step}")
        if saves:
            with self._outside("checkpoint", step):
                self._store.save(step, **state, host=self._host(step))

    def _host(self, step: int) -> dict[str, int]:
        """Where the run stands after a step. The data's position is the rows seen, so that B may change."""
        config = self._run.config
        rows = self._seen + (step - self._done) * config.train.batch_size
        return {"step": step, "tokens": rows * config.data.sequence_length, "rows": rows}

    @contextlib.contextmanager
    def _outside(self, name: str, step: int) -> Iterator[None]:
        begin = time.perf_counter()
        with self._clock.outside(name):
            yield
        self._run.ledger.add(name, time.perf_counter() - begin)
        self._watchdog.beat(step, self._clock.median())

    def _land(self) -> None:
        """Waits for the step under way, if there is one, and records it."""
        before, self._flying = self._flying, None
        if before:
            self._record(before)

    @contextlib.contextmanager
    def _landing_on_error(self) -> Iterator[None]:
        """What fails next to a step, as the next batch may, does not cost the line of the step under way."""
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):  # which is the first one again, if the step itself failed
                self._land()
            raise

    def _record(self, flight: _Flight) -> None:
        """The step's line in the metrics and on the screen."""
        measured, end = flight.numbers.result()
        spent = self._clock.step(flight.asked, flight.ready, end)
        self._watchdog.beat(flight.step, self._clock.median())
        rate = self._tokens / spent.total
        peaks = metrics.memory_peaks()
        record = measured | {
            "step": flight.step,
            "learning_rate": float(self._rates[flight.step - 1]),
            "tokens": self._host(flight.step)["tokens"],
            "tokens_per_second": rate,
            "mfu": metrics.mfu(rate, self._flops, self._peak, jax.device_count()),
            "data_seconds": spent.data,
            "compute_seconds": spent.compute,
            **{f"{name}_seconds": value for name, value in spent.outside.items()},
            "memory_peak_gib": None if peaks is None else max(peaks),
        }
        self._lines.append(record)
        self._run.writers.write(self._arm.name, flight.step, record)
        say(_line(self._arm.name, self._last, record, spent, self._clock.eta()))


def _rates(config: Config) -> np.ndarray:
    """The learning rate of every update: at once, since one at a time would queue behind the devices' steps."""
    steps = config.train.steps
    rate = learning_rate(config.optimizer, steps)
    return np.asarray(jax.jit(jax.vmap(lambda i: jnp.asarray(rate(i), jnp.float32)))(jnp.arange(steps)))


def _line(name: str, steps: int, r: dict[str, Any], spent: StepTime, eta: float) -> str:
    """One step for a person."""
    used = "" if r["mfu"] is None else f"  mfu {100 * r['mfu']:.1f} %"
    return (
        f"{name} step {r['step']:>{len(str(steps))}}/{steps}  loss {r['loss']:.4f}  lr {r['learning_rate']:.2e}  "
        f"grad {r['grad_norm']:.2f}  {r['tokens_per_second']:,.0f} tok/s{used}{step_note(spent)}  "
        f"{metrics.duration(eta)} left"
    )
