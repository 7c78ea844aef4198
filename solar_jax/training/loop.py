"""Training loop of one arm: initialises or resumes a model, takes steps, evaluates and checkpoints."""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax

from solar_jax.config import ModelConfig
from solar_jax.data.pipeline import Feed
from solar_jax.errors import Interrupted, UserError
from solar_jax.hardware import chips
from solar_jax.hardware.chips import memory_peaks
from solar_jax.hardware.compilation import cache_hits
from solar_jax.model.flops import flops_per_token, mfu
from solar_jax.model.precision import compute_dtype, precision
from solar_jax.model.shapes import Params
from solar_jax.monitoring import metrics
from solar_jax.monitoring.goodput import StepClock
from solar_jax.monitoring.profiling import Profiler
from solar_jax.monitoring.watchdog import Watchdog
from solar_jax.orbax_store.store import CheckpointStore
from solar_jax.parallel import rules
from solar_jax.training import preemption
from solar_jax.training.guards import Guard, NotFinite, NotReference, Spike, check_first_loss, storable
from solar_jax.training.optimizer import learning_rates
from solar_jax.training.prefetch import Prefetcher
from solar_jax.training.report import step_line
from solar_jax.training.run import (
    Arm,
    Run,
    evaluate,
    first_params,
    heldout_losses,
    measures_line,
    say,
    warn,
    with_adapter,
)  # fmt: skip
from solar_jax.training.state import abstract_state, first_opt_state, state_shardings, stored_form
from solar_jax.training.step import make_train_step
from solar_jax.training.task_scores import TaskScores

ROLLBACKS = 3  # at most, to one checkpoint
DOCUMENTS = 20  # named at most when a step goes wrong


@dataclasses.dataclass(frozen=True)
class Start:
    """Point where an arm starts or resumes: steps taken, tokens trained on, and data rows consumed."""

    step: int = 0
    tokens: int = 0
    rows: int = 0


def train_arm(run: Run, arm: Arm) -> Params:
    """Trains an arm to the last step, from its last good checkpoint or from the base.

    A loss spike rolls it back to that checkpoint; the rows from there up to the spike's are skipped.

    Returns:
      The trained parameters.

    Raises:
      Interrupted: the run was asked to stop.
      UserError: a loss is non-finite, or spikes again and again.
    """
    left_out, rollbacks = 0, collections.Counter[int]()
    lines = metrics.JsonLines(arm.folder / "metrics.jsonl")
    with CheckpointStore(
        arm.folder, run.config.checkpoint, lambda: heldout_losses(run, arm), lambda text: warn(f"{arm.name}: {text}")
    ) as store:
        while True:
            try:
                return _train_from_last_good(run, arm, store, lines, left_out)
            except Spike as e:
                spike, problem = e.step, str(e)
            # Outside the handler, since the exception keeps the state alive.
            if failed := store.settle():
                warn(f"{arm.name}: the last save failed: {failed}")
            good = store.latest_step or arm.first
            rollbacks[good] += 1
            if rollbacks[good] > ROLLBACKS:
                raise UserError(
                    f"{arm.folder}: {problem}, again after {ROLLBACKS} rollbacks to step {good} that skipped the rows "
                    "in between; a lower learning rate or a higher config.train.spike may help."
                )
            left_out += (spike - good) * run.config.train.batch_size
            warn(f"{arm.name}: {problem}: rolling back to step {good} and skipping the rows in between")


