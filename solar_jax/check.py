"""Check a chip before it is trusted: kernels, rates, and the training step beside what the planner says.

    python -m solar_jax.check [--out FILE.json] [--model SRC]
    python -m solar_jax.check --topology v5e-1 [--model L12,D1024,F4096,N8,K4,H128,V32000]

Every attention kernel of this platform runs against plain attention; matmuls, memory, links and copies are timed; a
small training step is compiled and takes three steps: a few minutes, most of them compilation. With --topology nothing
runs: kernels and step are compiled for that slice, which needs libtpu and no TPU. The report goes to standard output,
progress to standard error. The status is 1 if a kernel is wrong, and one sentence says which.
"""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local

WRONG = 1  # exit status


def define_flags() -> None:
    flags.DEFINE_string("out", None, "JSON file to write the report to.")
    flags.DEFINE_string("topology", None, "TPU slice to compile for, e.g. v5e-1, v6e-1, v5p-8; nothing is run.")
    flags.DEFINE_string("model", None, "SRC, or sizes by axis letter; a small model if not given.")
    flags.DEFINE_integer("length", None, "Tokens of a row of the training step.")
    flags.DEFINE_integer("rows", None, "Rows of the training step on each device.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    for name in ("length", "rows"):
        if (value := getattr(f, name)) is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}.")
    if f.model and not is_shape(f.model):
        check_local(f.model)
    if f.topology:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a chip that is here may be at work
    if f.out is None:
        return
    if not is_local(f.out):
        raise UserError(f"--out={f.out}: expected a local file.")
    folder = pathlib.Path(f.out).expanduser().parent
    if not folder.is_dir() or pathlib.Path(f.out).is_dir():
        raise UserError(f"--out={f.out}: expected a file in a folder that exists.")


def is_shape(text: str) -> bool:
    """Returns whether a model is given by its sizes, as L12,D1024,F4096,N8,K4,H128,V32000."""
    return all(part[:1].isupper() and part[1:].isdigit() for part in text.split(","))


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

import dataclasses
import platform
import sys
from typing import Any

import jax

from solar_jax.checking.compiled import KernelCompilation, kernel_compilations
from solar_jax.checking.kernels import KERNELS, KernelCheck, comparisons, make_cases
from solar_jax.checking.rates import Rate, rates
from solar_jax.checking.report import check_report, failure
from solar_jax.checking.steps import (
    SMALL,
    SMALLEST,
    STEPS,
    StepCheck,
    compile_for,
    parse_shape,
    planned_step,
    run_here,
    step_config,
)  # fmt: skip
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.config import ModelConfig
from solar_jax.hardware.slices import Slice, find_slice
from solar_jax.hardware.versions import COMPILERS, installed_versions
from solar_jax.parallel import processes
from solar_jax.planning import search
from solar_jax.planning.search import Devices
from solar_jax.storage.json_files import write_json


@dataclasses.dataclass
class Checked:
    """Findings of a check, part by part."""

    facts: dict[str, str]
    kernels: list[KernelCheck] = dataclasses.field(default_factory=list)
    compiled: list[KernelCompilation] = dataclasses.field(default_factory=list)
    rates: list[Rate] = dataclasses.field(default_factory=list)
    step: StepCheck | None = None

    def report(self) -> str:
        return check_report(self.facts, self.kernels, self.compiled, self.rates, self.step)

    def failure(self) -> str:
        return failure(self.kernels, self.compiled, self.step)

    def content(self) -> dict[str, Any]:
        """Returns the content of --out."""
        return _finite(dataclasses.asdict(self) | {"failure": self.failure()})


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    if f.topology:
        found = check_topology(find_slice(f.topology, "--topology"), f.model, f.length, f.rows)
    else:
        processes.join()
        found = check_machine(f.model, f.length, f.rows)
    if processes.is_first():
        print(found.report(), flush=True)
        if f.out:
            write_json(pathlib.Path(f.out).expanduser(), found.content())
    if said := found.failure():
        sys.stderr.write(f"error: {said}\n")
        sys.exit(WRONG)


