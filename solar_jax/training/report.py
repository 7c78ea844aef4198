"""Reports of a run: the announcement before it starts, and summary.json, loss.png and the table after it ends."""

import dataclasses
import importlib.metadata
import pathlib
from typing import Any

import jax

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.cli.plots import plot_losses
from solar_jax.cli.progress import duration
from solar_jax.config import Config, ModelConfig
from solar_jax.data.corpus import Corpus
from solar_jax.data.pipeline import passes
from solar_jax.growth.apply import grown_config
from solar_jax.growth.operators import beside_map
from solar_jax.growth.picture import layer_list, picture
from solar_jax.hardware import chips
from solar_jax.model.flops import flops_per_token
from solar_jax.model.precision import compute_dtype
from solar_jax.model.shapes import parameter_count
from solar_jax.monitoring import metrics
from solar_jax.monitoring.goodput import StepSeconds, step_note
from solar_jax.training.partition import Partition
from solar_jax.training.run import Run, say
from solar_jax.training.run_folder import flat

GIB = 2**30


def announce(
    config: Config, folder: pathlib.Path, deeper: Checkpoint, partition: Partition, corpus: Corpus, windows: int, *,
    resumes: bool, mesh: str, memory: str, padded: int,
) -> None:  # fmt: skip
    """Prints everything that is about to happen.

    Args:
      config: the run.
      folder: of the run.
      deeper: the grown checkpoint.
      partition: which of its parameters train.
      corpus: training and held-out rows.
      windows: held-out rows that are evaluated.
      resumes: whether the run began before.
      mesh: mesh, remat policy and microbatches, and whether they were chosen.
      memory: what a step needs of a device.
      padded: rows of a step with those that are added so that they divide over the mesh.
    """
    checkpoint, cfg = deeper.source, deeper.cfg
    base = checkpoint.cfg
    say("\n".join(f"{key} = {value!r}" for key, value in flat(dataclasses.asdict(config)).items()))
    say(f"\n{'Resuming' if resumes else 'Starting'} {config.name} in {folder}")
    say(f"base      {checkpoint.where}: {base.num_hidden_layers} layers, stored as {checkpoint.dtype}")
    say(f"growth    {picture(deeper.layer_map, parameter_count(base), parameter_count(cfg))}")
    say(f"trained   {config.train.trainable}: layers {layer_list([i for i, t in enumerate(partition.layers) if t])}")
    for note in corpus.notes:
        say(f"text      {note}")
    readings = passes(corpus, config.train.steps * config.train.batch_size, resumes=resumes)
    for (source, rows), times in zip(corpus.train, readings, strict=True):
        say(
            f"data      {source.path}: {rows.tokens:,} training tokens, {len(rows):,} rows, "
            f"weight {source.weight:g}, read {times:.2f} times"
        )
    for source, rows in corpus.heldout:
        say(f"held out  {source.path}: {rows.tokens:,} tokens")
    batch, length, steps = config.train.batch_size, config.data.sequence_length, config.train.steps
    say(
        f"training  {steps} steps of {batch} x {length} = {batch * length:,} tokens, {steps * batch * length:,} total"
        f"{', and the control the same' if config.train.control else ''}; held-out loss on {windows} rows"
    )
    if padded > batch:
        say(f"padding   {batch} rows a step do not divide over the mesh: {padded - batch} rows of padding are added")
    kind = jax.devices()[0].device_kind
    say(f"devices   {jax.device_count()} x {kind}, {jax.process_count()} process(es)")
    say(mesh)
    say(f"memory    about {memory}; a device here has {chips.memory_bytes(jax.local_devices()[0]) / GIB:.1f} GiB")
    if cut := beside_map(config.growth, base.num_hidden_layers):
        say(f"beside    {cut.operator}: {cut.layers} layers, trained on the same tokens")
    seconds = expected_seconds(config, base, cfg, windows)
    say(f"time      about {duration(seconds)}; each step will show what is left\n")


