"""The report of a study in Markdown, and the plan that is printed before it starts."""

import math
from collections.abc import Mapping, Sequence

from solar_jax.config import ModelConfig
from solar_jax.model.flops import active_parameters, flops_per_token
from solar_jax.model.shapes import parameter_count
from solar_jax.studying.arms import NEAR, PlannedArm, PlannedRun, Results
from solar_jax.studying.config import StudyConfig
from solar_jax.studying.documents import Documents
from solar_jax.studying.findings import Comparison, Findings, Lead, MeasuredArm
from solar_jax.studying.statistics import COVERAGE

ENOUGH = 20  # test documents that a bootstrap needs; a convention
IDLE = 0.01  # share of the tokens
_CONTROL = {"tokens": "the base at equal tokens", "flops": "the base at equal FLOPs", "tied": "tied copies"}


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Formats a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _tokens(x: float | None) -> str:
    return "not reached" if x is None else f"{x:,.0f}"


def plan_lines(study: StudyConfig, arms: Sequence[PlannedArm], flops_of: Mapping[str, float], done: int) -> str:
    """Formats the plan: arms, tokens, FLOPs, and how many runs there are at least and at most.

    Args:
      study: its config.
      arms: the arms.
      flops_of: FLOPs of one run of each arm, evaluations included.
      done: runs that are finished.
    """
    head = ("arm", "operator", "layers", "trains", "steps", "tokens", "FLOPs a run", "rates")
    rows = [
        (
            a.name, a.layer_map.operator, a.layer_map.layers, f"{a.trainable} ({a.partition.parameter_count(a.cfg):,})",
            a.steps, f"{a.tokens:,}", f"{a.flops:.3g}", len(a.rates),
        )
        for a in arms
    ]  # fmt: skip
    widths = [max(len(str(cell)) for cell in column) for column in zip(head, *rows, strict=True)]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)]
    first = sum(len(a.rates) for a in arms)
    least = first + sum(bool(a.control) for a in arms) * (len(study.seeds) - 1)
    most = first + len(arms) * (len(study.seeds) - 1)
    flops = sum(len(a.rates) * flops_of[a.name] for a in arms)
    more = sum(flops_of[a.name] for a in arms) * (len(study.seeds) - 1)
    lines += [
        f"runs      {first} with seed {study.seeds[0]} at every rate; with the seeds that follow {least} to {most} in "
        f"all, {done} of them done",
        f"FLOPs     {flops:.3g} with seed {study.seeds[0]}, at most {flops + more:.3g} in all, evaluations included; "
        "hours follow from the first arm's speed",
    ]
    return "\n".join(lines)


