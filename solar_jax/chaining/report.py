"""Reports of a chain: the plan before it starts, a table after each stage, and the model card's numbers."""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from solar_jax.chaining.planned import planned_stages
from solar_jax.chaining.record import Measured
from solar_jax.chaining.stages import Chain, MergeStage
from solar_jax.cli.progress import duration
from solar_jax.data.chat.formats import kind_of
from solar_jax.growth.operators import make_layer_map
from solar_jax.model.shapes import parameter_count
from solar_jax.planning import search
from solar_jax.training.partition import make_partition
from solar_jax.training.report import expected_seconds

_BYTES = 12  # of a checkpoint, per parameter: float32 weights and Adam's two moments


def plan_text(chain: Chain, workdir: pathlib.Path, done: Mapping[str, bool]) -> str:
    """Formats what will be run: each stage's work, memory, disk and time on the devices that are present.

    Raises:
      UserError: a stage does not fit on them.
    """
    devices, seconds, disk = search.present(), 0.0, 0.0
    lines = [f"{'stage':<10}{'from':<10}{'what':<34}{'parameters':>15}{'steps':>8}{'tokens':>14}{'time':>12}  memory"]
    planned = {one.stage.name: one for one in planned_stages(chain, workdir)}
    for stage in chain.stages:
        if isinstance(stage, MergeStage):
            what = f"{stage.candidates} candidates, best written"
            lines.append(f"{stage.name:<10}{'+'.join(stage.models):<10} {what:<33}{'':>49}  {_note(done, stage.name)}")
            continue
        one = planned[stage.name]
        config, partition = one.config, make_partition(
            one.config.train.trainable, make_layer_map(one.base.num_hidden_layers, one.config.growth), one.config.lora
        )  # fmt: skip
        _, need = search.choose(one.cfg, config, devices, partition)
        tokens = config.train.steps * config.train.batch_size * config.data.sequence_length
        its = expected_seconds(config, one.base, one.cfg, config.evaluation.windows)
        if not done[stage.name]:
            seconds += its
            disk += parameter_count(one.cfg) * (_BYTES * (config.checkpoint.keep or 1) + 4)
        what = f"{pathlib.PurePath(stage.config).name}, {kind_of(config.data.format)}"
        lines.append(
            f"{stage.name:<10}{stage.start or 'source':<10}{what:<34}{parameter_count(one.cfg):>15,}"
            f"{'~' if one.stage.tokens else ''}{config.train.steps:>{7 if one.stage.tokens else 8}}{tokens:>14,}"
            f"{duration(its):>12}  {need} {_note(done, stage.name)}"
        )
    kind = jax.devices()[0].device_kind
    lines.append(
        f"{jax.device_count()} x {kind}: about {duration(seconds)} of training, and measuring after each stage; "
        f"at most {disk / 1e9:.0f} GB of disk in {workdir}"
    )
    return "\n".join(lines)


def _note(done: Mapping[str, bool], name: str) -> str:
    return "(done)" if done[name] else ""


def cells(measured: Measured) -> list[str]:
    """The measures of one model: losses of each config, preference accuracy with its error, the end token."""
    losses = [f"{of['loss']:.4f}" for of in measured.values() if "accuracy" not in of]
    accuracy, end = "", ""
    for of in measured.values():
        if "likelihood_accuracy" in of:
            accuracy = f"{100 * of['likelihood_accuracy']:.1f} +- {100 * of['likelihood_accuracy_error']:.1f}"
        elif "end_probability" in of:
            end = f"{100 * of['end_probability']:.1f}"
    return [*losses, accuracy, end]


def _titles(measured: Measured) -> list[str]:
    losses = [
        "loss of answers" if "end_probability" in of else "loss of text"
        for of in measured.values()
        if "accuracy" not in of
    ]
    return [*losses, "preference accuracy, %", "end token, %"]


def stage_table(rows: Mapping[str, Measured], scores: Mapping[str, Mapping[str, float]]) -> str:
    """Formats the measures of every result so far, on the same held-out rows, and its scores of tasks."""
    titles = _titles(next(iter(rows.values())))
    lines = [f"{'result':<10}" + "".join(f"{title:>26}" for title in titles)]
    lines += [f"{name:<10}" + "".join(f"{cell:>26}" for cell in cells(of)) for name, of in rows.items()]
    if scores:
        wide = max(len(task) for of in scores.values() for task in of) + 2
        lines += ["", f"{'task':<{wide}}" + "".join(f"{name:>10}" for name in scores)]
        for task in next(iter(scores.values())):
            lines.append(
                f"{task:<{wide}}" + "".join(f"{of[task]:>10.3f}" if task in of else "" for of in scores.values())
            )
    return "\n".join(lines)


def stage_markdown(
    rows: Mapping[str, Measured], scores: Mapping[str, Mapping[str, float]], summaries: Mapping[str, Mapping[str, Any]]
) -> str:
    """Formats the measures of every result, its scores, and what each run's summary says, for the model card."""
    titles = _titles(next(iter(rows.values())))
    text = [f"| result | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    text += [f"| {name} | {' | '.join(cells(of))} |" for name, of in rows.items()]
    own = [f"| {name} | {of['zero_token_loss']:.4f} | {of['final_loss']:.4f} | {of['steps']:,} | {of['tokens']:,} |"
           for name, of in summaries.items()]  # fmt: skip
    if scores:
        text += ["", f"| task | {' | '.join(scores)} |", "|---" * (len(scores) + 1) + "|"]
        for task in next(iter(scores.values())):
            text.append(f"| {task} | " + " | ".join(f"{of[task]:.3f}" for of in scores.values()) + " |")
    if own:
        text += ["", "| stage | its held-out loss before | after | steps | tokens |", "|---|---|---|---|---|", *own]
    return "\n".join(text)
