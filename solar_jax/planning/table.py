"""The plan's table: a line per slice."""

from typing import Any

from solar_jax.cli.progress import duration
from solar_jax.planning.failures import RESTART, TO_HOST


def dollars(amount: float) -> str:
    """Formats dollars, with cents where they matter."""
    return f"{amount:,.2f}" if amount < 1000 else f"{amount:,.0f}"


def _mesh_text(r: dict[str, Any]) -> str:
    """Formats a row's mesh and, if there are several, microbatches."""
    mesh = " x ".join(f"{axis} {size}" for axis, size in r["mesh"].items() if size > 1) or "one device"
    return f"{mesh}, {r['accumulation']} microbatches" if r["accumulation"] > 1 else mesh


def plan_table(rows: list[dict[str, Any]], tokens: float) -> str:
    """Formats one line per slice."""
    meshes = [_mesh_text(r) for r in rows]
    wide = max(map(len, meshes)) + 2
    lines = [
        f"{'slice':<14}{'chips':>6}  {'mesh':<{wide}}{'remat':<11}{'HBM GiB':>8}{'step s':>9}{'tokens/s/chip':>14}"
        f"{'MFU causal, not':>17}{f'hours, {tokens:.3g} t':>18}{'dollars':>14}"
    ]
    for r, mesh in zip(rows, meshes, strict=True):
        how = "by the compiler" if r["compiled"] else "estimated" if r["fits"] else "does not fit (estimated)"
        lines.append(
            f"{r['slice']:<14}{r['chips']:>6}  {mesh:<{wide}}{r['remat']:<11}{r['hbm_gib']:>8.1f}"
            f"{r['step_seconds']:>9.3f}{r['tokens_per_second_per_chip']:>14,.0f}"
            f"{f'{r["mfu"]:.1%}, {r["mfu_non_causal"]:.1%}':>17}{r['hours']:>18,.1f}{dollars(r['dollars']):>14}  {how}"
        )
    return "\n".join(lines)


def failure_table(rows: list[dict[str, Any]], rate: float, every: int) -> str:
    """Formats what failures cost, one line per slice; `rate` is of a chip and year, `every` in steps."""
    lines = [
        f"failures: {rate:g} of a chip and year (assumed), restart {duration(RESTART)}, to the host "
        f"{TO_HOST / 1e9:.0f} GB/s a device, checkpoint.every={every}",
        f"{'slice':<14}{'every':>12}{'lost each':>12}{'save stalls':>13}{'goodput':>9}{'hours':>12}"
        f"{'best every':>12}{'goodput':>9}",
    ]
    for r in rows:
        f = r["failures"]
        hours = f"{r['hours'] / f['goodput']:,.1f}" if f["goodput"] else "never ends"
        lines.append(
            f"{r['slice']:<14}{duration(f['between']):>12}{duration(f['lost']):>12}{f['stall']:>11.1f} s"
            f"{f['goodput']:>9.2%}{hours:>12}{f['best_every']:>12,}{f['best_goodput']:>9.2%}"
        )
    return "\n".join(lines)