def report(
    study: StudyConfig, base: ModelConfig, arms: Sequence[PlannedArm], results: Results, documents: Documents,
    found: Findings, failures: Mapping[PlannedRun, str], epochs: Mapping[str, Sequence[float]],
) -> str:  # fmt: skip
    """Writes the report.

    Args:
      study: its config.
      base: the base's shape.
      arms: all that were planned.
      results: of finished runs.
      documents: the held-out documents.
      found: from `findings.find`.
      failures: the sentence of each run that failed.
      epochs: passes over each source in a run of each arm.
    """
    parts = [f"# {study.name}", _answers(study, found), _few_documents(documents)]
    if failures:
        parts += ["## Failed runs", *(f"- {run}: {sentence}" for run, sentence in failures.items())]
        parts.append("They are tried again when the same command is started again.")
    parts += [
        "## Arms", _arms_table(arms, found), _missing(arms, found), _idle_experts(found),
        "Losses are of test text, in nats a token, at the rate chosen on validation text, averaged over the arm's "
        f"seeds. The base before training: {found.base_loss:.4f}. Probe: after {study.probe_steps} steps. Tokens to "
        "the loss of the base are interpolated between evaluations.",
        "![zero-token loss](zero_token.png)", "![loss over tokens](loss_over_tokens.png)",
        "![loss over FLOPs](loss_over_flops.png)",
        "## Each arm minus each control", _comparison_table(found.comparisons), _about_intervals(study, found),
        "![differences](differences.png)",
        "## What ranks arms early", _correlation_table(found),
        f"Spearman's correlation over the {len(found.first_seed['end'])} arms that grew, at the first seed, with a "
        "bootstrap over arms; few arms make its interval too narrow.",
        "![ranks](ranks.png)",
        "## Learning rates", _rate_table(study, arms, results, documents, found), _edges(found),
        "## How it was measured", _method(study, base, arms, documents, epochs),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _answers(study: StudyConfig, found: Findings) -> str:
    lines = []
    if study.searched:
        lines.append(f"- {lead_sentence(study, found.lead)}")
    for kind in ("tokens", "flops"):
        lines.append(f"- {control_sentence(kind, found)}")
    if any(one.arm.control == "tied" for one in found.arms):
        lines.append(f"- {control_sentence('tied', found)}")
    return "\n".join(lines)


def _few_documents(documents: Documents) -> str:
    """Warns where a bootstrap has too little to draw from: its intervals are then far narrower than they should be."""
    count = int(documents.split("test").sum())
    if count >= ENOUGH:
        return ""
    return (
        f"**Only {count} test documents**: a bootstrap of fewer than {ENOUGH} makes intervals too narrow, so that none "
        "of these verdicts is to be relied on."
    )


def lead_sentence(study: StudyConfig, lead: Lead | None) -> str:
    """States whether the searched arm's lead over its rival survives healing."""
    names = f"{study.searched}'s lead over {study.rival}"
    if lead is None:
        return f"**{names}: not measured**, since one of the two has no finished run."
    numbers = (
        f"{study.searched} minus {study.rival} is {lead.before} at zero tokens and {lead.after} at the end "
        f"({lead.seeds} seed(s))"
    )
    if lead.before.side >= 0:
        return f"**There is no clear lead of {study.searched} over {study.rival} at zero tokens**: {numbers}."
    answer = {-1: "survives healing", 0: "is undecided after healing", 1: "does not survive healing"}[lead.after.side]
    tail = "; the later difference is the other way" if lead.after.side > 0 else ""
    return f"**{names} {answer}**: {numbers}{tail}."


def control_sentence(kind: str, found: Findings) -> str:
    """States which arms beat a control, by their intervals."""
    name = _CONTROL[kind]
    of_kind = {one.arm.name for one in found.arms if one.arm.control == kind}
    compared = [c for c in found.comparisons if c.control in of_kind]
    if not compared:
        return f"**{name}: not measured.**"
    better = [c.arm for c in compared if c.difference.side < 0]
    undecided = [c.arm for c in compared if c.difference.side == 0]
    tail = f" Undecided: {', '.join(undecided)}." if undecided else ""
    if not better:
        return f"**No arm beats {name}**: of {len(compared)}, {len(compared) - len(undecided)} are worse.{tail}"
    return f"**{len(better)} of {len(compared)} arms beat {name}**: {', '.join(better)}.{tail}"


def _arms_table(arms: Sequence[PlannedArm], found: Findings) -> str:
    head = (
        "arm", "operator", "layers", "active parameters", "trains", "parameters trained", "tokens", "FLOPs", "rate",
        "seeds", "zero-token", "probe", "end", "tokens to the base's loss",
    )  # fmt: skip
    rows = []
    for one in found.arms:
        arm, curve = one.arm, found.curves[one.arm.name]
        probe = found.probe[arm.name]
        rows.append(
            (
                arm.name, arm.layer_map.operator, arm.layer_map.layers, f"{active_parameters(arm.cfg):,}",
                arm.trainable, f"{arm.partition.parameter_count(arm.cfg):,}", f"{arm.tokens:,}", f"{arm.flops:.3g}",
                f"{one.rate:g}", len(one.runs), f"{curve[0]:.4f}", "" if math.isnan(probe) else f"{probe:.4f}",
                f"{curve[-1]:.4f}",
                _tokens(found.to_base[arm.name]) if arm.name in found.to_base else "",
            )
        )  # fmt: skip
    del arms
    return table(head, rows)


def _missing(arms: Sequence[PlannedArm], found: Findings) -> str:
    names = [arm.name for arm in arms if found.measured(arm.name) is None]
    return f"Without a finished run: {', '.join(names)}." if names else ""


def _idle_experts(found: Findings) -> str:
    """States the smallest share of tokens that an expert has at the end of each arm of experts."""
    least = {one.arm.name: [run.least_load[-1] for run in one.runs.values() if run.least_load] for one in found.arms}
    parts = [
        f"{name}: {100 * min(shares):.2g} %" + (", **an expert that is all but idle**" if min(shares) < IDLE else "")
        for name, shares in least.items()
        if shares
    ]
    if not parts:
        return ""
    return (
        "Smallest share of a layer's choices that one expert has at the last step, over layers and seeds: "
        + "; ".join(parts) + f". Below {100 * IDLE:g} % an expert counts as idle."
    )  # fmt: skip


def _comparison_table(comparisons: Sequence[Comparison]) -> str:
    head = ("arm", "control", "seeds", "difference", "verdict", "control's FLOPs / arm's", "tokens to cross it")
    return table(
        head,
        [
            (c.arm, c.control, c.seeds, c.difference, c.verdict, f"{c.flops_ratio:.3f}", _tokens(c.crossed))
            for c in comparisons
        ],
    )


def _about_intervals(study: StudyConfig, found: Findings) -> str:
    few, count = any(c.seeds == 1 for c in found.comparisons), len(found.comparisons)
    said = (
        f"Arm minus control on test text at the end, in nats a token: below 0 the arm is better. {COVERAGE:.0%} "
        f"intervals of a paired bootstrap over documents and seeds, {study.bootstrap} samples; one that touches 0 is "
        f"undecided. Of {count} comparisons about {count * (1 - COVERAGE):.1f} would "
        "exclude 0 by chance alone. A control is crossed where the arm's curve comes to stay at or below its curve: "
        "over tokens, or over FLOPs for a control at equal FLOPs."
    )
    most = max((c.seeds for c in found.comparisons), default=1)
    if most > 1:
        said += f" Resampling {most} seeds gives only {most - 1}/{most} of their variance on average."
    if few:
        said += " With one seed, an interval covers the choice of documents and not the order of the data."
    if any(abs(c.flops_ratio - 1) > 0.05 and _kind_of(found, c.control) == "flops" for c in found.comparisons):
        said += " Where the control's FLOPs differ from the arm's by over 5 %, the comparison is not at equal FLOPs."
    return said


def _kind_of(found: Findings, name: str) -> str:
    one = found.measured(name)
    return one.arm.control if one else ""


def _correlation_table(found: Findings) -> str:
    rows = [(a, b, interval) for (a, b), interval in found.correlations.items()]
    return table(("loss", "against", "rank correlation"), rows)


def _rate_table(
    study: StudyConfig, arms: Sequence[PlannedArm], results: Results, documents: Documents, found: Findings
) -> str:
    rates = sorted({rate for arm in arms for rate in arm.rates})
    mask = documents.validation
    rows = []
    for arm in arms:
        one, cells = found.measured(arm.name), []
        for rate in rates:
            result = results.get(PlannedRun(arm, rate, study.seeds[0]))
            text = "" if rate not in arm.rates else "failed" if result is None else (
                f"{result.losses[-1, mask].sum() / documents.tokens[mask].sum():.4f}"
            )  # fmt: skip
            cells.append(f"**{text}**" if one and one.rate == rate else text)
        rows.append((arm.name, *cells))
    return f"Loss on validation text at the end, seed {study.seeds[0]}; the chosen rate is bold.\n\n" + table(
        ("arm", *(f"{rate:g}" for rate in rates)), rows
    )


def _edges(found: Findings) -> str:
    def is_edge(one: MeasuredArm) -> bool:
        return len(one.arm.rates) > 1 and one.rate in (min(one.arm.rates), max(one.arm.rates))

    names = [one.arm.name for one in found.arms if is_edge(one)]
    return f"At the edge of the rates tried, so that another might be better: {', '.join(names)}." if names else ""


def _method(
    study: StudyConfig, base: ModelConfig, arms: Sequence[PlannedArm], documents: Documents,
    epochs: Mapping[str, Sequence[float]],
) -> str:  # fmt: skip
    run, sunk = study.run, study.sunk_tokens
    sunk_flops = sunk * flops_per_token(base, run.data.sequence_length)
    claim = f", for {study.searched} and for {study.rival}" if study.searched else ""
    chooses, reported = documents.split("validation"), documents.split("test")
    lines = [
        f"- Base: {run.source}, {base.num_hidden_layers} layers, {parameter_count(base):,} parameters.",
        f"- Sunk cost: the base was trained on {sunk:.3g} tokens before, about {sunk_flops:.3g} FLOPs at this study's "
        "sequence length. It is the same for all arms and in none of the numbers above."
        if sunk
        else "- Sunk cost: what the base was trained on before is not stated in the config; it is in no number above.",
        "- FLOPs of a token: forward 2 x all matmul weights + 4 N H T/2 of scores a layer; backward the same again by "
        "inputs (scores twice), from the lowest layer that a gradient reaches, and 2 x the weights that train. Frozen "
        "layers cost no gradient of their weights. Recomputation and evaluations are not counted.",
        f"- Rows: batches of {run.train.batch_size} rows of {run.data.sequence_length} tokens from "
        f"{', '.join(run.data.sources)}. A seed sets their order; every arm of a seed sees the same rows in the same "
        "order. A control at equal FLOPs sees those rows and then the next ones, or with fewer steps the first ones.",
        *(f"- Epochs of {name}: {_epochs(run.data.sources, passes)}." for name, passes in _same(arms, epochs)),
        f"- Optimiser: {run.optimizer.name}, fresh, {run.optimizer.schedule} schedule over each arm's own steps, "
        f"precision {run.train.precision}.",
        f"- Text: {chooses.sum()} validation documents ({documents.tokens[chooses].sum():,} tokens) choose the rate, "
        f"{reported.sum()} test documents ({documents.tokens[reported].sum():,} tokens) are reported; halves by a hash "
        f"of the text; each document is read alone, in pieces of {run.data.sequence_length} tokens; {documents.note}.",
        f"- Seeds: all rates at seed {study.seeds[0]}; seeds {study.seeds} at the chosen rate for controls and arms "
        f"within {NEAR:g} standard errors of the best on validation text{claim}.",
    ]  # fmt: skip
    return "\n".join(lines)


def _epochs(sources: Sequence[str], passes: Sequence[float]) -> str:
    return ", ".join(f"{count:.2f} of {source}" for source, count in zip(sources, passes, strict=True))


def _same(arms: Sequence[PlannedArm], epochs: Mapping[str, Sequence[float]]) -> list[tuple[str, Sequence[float]]]:
    """Arms that make equally many passes, named together."""
    groups: dict[int, list[str]] = {}
    for arm in arms:
        groups.setdefault(arm.steps, []).append(arm.name)
    return [(", ".join(names), epochs[names[0]]) for names in groups.values()]
