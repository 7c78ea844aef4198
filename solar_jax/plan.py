"""Plan a run on TPU slices before renting them: memory, mesh, remat policy, time and price.

    python -m solar_jax.plan --config configs/dus_48l.py --slice v5p-128,v6e-256 [--tokens 3e11] [--compile]
    python -m solar_jax.plan --config configs/solar/chain.py --slice v5p-128,v5e-256

Of a chain every training stage is planned, and the cheapest slice of each is named.

What the config leaves open (axes of `config.mesh` set to 0, `train.remat="auto"`, `train.accumulation=0`) is searched.
Memory and time are estimated from shapes; `--compile` replaces them with the TPU compiler's own figures, which takes
minutes per slice and the package libtpu, but no TPU. `--save DIR` keeps the compiled step, which a run on that slice
loads with --config.train.compiled=DIR; without --slice it is compiled for this machine's devices.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from solar_jax.chaining.stages import Chain, is_chain, resolve_chain
from solar_jax.cli import command
from solar_jax.config import Config, ModelConfig, resolve
from solar_jax.errors import UserError


def define_flags() -> None:
    config_flags.DEFINE_config_file("config", None, "Config file, FILE.py[:ARGUMENT].")
    flags.DEFINE_list("slice", None, "TPU slices as Google names them, e.g. v5p-128,2xv6e-256.")
    flags.DEFINE_bool("compile", False, "Check each choice with the TPU compiler and use its figures.")
    flags.DEFINE_float("tokens", None, "Tokens to train on, e.g. 3e11; the config's own if not given.")
    flags.DEFINE_string("prices", None, "JSON file of dollars per chip-hour that replace list prices, {'v5p': 4.2}.")
    flags.DEFINE_float("failures", None, "Failures of a chip and year, e.g. 0.17; prints what they cost.")
    flags.DEFINE_float("time_limit", 1800.0, "Seconds after which no further compilation is started.")
    flags.DEFINE_string("save", None, "Folder, local or in a bucket, for the compiled step of the one slice.")
    flags.DEFINE_string("json", None, "File to write the plan to as JSON.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if f.config is None or not (f.slice or f.save):
        raise UserError("plan needs --config FILE and --slice NAME, for example --slice=v5p-128,v6e-256.")
    if f.failures is not None and not f.failures > 0:
        raise UserError(f"--failures must be above 0, found {f.failures}.")
    if f.save and (is_chain(f.config) or (f.slice and len(f.slice) > 1)):
        raise UserError("--save keeps the step of one run on one slice; give one --slice, or none for this machine.")
    if f.save and not resolve(f.config).train.steps:
        raise UserError("--save needs config.train.steps: the learning rate's schedule is part of the compiled step.")
    if is_chain(f.config):
        resolve_chain(f.config)
        if f.tokens is not None:
            raise UserError("--tokens is for one run; a chain's stages state their own.")
    else:
        resolve(f.config)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

import jax

from solar_jax.chaining.planned import planned_stages
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.cli.progress import duration, ticking
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import make_layer_map
from solar_jax.hardware import compilation
from solar_jax.hardware.chips import CHIPS, compiler_options
from solar_jax.hardware.slices import Slice, described_devices, find_slice
from solar_jax.model.flops import flops_per_token
from solar_jax.model.shapes import parameter_count
from solar_jax.parallel.mesh import make_mesh
from solar_jax.parallel.rules import padded_rows
from solar_jax.planning import search
from solar_jax.planning.aot import compile_step, lower_step
from solar_jax.planning.failures import failure_cost
from solar_jax.planning.memory import GIB, Need
from solar_jax.planning.search import Devices, Option
from solar_jax.planning.table import dollars, failure_table, plan_table
from solar_jax.storage.json_files import read_json_object, write_json
from solar_jax.storage.paths import path
from solar_jax.training.partition import Partition, make_partition
from solar_jax.training.saved_program import save_program

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # start of the compiler's error when memory is too small


@dataclasses.dataclass(frozen=True)
class Result:
    """Chosen way to run the step on a slice."""

    option: Option
    hbm: float  # bytes per device
    seconds: float
    compiled: bool
    fits: bool = True


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    if not f.slice:
        save_here(resolve(f.config), path(f.save))
        return
    slices, prices = [find_slice(name) for name in f.slice], read_prices(f.prices)
    if is_chain(f.config):
        plan_chain(
            resolve_chain(f.config), slices, compiles=f.compile, prices=prices, time_limit=f.time_limit, file=f.json
        )
        return
    plan(
        resolve(f.config), slices, compiles=f.compile or f.save is not None, tokens=f.tokens, prices=prices,
        time_limit=f.time_limit, file=f.json, save=path(f.save) if f.save else None, failures=f.failures,
    )  # fmt: skip


def save_here(config: Config, folder: pathlib.Path) -> None:
    """Compiles a run's step for the devices of this machine and saves it.

    Raises:
      UserError: the config does not fit them.
    """
    compilation.use_cache(config.logging.compilation_cache)
    cfg, partition = grown_shape(config, base_shape(config))
    option, need = search.choose(cfg, config, search.present(), partition)
    show(f"{config.name} on {jax.device_count()} {jax.devices()[0].device_kind} device(s): {option}, {need}")
    mesh = make_mesh(option.config.mesh)
    lowered = lower_step(cfg, option.config, mesh, partition)
    options = compiler_options(jax.devices()[0], option.config.train.offload_collectives)
    compiled = lowered.compile(options or None)
    show(saved_line(folder, save_program(folder, cfg, option.config, mesh, lowered, compiled)))


def saved_line(folder: pathlib.Path, size: int) -> str:
    return f"compiled step saved, {size / 1e6:.1f} MB: run with --config.train.compiled={folder}"


def base_shape(config: Config) -> ModelConfig:
    """Returns the shape of the model that a run starts from."""
    return config.model.architecture if config.model.num_hidden_layers else open_checkpoint(config.source).cfg


def grown_shape(config: Config, base: ModelConfig) -> tuple[ModelConfig, Partition]:
    """Returns the shape of the grown model, and which parameters train."""
    layer_map = make_layer_map(base.num_hidden_layers, config.growth)
    partition = make_partition(config.train.trainable, layer_map, config.lora, config.growth.new_rate)
    return grown_config(base, layer_map), partition


def plan_chain(
    chain: Chain, slices: Sequence[Slice], *, compiles: bool, prices: dict[str, float], time_limit: float,
    file: str | None,
) -> dict[str, list[dict[str, Any]]]:  # fmt: skip
    """Plans every training stage on each slice, and prints the cheapest one that each fits on.

    Returns:
      The rows of each stage, which `--json` writes.
    """
    found, lines, hours, total = {}, [], 0.0, 0.0
    for one in planned_stages(chain, pathlib.Path("runs") / chain.name):
        show(f"\n==== {one.stage.name}: {one.stage.config}")
        tokens = one.stage.tokens or None
        rows = plan(
            one.config, slices, compiles=compiles, tokens=tokens, prices=prices, time_limit=time_limit, base=one.base
        )
        found[one.stage.name] = rows
        best = min([r for r in rows if r["fits"]], key=lambda r: r["dollars"], default=None)
        if best is None:
            lines.append(f"{one.stage.name:<10}fits none of these slices")
            continue
        hours, total = hours + best["hours"], total + best["dollars"]
        lines.append(
            f"{one.stage.name:<10}{best['slice']:<14}{best['hbm_gib']:>8.1f}{best['step_seconds']:>9.3f}"
            f"{best['hours']:>10.2f}{dollars(best['dollars']):>12}"
        )
    show(f"\n{chain.name}\n{'stage':<10}{'slice':<14}{'HBM GiB':>8}{'step s':>9}{'hours':>10}{'dollars':>12}")
    show("\n".join([*lines, f"{'all':<10}{'':<31}{hours:>10.2f}{dollars(total):>12}"]))
    show("merges and measures: minutes on the hosts of the last slice, not counted")
    if file:
        write_json(pathlib.Path(file), {"stages": found})
    return found


def plan(
    config: Config, slices: Sequence[Slice], *, compiles: bool = False, tokens: float | None = None,
    prices: dict[str, float] | None = None, time_limit: float = 1800.0, file: str | None = None,
    base: ModelConfig | None = None, save: pathlib.Path | None = None,
    failures: float | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Plans a run on each slice, prints the plan, and returns the rows that `--json` writes.

    Args:
      config: the run.
      slices: where.
      compiles: whether the TPU compiler checks each choice.
      tokens: in all; the config's own if None.
      prices: dollars per chip-hour by chip, in place of list prices.
      time_limit: seconds after which no further compilation is started.
      file: where the rows are written.
      base: shape of the model that the run starts from; that of the config or of its source if None.
      save: where the compiled step is saved.
      failures: of a chip and year, whose cost is printed.

    Raises:
      UserError: the config, or the mesh that it asks for, is impossible; or no step was compiled that could be saved.
    """
    # ---- The run ----------------------------------------------------------------------------------------------------
    begin = time.monotonic()
    cfg, partition = grown_shape(config, base or base_shape(config))
    step_tokens = config.train.batch_size * config.data.sequence_length
    tokens = config.train.steps * step_tokens if tokens is None else tokens
    if not tokens and config.train.epochs:
        raise UserError("plan needs --tokens where the config counts epochs: it opens no data.")
    if not tokens > 0:
        raise UserError(f"--tokens must be above 0, found {tokens}.")
    show(
        f"{config.name}: {cfg.num_hidden_layers} layers, {parameter_count(cfg):,} parameters; "
        f"{config.train.batch_size} x {config.data.sequence_length:,} = {step_tokens:,} tokens per step, {tokens:.4g} "
        f"in total, precision {config.train.precision}"
    )
    show(
        f"model FLOPs per token, 6 x matmul weights + 12 x heads x head_dim x keys per layer: "
        f"{flops(cfg, config) / 1e9:.2f} G causal (T/2 keys), {flops(cfg, config, causal=False) / 1e9:.2f} G non-causal"
    )
    if compiles and (missing := no_compiler(slices[0])):
        compiles = False
        show(f"estimated, not compiled: {missing}")

    # ---- Each slice -------------------------------------------------------------------------------------------------
    rows = []
    for wanted in slices:
        devices = search.of_slice(wanted)
        result = estimated(cfg, config, wanted, devices, partition)
        if compiles and result.fits:
            result = checked(cfg, config, wanted, devices, begin + time_limit, partition, save) or result
        if save and not result.compiled:
            raise UserError(f"--save: no step was compiled for {wanted.name}, so none is saved.")
        rows.append(row(cfg, wanted, result, tokens, (prices or {}).get(wanted.chip, wanted.facts.price)))
        if failures:
            need = search.need(cfg, result.option, partition)
            cost = failure_cost(
                failures, wanted.chips, result.seconds, config.checkpoint.every, need.parameters + need.optimizer
            )
            rows[-1]["failures"] = dataclasses.asdict(cost)

    # ---- The plan ---------------------------------------------------------------------------------------------------
    show(f"\n{plan_table(rows, tokens)}")
    if failures:
        show(f"\n{failure_table(rows, failures, config.checkpoint.every)}")
    if file:
        write_json(pathlib.Path(file), {"slices": rows})
    return rows


