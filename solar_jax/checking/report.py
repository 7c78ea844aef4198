"""The report of a check: tables that can be pasted into an issue, and the sentence that it fails with."""

import math
from collections.abc import Sequence
from typing import Any

from solar_jax.checking.compiled import KernelCompilation
from solar_jax.checking.kernels import OUTPUTS, TOLERANCES, KernelCheck
from solar_jax.checking.rates import Rate
from solar_jax.checking.steps import StepCheck

MIB = 2**20
_SCALES = {"TFLOP/s": 1e12, "GB/s": 1e9}


def check_report(
    facts: dict[str, str], kernels: Sequence[KernelCheck], compiled: Sequence[KernelCompilation],
    measured: Sequence[Rate], step: StepCheck | None,
) -> str:  # fmt: skip
    """Formats everything that was found; a part that is empty is left out.

    Args:
      facts: what was checked, by name: versions, devices, the planner's row.
      kernels: comparisons on this machine.
      compiled: kernels compiled for a slice.
      measured: rates of this machine.
      step: the training step.
    """
    wide = max(map(len, facts)) + 2
    parts = ["\n".join(f"{name:<{wide}}{value}" for name, value in facts.items())]
    parts += [comparison_table(kernels)] if kernels else []
    parts += [compilation_table(compiled)] if compiled else []
    parts += [rate_table(measured)] if measured else []
    parts += [step_table(step)] if step else []
    return "\n\n".join(parts)


def comparison_table(kernels: Sequence[KernelCheck]) -> str:
    """Formats one line per kernel and case: the largest differences from plain attention."""
    tolerances = ", ".join(f"{dtype} {tolerance:.0e}" for dtype, tolerance in TOLERANCES.items())
    lines = [
        "Attention kernels against plain attention in float32, forward and backward. abs: the largest difference of",
        "a value; out, dq, dk, dv: the largest of a token's vector in a head, over its norm, the root mean square of",
        f"all norms and a tenth of the largest. Tolerances: {tolerances}.",
        "",
    ]
    wide = max(len(str(one.case)) for one in kernels) + 2
    lines.append(f"{'kernel':<8}{'case':<{wide}}{'abs':>8}" + "".join(f"{name:>9}" for name in OUTPUTS))
    for one in kernels:
        numbers = ""
        if one.errors:
            numbers = f"{_largest(one.errors.absolute.values()):>8.0e}"
            numbers += "".join(f"{one.errors.relative[name]:>9.1e}" for name in OUTPUTS)
        verdict = f"WRONG: {one.problem}" if one.problem else "ok"
        lines.append(f"{one.kernel:<8}{one.case!s:<{wide}}{numbers}  {verdict}")
    return "\n".join(lines)


def _largest(values: Any) -> float:
    return max(values, key=lambda x: (not math.isfinite(x), x))


def compilation_table(compiled: Sequence[KernelCompilation]) -> str:
    """Formats one line per kernel and case: what the compiler says, and the planner's numbers."""
    lines = [
        "Attention kernels compiled for one device, forward and backward. VMEM: the planner's need, of what the chip",
        "has. HBM: the compiler's. cycles, around: the compiler's, of the operations around the kernels, and at the",
        "chip's clock. kernel: the planner's time of the kernels, at half of the peak; the compiler has none.",
        "",
    ]
    wide = max(len(str(one.case)) for one in compiled) + 2
    lines.append(
        f"{'kernel':<8}{'case':<{wide}}{'VMEM MiB':>12}{'HBM MiB':>9}{'cycles':>11}{'around':>10}{'kernel':>10}"
        f"{'compiled':>10}"
    )
    for one in compiled:
        limit = one.vector_memory_limit // MIB
        vmem = f"{one.vector_memory / MIB:.0f} of {limit}" if one.vector_memory else f"blocks, {limit}"
        numbers = f"{vmem:>12}"
        if one.memory is not None:
            numbers += (
                f"{one.memory / MIB:>9.0f}{one.other_cycles or 0:>11,.0f}{_milliseconds(one.other_seconds):>10}"
                f"{_milliseconds(one.kernel_seconds):>10}{one.compile_seconds:>8.1f} s"
            )
        lines.append(f"{one.kernel:<8}{one.case!s:<{wide}}{numbers}  {one.problem or 'compiles'}")
    return "\n".join(lines)


def rate_table(measured: Sequence[Rate]) -> str:
    """Formats one line per rate: what was measured, the planner's number, and the first over the second."""
    lines = [f"{'rate of a device':<22}{'':<8}{'measured':>10}{'planner':>10}{'ratio':>8}"]
    for one in measured:
        scale = _SCALES[one.unit]
        found, table = (f"{x / scale:,.2f}" if x else "-" for x in (one.found, one.table))
        ratio = f"{one.ratio:.2f}" if one.ratio else "-"
        lines.append(f"{one.name:<22}{one.unit:<8}{found:>10}{table:>10}{ratio:>8}  {one.note}".rstrip())
    return "\n".join(lines)


def step_table(step: StepCheck) -> str:
    """Formats the training step: memory and time by the compiler and the clock, beside the planner's."""
    lines = [
        f"training step: {step.model}, {step.rows} x {step.length} tokens; {step.option}, attention {step.attention}",
        f"{'':<22}{'found':>12}{'planner':>12}{'ratio':>8}",
        _step_line("memory, compiler", "MiB", step.compiled_bytes, step.planned_bytes, MIB),
    ]
    if step.compiled_seconds is not None:
        lines.append(_step_line("time, compiler", "ms", step.compiled_seconds, step.planned_seconds, 1e-3))
    if step.measured_seconds:
        fastest = min(step.measured_seconds)
        lines.append(_step_line("time, measured", "ms", fastest, step.planned_seconds, 1e-3))
        lines[-1] += "  steps of " + ", ".join(_milliseconds(s) for s in step.measured_seconds)
    lines.append(f"{'compilation':<22}{step.compile_seconds:>10.1f} s")
    if step.planned_seconds is None:
        lines.append("the planner's table has no row for this device: it predicts no time")
    return "\n".join([*lines, *([step.problem] if step.problem else [])])


def _step_line(name: str, unit: str, found: float | None, planned: float | None, scale: float) -> str:
    values = (f"{x / scale:,.2f}" if x else "-" for x in (found, planned))
    ratio = f"{found / planned:.2f}" if found and planned else "-"
    return f"{f'{name}, {unit}':<22}" + "".join(f"{value:>12}" for value in values) + f"{ratio:>8}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f} ms"


def failure(
    kernels: Sequence[KernelCheck], compiled: Sequence[KernelCompilation], step: StepCheck | None
) -> str:  # fmt: skip
    """Returns the sentence that a check fails with, "" if all is well.

    A kernel that the planner knows not to fit is no failure: no run would take it.
    """
    bad = [(one.kernel, one.case, one.problem) for one in kernels if one.problem]
    bad += [(one.kernel, one.case, one.problem) for one in compiled if one.problem and not one.foreseen]
    if bad:
        kernel, case, problem = bad[0]
        names = ", ".join(dict.fromkeys(name for name, _, _ in bad))
        count = f"; {len(bad)} of {len(kernels) + len(compiled)} cases are wrong, of {names}" if len(bad) > 1 else ""
        return f"attention kernel {kernel!r} is wrong on {case}: it {_sentence(problem)}{count}."
    return f"training step: {step.problem}." if step and step.problem else ""


def _sentence(problem: str) -> str:
    return problem if problem.startswith("does") else f"is too far from plain attention: {problem}"