def _train_from_last_good(
    run: Run, arm: Arm, store: CheckpointStore, lines: metrics.JsonLines, left_out: int
) -> Params:
    """Trains as `train_arm` does, skipping `left_out` rows after the checkpoint's.

    Raises:
      Spike: the loss of a step is a spike.
    """
    config, cfg = run.config, arm.cfg
    partition, policy = arm.partition, precision(config.train)
    optimizer = run.optimizer()
    shardings = state_shardings(cfg, optimizer, run.mesh, partition)
    weights, base = policy.weights, partition.base_dtype(policy)
    abstract = abstract_state(cfg, weights, optimizer, shardings, partition, base)
    abstract |= {"params": partition.saved(abstract["params"])}
    older = functools.partial(stored_form, abstract["opt_state"], cfg, weights, optimizer, run.mesh, partition)
    last = arm.last or config.train.steps
    state = store.restore_newest(abstract, last, older)
    resumes = state is not None
    if state is None and arm.begin is not None:
        state = arm.begin(abstract, optimizer, partition)
    host = None if state is None else state.pop("host", None)
    start = Start() if state is None else _start(host, config.train.batch_size, config.data.sequence_length)
    run.ledger.add("lost", sum(seconds(r) for r in lines.read() if r["step"] > start.step))
    lines.keep_if(lambda r: r["step"] <= start.step)
    for file in (run.evals, *([run.task_scores] if run.suite else [])):
        file.keep_if(lambda r: r["arm"] != arm.name or r["step"] <= start.step)
    tasks = TaskScores(run, arm)
    if state is not None and partition.lora is not None:
        state["params"] = first_params(run, arm.checkpoint, partition) | state["params"]
    if state is not None and resumes and start.step == last:
        return state["params"]
    if resumes:
        say(f"{arm.name}: resuming from the checkpoint of step {start.step}")
    elif state is not None:
        loss = evaluate(run, arm.name, start.step, cfg, state["params"], partition)
        say(f"{arm.name}: held-out loss {loss:.4f} after step {start.step}, grown and not trained since")
        tasks.measure(start.step, state["params"])
    else:
        params = with_adapter(run, cfg, first_params(run, arm.checkpoint, partition), partition)
        loss = evaluate(run, arm.name, 0, cfg, params, partition)
        say(f"{arm.name}: held-out loss {loss:.4f} before training{measures_line(run, arm.name, 0)}")
        tasks.measure(0, params)
        opt_state = first_opt_state(optimizer, partition, params, shardings["opt_state"])
        state = {"params": params, "opt_state": opt_state}
        del params
    start = dataclasses.replace(start, rows=start.rows + left_out)
    with contextlib.closing(_Session(run, arm, cfg, start, store, lines, tasks)) as session:
        return session.steps(optimizer, state)


def _start(host: dict[str, Any] | None, batch_size: int, length: int) -> Start:
    """Reads the start from a checkpoint's `host`; older ones do not count their rows."""
    host = host or {}
    step = int(host["step"])
    rows = int(host.get("rows", step * batch_size))
    return Start(step, int(host.get("tokens", rows * length)), rows)


def seconds(record: dict[str, Any]) -> float:
    """Returns the duration of a step in the metrics; 0 if an older version recorded it."""
    return record.get("data_seconds", 0.0) + record.get("compute_seconds", 0.0)


@dataclasses.dataclass(frozen=True)
class _Flight:
    """A step in flight on the devices. Times are of `time.perf_counter()`."""

    step: int
    asked: float  # when its batch was requested
    ready: float  # when the batch was ready
    numbers: concurrent.futures.Future  # result of _fetch


def _fetch(measured: dict[str, jax.Array]) -> tuple[dict[str, float], float]:
    """Returns a step's metrics and the time at which it was done."""
    return {name: float(value) for name, value in measured.items()}, time.perf_counter()