def show(text: str) -> None:
    print(text, flush=True)


def flops(cfg: ModelConfig, config: Config, *, causal: bool = True) -> float:
    return flops_per_token(cfg, config.data.sequence_length, causal=causal, adapters=config.lora.rank > 0)


def read_prices(file: str | None) -> dict[str, float]:
    """Reads the user's prices by chip.

    Raises:
      UserError: the file holds something else.
    """
    if file is None:
        return {}
    prices = read_json_object(pathlib.Path(file))
    for chip, price in prices.items():
        if chip not in CHIPS:
            raise UserError(f"{file}: {chip!r} is not a known chip; chips are {', '.join(CHIPS)}.")
        if type(price) not in (int, float) or not price >= 0:
            raise UserError(f"{file}: the price of {chip} must be dollars per chip-hour, found {price!r}.")
    return prices


def no_compiler(wanted: Slice) -> str:
    """Returns why nothing can be compiled on this machine, or ""."""
    try:
        described_devices(wanted)
    except UserError as e:
        return str(e)
    return ""


def estimated(cfg: ModelConfig, config: Config, wanted: Slice, devices: Devices, partition: Partition) -> Result:
    """Returns the best way by shapes alone, and prints what every policy needs on its mesh."""
    chip = wanted.facts
    found = search.options(cfg, config, devices, partition)
    show(
        f"\n{wanted.name}: {wanted.chips:,} chips, per device {chip.memory:.1f} GiB, {chip.peak / 1e12:,.0f} TFLOP/s; "
        f"{len(found):,} options"
    )
    option, need = search.best(cfg, found, devices, partition)
    rows = padded_rows(config.train.batch_size, option.mesh, option.config.train.accumulation)
    if rows > config.train.batch_size:
        show(
            f"warning: a batch of {config.train.batch_size} rows is too small for this slice: {rows} rows are computed "
            f"per step, the others of padding; raise config.train.batch_size to {rows} or take fewer chips"
        )
    show(policies(cfg, option, devices, partition))
    fits = search.fits(need, devices)
    show(f"{'best' if fits else 'does not fit; smallest'}: {option}, {need}")
    assert option.time is not None
    return Result(option, need.total, option.time.total, compiled=False, fits=fits)


