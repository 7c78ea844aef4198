"""Result of a search as a file's content, as a table, and as the commands that go on from it."""

import datetime
from collections.abc import Sequence
from typing import Any

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.searching.candidates import Cut, blocks_text, slices_text, source_layers
from solar_jax.searching.find import Confirmation, FoundCut, ScoredCut, cut_name
from solar_jax.searching.texts import SearchText

_SHOWN = 10  # candidates of a table

# What is printed at the end.
NEXT = """
grow it   python -m solar_jax.upscale --source {source} --out DIR --slices {slices}
heal it   python -m solar_jax.train --config {config} --config.source={source} \\
              --config.growth.operator=slices --config.growth.slices={slices} --workdir DIR"""


def search_record(
    found: FoundCut, c: Checkpoint, text: SearchText, final: SearchText | None, identity: dict[str, Any], key: str
) -> dict[str, Any]:
    """Builds the content of FILE.json.

    Args:
      found: the result.
      c: the base.
      text, final: what it was searched on and decided by.
      identity: of `find.search_identity`.
      key: its hash.
    """
    n = found.layers

    def entry(scored: ScoredCut) -> dict[str, Any]:
        layers = source_layers(scored.cut, n)
        return {
            "source_layers": list(layers), "blocks": blocks_text(scored.cut), "loss": scored.loss,
            "excess": scored.loss - found.base_loss, "slices": slices_text(layers),
            "share": scored.share, **({} if scored.final_loss is None else {"final_loss": scored.final_loss}),
        }  # fmt: skip

    return {
        "best": entry(found.best),
        "base_loss": found.base_loss,
        "dus": None if found.dus is None else entry(found.dus),
        "candidates": [entry(scored) for scored in found.candidates],
        "partial": [entry(scored) for scored in found.partial],
        "seam_ratios": [
            [None if a >= b else float(x) for b, x in enumerate(row)] for a, row in enumerate(found.ratios)
        ],
        "seam_correlation": {
            str(k): {"blocks": count, "spearman": value} for k, (count, value) in found.correlation().items()
        },
        "text": text.record(),
        "final_text": None if final is None else final.record(),
        "confirmed": [_confirmation(one, found) for one in found.confirmed],
        "settings": identity["settings"] | {"dtype": identity["dtype"], "scale": 1.0},
        "cost": {"forwards": found.spent, "ended": found.ended},
        "key": key,
        "source": lineage.public_fingerprint(c),
        "versions": lineage.versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _confirmation(one: Confirmation, found: FoundCut) -> dict[str, Any]:
    dus = found.dus.cut if found.dus else None
    best = found.best.cut
    return {
        "text": one.text.name,
        "base": one.losses[()],
        "best": one.losses[best],
        "dus": one.losses.get(dus) if dus is not None else None,
        "best_minus_dus": _difference(one, best, dus),
        "best_minus_base": _difference(one, best, ()),
        "cuts": [
            {"blocks": blocks_text(cut), "loss": loss, "best_minus_this": _difference(one, best, cut)}
            for cut, loss in one.losses.items()
            if cut
        ],
        **{key: value for key, value in one.text.record().items() if key != "name"},
    }


def _difference(one: Confirmation, best: Cut, other: Cut | None) -> dict[str, float] | None:
    """Mean and standard error of loss(best) - loss(other), paired by document; None where there is no other."""
    if other is None or (best, other) not in one.errors:
        return None
    mean, error = one.errors[best, other]
    return {"mean": mean, "standard_error": error}


def search_table(content: dict[str, Any]) -> str:
    """Formats a result's best candidates, and what confirms them."""
    base, dus = content["base_loss"], content["dus"]
    text = content["text"]
    lines = [
        f"\n{text['name']}: {text['tokens']:,} tokens of {text['documents']} documents",
        f"{'blocks':<28}{'loss':>9}{'excess':>9}{'with finals':>13}",
        f"{'(base)':<28}{base:>9.4f}{0:>9.4f}",
    ]
    rows = content["candidates"][:_SHOWN]
    marks = {content["best"]["blocks"]: " <- best"} | ({dus["blocks"]: " <- dus"} if dus else {})
    for row in [*rows, *([dus] if dus and dus["blocks"] not in {r["blocks"] for r in rows} else [])]:
        final = f"{row['final_loss']:>13.4f}" if "final_loss" in row else " " * 13
        mark = marks.get(row["blocks"], "")
        lines.append(f"{row['blocks']:<28}{row['loss']:>9.4f}{row['excess']:>9.4f}{final}{mark}")
    for length, found in content["seam_correlation"].items():
        lines.append(
            f"seam ratio against excess, {found['blocks']} blocks of {length} layers: Spearman {found['spearman']:.2f}"
        )
    if content["confirmed"]:
        lines.append(f"\n{'confirmed on':<36}{'tokens':>8}{'base':>8}{'best':>8}{'dus':>8}   best - dus")
    for one in content["confirmed"]:
        dus_loss, difference = one["dus"], one["best_minus_dus"]
        lines.append(
            f"{one['text'][-35:]:<36}{one['tokens']:>8,}{one['base']:>8.4f}{one['best']:>8.4f}"
            + ("       -" if dus_loss is None else f"{dus_loss:>8.4f}")
            + (f"   {difference['mean']:+.4f} +- {difference['standard_error']:.4f}" if difference else "")
        )
    return "\n".join(lines)


def doubts_of(found: FoundCut) -> Sequence[str]:
    """Warns where texts that the search did not see would have it otherwise."""
    said = []
    for one in found.confirmed:
        lowest = min((cut for cut in one.losses if cut), key=lambda cut: one.losses[cut])
        if lowest != found.best.cut:
            mean, error = one.errors[found.best.cut, lowest]
            said.append(f"{one.text.name}: {cut_name(lowest)} is lower than the best by {mean:.4f} +- {error:.4f}")
    return said