class _Session:
    """Steps of an arm in one invocation: batch, step, one log line; held-out loss and checkpoint when due.

    A step is dispatched before the host has read the previous one's metrics, so the devices never wait for the host's
    writes. Metrics are recorded under their own step, and no later than the checkpoint that holds the step.
    """

    def __init__(
        self, run: Run, arm: Arm, cfg: ModelConfig, start: Start, store: CheckpointStore, lines: metrics.JsonLines,
        tasks: TaskScores,
    ):  # fmt: skip
        self._run, self._arm, self._cfg, self._start, self._store, self._lines = run, arm, cfg, start, store, lines
        self._tasks, config, done = tasks, run.config, start.step
        self._last = arm.last or config.train.steps
        self._rates = learning_rates(config.optimizer, config.train.steps, run.rewarm)
        self._step_tokens = config.train.batch_size * config.data.sequence_length  # per step
        self._flops = flops_per_token(cfg, config.data.sequence_length, adapters=config.lora.rank > 0)
        self._peak = chips.peak_flops(jax.devices()[0])
        self._clock = StepClock(self._last - done)
        log = config.logging
        self._profiler = Profiler(run.local_folder / "profiles", arm.name, log.profile_start, log.profile_steps, say)
        self._watchdog = Watchdog(run.local_folder / "stalls", arm.name, log.watchdog_seconds, warn)
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "numbers")
        self._flying: _Flight | None = None
        self._guard = Guard(config.train, lines.read())

    def close(self) -> None:
        self._profiler.end()
        self._reader.shutdown(wait=False)
        with contextlib.suppress(UserError) if sys.exception() else contextlib.nullcontext():  # that one is reported
            self._lines.flush()

    def steps(self, optimizer: Any, state: Any) -> Params:
        """Takes the remaining steps; the state's buffers are donated to each new state.

        Returns:
          The trained parameters.
        """
        run, config, size = self._run, self._run.config, self._run.config.train.batch_size
        sharding, padded = rules.batch_sharding(run.mesh), rules.padded_rows(size, run.mesh, config.train.accumulation)
        first = self._start.step
        feed = Feed(run.rows, self._start.rows, size, padded, sharding, config.data.workers)
        with contextlib.closing(feed), Prefetcher(lambda step: feed(step - first), first, self._last) as batches:
            compiled = self._compile(optimizer, state, batches)
            with preemption.in_steps(), self._watchdog, self._landing_on_error():
                self._clock.resume()
                for step in range(self._start.step + 1, self._last + 1):
                    if self._profiler.opens(step):
                        self._land()
                        self._profiler.begin(step)
                        self._clock.resume()
                    state = self._step(compiled, step, state, batches)
                    self._after(step, state)
        return state["params"]

    def _rows(self, step: int) -> int:
        """Returns the data rows consumed up to and including a step."""
        return self._start.rows + (step - self._start.step) * self._run.config.train.batch_size

    def _tokens(self, step: int) -> int:
        return self._start.tokens + (step - self._start.step) * self._step_tokens

    def _compile(self, optimizer: Any, state: Any, batches: Prefetcher) -> jax.stages.Compiled:
        run, train, length = self._run, self._run.config.train, self._run.config.data.sequence_length
        step = make_train_step(self._cfg, train, length, optimizer, run.mesh, self._arm.partition, run.objective)
        begin = time.perf_counter()
        lowered = step.lower(state, batches.first())
        program = run.program if self._arm.name == run.arm else None
        with cache_hits() as hits:
            if program is not None:
                compiled = program.load(lowered, run.mesh)
            else:
                options = chips.compiler_options(jax.devices()[0], train.offload_collectives)
                compiled = lowered.compile(options or None)
        spent = time.perf_counter() - begin
        run.ledger.add("compilation", spent)
        cached = f" (from the cache in {jax.config.jax_compilation_cache_dir})" if hits else ""
        how = "step compiled" if program is None else f"compiled step loaded from {program.folder}"
        m = compiled.memory_analysis()
        takes = "" if m is None else (
            f"; the compiler reports {(m.argument_size_in_bytes + m.temp_size_in_bytes) / 2**30:.1f} GiB per device"
        )  # fmt: skip
        say(f"{self._arm.name}: {how} in {spent:.0f} s{cached}{takes}")
        return compiled

    def _step(self, compiled: jax.stages.Compiled, step: int, state: Any, batches: Prefetcher) -> Any:
        """Dispatches a step to the devices and records the one before it."""
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
        """Runs what is due after a step (profile, evaluation, save), all of which needs the step to be done."""
        config = self._run.config
        last, asked = step == self._last, preemption.asked()
        evaluates = last or (config.evaluation.every and step % config.evaluation.every == 0)
        saves = last or asked or step % config.checkpoint.every == 0 or self._store.failed
        closes = self._profiler.closes(step)
        if not (evaluates or saves or closes or self._tasks.due(step)):
            return
        self._land()
        if closes:
            self._profiler.end()
            self._clock.resume()
        if evaluates and not (asked and not last):
            with self._outside("evaluation", step):
                loss = evaluate(self._run, self._arm.name, step, self._cfg, state["params"], self._arm.partition)
            more = measures_line(self._run, self._arm.name, step)
            say(f"{self._arm.name}: held-out loss {loss:.4f} after step {step}{more}")
        if self._tasks.due(step) and not (asked and not last):
            with self._outside("evaluation", step):
                self._tasks.measure(step, state["params"])
        if saves:
            with self._outside("checkpoint", step):
                self._save(step, state, at_once=last or asked)
        if asked:
            raise Interrupted(
                f"{self._arm.name}: asked to stop; step {step} is saved in {self._arm.folder}, and the same command "
                "resumes from there."
            )

    def _save(self, step: int, state: Any, at_once: bool) -> None:
        """Begins to save a step, or saves it synchronously if `at_once` or after a failed save."""
        if failed := self._store.settle():
            warn(f"{self._arm.name}: the save before step {step} failed ({failed}); saving this one now")
        try:
            self._lines.flush()  # the metrics of a checkpoint's steps are on disk, whatever happens after it
            self._run.evals.flush()
            self._run.ledger.write()
        except UserError as e:
            raise UserError(f"{str(e).rstrip('.')}; {self._store.goes_on()}.") from e
        host = {"step": step, "tokens": self._tokens(step), "rows": self._rows(step)}
        saved = state | {"params": self._arm.partition.saved(state["params"])}
        (self._store.save if at_once or failed else self._store.begin)(step, **saved, host=host)

    @contextlib.contextmanager
    def _outside(self, name: str, step: int) -> Iterator[None]:
        begin = time.perf_counter()
        with self._clock.outside(name):
            yield
        self._run.ledger.add(name, time.perf_counter() - begin)
        self._watchdog.beat(step, self._clock.median())

    def _land(self) -> None:
        """Waits for the step in flight, if any, and records it."""
        before, self._flying = self._flying, None
        if before:
            self._record(before)

    @contextlib.contextmanager
    def _landing_on_error(self) -> Iterator[None]:
        """Records the step in flight even if something beside it fails, such as the next batch."""
        try:
            yield
        except Exception as e:
            try:
                self._land()
            except Exception as again:
                e.add_note(f"The step in flight failed as well: {again}")
            raise

    def _record(self, flight: _Flight) -> None:
        """Writes the step's line to the metrics and the screen."""
        measured, end = flight.numbers.result()
        spent = self._clock.step(flight.asked, flight.ready, end)
        self._watchdog.beat(flight.step, self._clock.median())
        rate = self._step_tokens / spent.total
        peaks = memory_peaks()
        record = measured | {
            "step": flight.step,
            "learning_rate": float(self._rates[flight.step - 1 - self._guard.skipped]),
            "tokens": self._tokens(flight.step),
            "tokens_per_second": rate,
            "mfu": mfu(rate, self._flops, self._peak, jax.device_count()),
            "data_seconds": spent.data,
            "compute_seconds": spent.compute,
            **{f"{name}_seconds": value for name, value in spent.outside.items()},
            "memory_peak_gib": None if peaks is None else max(peaks),
        }
        try:
            if flight.step == 1 and self._run.first_loss is not None:
                check_first_loss(record["loss"], self._run.first_loss, compute_dtype(self._run.config.train).name)
            self._guard.check(record)
        except NotFinite as e:
            raise UserError(self._not_finite(flight.step, str(e))) from None
        except NotReference as e:
            raise UserError(f"{self._arm.folder}: {self._arm.name}: {e}.") from None
        finally:
            if self._run.config.train.max_skipped:
                record["skipped"] = self._guard.skipped
            stored = storable(record)
            self._lines.append(stored)
            self._run.writers.write(self._arm.name, flight.step, stored)
            say(step_line(self._arm.name, self._last, record, spent, self._clock.eta()))

    def _not_finite(self, step: int, problem: str) -> str:
        """Returns the error message that a run with non-finite values ends with."""
        if failed := self._store.settle():
            warn(f"{self._arm.name}: the last save failed: {failed}")
        documents = self._run.documents(self._rows(step - 1), self._run.config.train.batch_size)
        named = ", ".join(documents[:DOCUMENTS]) + (
            f" and {len(documents) - DOCUMENTS} more" * (len(documents) > DOCUMENTS)
        )
        good = self._store.latest_step
        kept = (
            "there is no checkpoint before it" if good is None else f"the last good checkpoint is that of step {good}"
        )
        return (
            f"{self._arm.folder}: {self._arm.name}: {problem}; its batch holds {named}; {kept}. "
            f"To skip such steps, raise config.train.max_skipped, now {self._run.config.train.max_skipped}."
        )