def policies(cfg: ModelConfig, option: Option, devices: Devices, partition: Partition) -> str:
    """Formats a line for every remat policy on an option's mesh, in GiB per device."""
    parts = [field.name for field in dataclasses.fields(Need)]
    lines = [f"{'remat':<12}{'HBM GiB':>9}" + "".join(f"{name:>13}" for name in parts) + f"{'step s':>9}"]
    for other in search.other_policies(cfg, option, devices, partition):
        need = search.need(cfg, other, partition)
        sizes = "".join(f"{getattr(need, name) / GIB:>13.2f}" for name in parts)
        mark = " <" if other.config == option.config else "" if search.fits(need, devices) else " does not fit"
        seconds = other.time.total if other.time else 0.0
        lines.append(f"{other.config.train.remat:<12}{need.total / GIB:>9.2f}{sizes}{seconds:>9.3f}{mark}")
    return "\n".join(lines)


def checked(
    cfg: ModelConfig, config: Config, wanted: Slice, devices: Devices, deadline: float, partition: Partition,
    save: pathlib.Path | None = None,
) -> Result | None:  # fmt: skip
    """Returns the best way that the TPU compiler accepts, with its figures; None if time runs out or none is left."""
    smallest = devices.memory
    for option in search.options(cfg, config, devices, partition):
        need = search.need(cfg, option, partition)
        if not search.fits(need, devices) or need.total >= smallest:
            continue
        if time.monotonic() > deadline:
            show("time limit reached: estimated, not compiled")
            return None
        begin = time.monotonic()
        show(f"compiling {option} for {wanted.name}")
        try:
            with ticking(f"compiling for {wanted.name}"):
                compiled = compile_step(cfg, option.config, wanted, partition=partition)
        except jax.errors.JaxRuntimeError as e:
            if OUT_OF_MEMORY not in str(e):
                raise
            show(f"does not fit according to the compiler: {str(e).splitlines()[0]}")
            smallest = need.total
            continue
        seconds, (hidden, _) = compiled.program.scheduled_seconds(), compiled.program.seconds()
        if unknown := compiled.program.unknown:
            show(f"kernels without a cost, so the step takes longer: {', '.join(sorted(unknown))}")
        show(
            f"compiled in {duration(time.monotonic() - begin)}: {compiled.total / GIB:.2f} GiB, estimated "
            f"{need.total / GIB:.2f}, step {seconds:.3f} s ({hidden:.3f} s if all communication were hidden)"
        )
        if save:
            size = save_program(save, cfg, option.config, compiled.mesh, compiled.lowered, compiled.executable)
            show(saved_line(save, size))
        return Result(option, compiled.total, seconds, compiled=True)
    show("no option fits according to the compiler")
    return None


def row(cfg: ModelConfig, wanted: Slice, result: Result, tokens: float, price: float) -> dict[str, Any]:
    """Returns the plan's row for a slice."""
    config, chip = result.option.config, wanted.facts
    rate = config.train.batch_size * config.data.sequence_length / result.seconds / wanted.chips
    hours = tokens / (rate * wanted.chips) / 3600
    peak = chip.peak * chip.devices
    return {
        "slice": wanted.name,
        "chips": wanted.chips,
        "mesh": dict(result.option.mesh.shape),
        "remat": config.train.remat,
        "accumulation": config.train.accumulation,
        "hbm_gib": round(result.hbm / GIB, 3),
        "step_seconds": result.seconds,
        "tokens_per_second_per_chip": rate,
        "mfu": rate * flops(cfg, config) / peak,
        "mfu_non_causal": rate * flops(cfg, config, causal=False) / peak,
        "hours": hours,
        "dollars": hours * wanted.chips * price,
        "fits": result.fits,
        "compiled": result.compiled,
    }


if __name__ == "__main__":
    command.start(main)