def check_machine(model: str | None = None, length: int | None = None, rows: int | None = None) -> Checked:
    """Runs kernels, rates and a training step on this machine's devices.

    Args:
      model: SRC or sizes; a small model if None.
      length: T of the step.
      rows: of the step, on each device.

    Raises:
      UserError: bad model, or one that does not fit the devices.
    """
    devices, device = search.present(), jax.devices()[0]
    cfg, length, rows = _step_of(model, length, rows, small=devices.platform == "cpu")
    found = Checked(_versions() | _machine(devices))

    # ---- Kernels --------------------------------------------------------------------------------------------------
    total = sum(len(make_cases(kernel, small=devices.platform == "cpu")) for kernel in KERNELS[device.platform])
    _say(f"attention kernels {', '.join(KERNELS[device.platform])}: {total} cases, forward and backward")
    for one in comparisons(device.platform):
        found.kernels.append(one)
        _say(f"  {len(found.kernels)}/{total} {one.kernel}, {one.case}: {one.problem or 'ok'}")

    # ---- Rates ----------------------------------------------------------------------------------------------------
    _say("rates: matmuls, attention, memory, links, copies")
    for rate in rates(devices.chip):
        found.rates.append(rate)
        _say(f"  {rate.name}: {'not measured' if rate.found is None else f'{rate.found / 1e9:,.1f} G{rate.unit[1:]}'}")

    # ---- The training step ------------------------------------------------------------------------------------------
    planned, option, partition = planned_step(cfg, step_config(devices, rows, length), devices)
    _say(f"training step: {planned.model}; compiling, then {1 + STEPS} steps")
    found.step = run_here(planned, cfg, option, partition)
    return found


def check_topology(
    wanted: Slice, model: str | None = None, length: int | None = None, rows: int | None = None
) -> Checked:
    """Compiles kernels and a training step for a slice that need not exist.

    Args:
      wanted: the slice.
      model: SRC or sizes; a small model if None.
      length: T of the step.
      rows: of the step, on each device.

    Raises:
      UserError: bad model, one that does not fit the slice, or no libtpu.
    """
    devices = search.of_slice(wanted)
    cfg, length, rows = _step_of(model, length, rows, small=False)
    chips = f"{wanted.name}: {wanted.chips} x {wanted.chip}, {wanted.devices} device(s), {wanted.topology}"
    found = Checked(_versions() | {"compiled for": chips, "checked": "nothing was run"})
    _say(f"{wanted.name}: compiling attention kernels, some seconds each")
    for one in kernel_compilations(wanted):
        found.compiled.append(one)
        _say(f"  {one.kernel}, {one.case}: {one.problem or f'compiles, {one.compile_seconds:.0f} s'}")
    planned, option, partition = planned_step(cfg, step_config(devices, rows, length), devices)
    _say(f"training step: {planned.model}; compiling")
    found.step = compile_for(planned, cfg, option, wanted, partition)
    return found


def _step_of(model: str | None, length: int | None, rows: int | None, *, small: bool) -> tuple[ModelConfig, int, int]:
    """Returns model, T and rows a device of the step."""
    shape, tokens, count = SMALLEST if small else SMALL
    length, rows, text = length or tokens, rows or count, model or shape
    return parse_shape(text, length) if is_shape(text) else open_checkpoint(text).cfg, length, rows


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()} | installed_versions(("solar_jax", *COMPILERS))
    return {"versions": ", ".join(f"{name} {version}" for name, version in found.items())}


def _machine(devices: Devices) -> dict[str, str]:
    device = jax.devices()[0]
    row = "no row in the planner's table"
    if devices.chip:
        row = f"{devices.chip.kinds[-1]}: {devices.chip.memory} GiB, {devices.chip.peak / 1e12:,.0f} TFLOP/s"
    return {
        "devices": f"{devices.count} x {devices.kind} ({devices.platform}), {jax.process_count()} process(es), "
        f"{devices.memory / 2**30:.1f} GiB each",
        "runtime": " ".join(str(device.client.platform_version).split())[:200],
        "planner": row,
    }


def _finite(value: Any) -> Any:
    """Replaces numbers that JSON does not have by their names."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def _say(text: str) -> None:
    if processes.is_first():
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    command.start(main)