def expected_seconds(config: Config, base: ModelConfig, cfg: ModelConfig, windows: int) -> float:
    """Estimates the run's time: model FLOPs at half of a matmul's measured rate, or at 40 % of the chip's peak."""
    length = config.data.sequence_length
    train_tokens = config.train.steps * config.train.batch_size * length
    per_arm = 2 + (config.train.steps // config.evaluation.every - 1 if config.evaluation.every else 0)
    flops = 0.0
    arms = [(base, config.train.control), (cfg, True)]
    if cut := beside_map(config.growth, base.num_hidden_layers):
        arms.append((grown_config(base, cut), True))
    for arm, trains in arms:
        evals = per_arm if trains else 1
        flops += flops_per_token(arm, length) * (train_tokens * trains + evals * windows * length / 3)
    peak = chips.peak_flops(jax.devices()[0])
    rate = 0.4 * peak * jax.device_count() if peak else 0.5 * chips.measured_flops(compute_dtype(config.train))
    return flops / rate


def summarise(run: Run, seconds: float) -> dict[str, Any]:
    """Returns the content of summary.json; losses are held-out means in nats per token."""
    config, base, layer_map, cfg = run.config, run.checkpoint.cfg, run.grown.layer_map, run.grown.cfg
    evals = run.evals.read()
    loss = {(r["arm"], r["step"]): r["loss"] for r in evals}
    last = max(step for arm, step in loss if arm == run.arm)
    first = run.arm if run.kind == "text" else evals[0]["arm"]  # of chunks, the first one's start
    start = max(config.growth.steps, default=0)
    more = {
        f"{when}_{key}": value
        for r in evals
        for when, place in (("start", (first, start)), ("final", (run.arm, last)))
        if (r["arm"], r["step"]) == place
        for key, value in r.items()
        if key not in ("arm", "step", "loss")
    }
    lines = _lines(run, run.arm)
    others = [r for name in ("beside", "control") for r in _lines(run, name)]
    if cut := beside_map(config.growth, base.num_hidden_layers):
        more["beside"] = {
            "operator": cut.operator,
            "layers": cut.layers,
            "params": parameter_count(grown_config(base, cut)),
            "source_layers": list(cut.source),
            "zero_token_loss": loss["beside", 0],
            "final_loss": loss["beside", config.train.steps],
        }
    rates = sorted(r["tokens_per_second"] for r in lines)
    used = [r["mfu"] for r in lines if r["mfu"] is not None]
    return {
        "name": config.name,
        "kind": run.kind,
        "base_loss": loss.get(("base", 0)),
        "zero_token_loss": loss[first, start],
        "final_loss": loss[run.arm, last],
        "control_loss": loss.get(("control", config.train.steps)),
        **more,
        "layers": cfg.num_hidden_layers,
        "params": parameter_count(cfg),
        "tokens": lines[-1]["tokens"],
        "source_layers": list(layer_map.source),
        "operator": layer_map.operator,
        "base_layers": base.num_hidden_layers,
        "base_params": parameter_count(base),
        "steps": last,
        "heldout_targets": int(sum(float(b["weights"].sum()) for b in run.heldout)),
        "tokens_per_second": rates[len(rates) // 2],
        "mfu": sorted(used)[len(used) // 2] if used else None,
        "seconds": round(seconds, 1),
        "time": run.ledger.summary(lines + others),
        "memory_peak_gib": chips.memory_peaks(),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "mesh": dict(run.mesh.shape),
        "source": run.checkpoint.where,
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "flax", "optax", "orbax-checkpoint", "grain")},
    }


def _lines(run: Run, arm: str) -> list[dict[str, Any]]:
    """The metrics of an arm; those of the run's own are in its folder."""
    return metrics.JsonLines((run.workdir if arm == run.arm else run.workdir / arm) / "metrics.jsonl").read()


def draw(run: Run, summary: dict[str, Any]) -> None:
    """Draws loss.png: the healing curve with the base's line and the control's curve."""
    arms = {}
    shown = {run.arm: run.arm, "control": "control"}
    if "beside" in summary:
        shown = {run.arm: run.arm, "beside": f"beside, {summary['beside']['operator']}", "control": "control"}
    for name, label in shown.items():
        heldout = [(r["step"], r["loss"]) for r in run.evals.read() if r["arm"] == name]
        if lines := _lines(run, name):
            trained = [(r["step"], r["loss"]) for r in lines if r["loss"] is not None]
            arms[label] = {"heldout": heldout, "train": trained}
    name = pathlib.PurePath(summary["source"]).name
    title = f"{name}, {summary['operator']}: {summary['base_layers']} to {summary['layers']} layers"
    a_step = run.config.train.batch_size * run.config.data.sequence_length
    plot_losses(run.workdir / "loss.png", title, summary["base_loss"], arms, a_step)


def result_table(s: dict[str, Any]) -> str:
    """Formats the result in a few lines."""
    if s.get("kind", "text") != "text":
        return _tuning_table(s)
    rows = [
        ("base", s["base_layers"], s["base_params"], 0, s["base_loss"]),
        (f"grown, {s['operator']}", s["layers"], s["params"], 0, s["zero_token_loss"]),
        ("healed", s["layers"], s["params"], s["tokens"], s["final_loss"]),
    ]
    if cut := s.get("beside"):
        rows.append((f"grown, {cut['operator']}", cut["layers"], cut["params"], 0, cut["zero_token_loss"]))
        rows.append(("healed", cut["layers"], cut["params"], s["tokens"], cut["final_loss"]))
    if s["control_loss"] is not None:
        rows.append(("control, not grown", s["base_layers"], s["base_params"], s["tokens"], s["control_loss"]))
    wide = max(24, *(len(row[0]) + 1 for row in rows))
    lines = [f"{'model':<{wide}}{'layers':>7}{'parameters':>16}{'tokens':>14}{'held-out loss':>15}"]
    lines += [
        f"{name:<{wide}}{layers:>7}{params:>16,}{tokens:>14,}{loss:>15.4f}"
        for name, layers, params, tokens, loss in rows
    ]
    return "\n".join(lines)


def _tuning_table(s: dict[str, Any]) -> str:
    """Formats the result of tuning: held-out measures before and after."""
    lines = [f"{'model':<24}{'layers':>7}{'tokens':>14}{'held-out loss':>15}"]
    for name, when, tokens, loss in (
        ("start", "start", 0, s["zero_token_loss"]), ("tuned", "final", s["tokens"], s["final_loss"])
    ):  # fmt: skip
        line = f"{name:<24}{s['layers']:>7}{tokens:>14,}{loss:>15.4f}"
        if f"{when}_accuracy" in s:
            line += f"   accuracy {100 * s[f'{when}_accuracy']:.1f} +- {100 * s[f'{when}_accuracy_error']:.1f} %"
        line += f"   end token {100 * s[f'{when}_end_probability']:.1f} %"
        lines.append(line)
    return "\n".join(lines)


def step_line(name: str, steps: int, r: dict[str, Any], spent: StepSeconds, eta: float) -> str:
    """Formats one step's log line."""
    used = "" if r["mfu"] is None else f"  mfu {100 * r['mfu']:.1f} %"
    return (
        f"{name} step {r['step']:>{len(str(steps))}}/{steps}  loss {r['loss']:.4f}  lr {r['learning_rate']:.2e}  "
        f"grad {r['grad_norm']:.2f}  {r['tokens_per_second']:,.0f} tok/s{used}{step_note(spent)}  "
        f"{duration(eta)} left"
    )
