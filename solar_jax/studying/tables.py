"""Parquet tables of a study: losses of every evaluation, and of every document in it."""

import importlib.util
import io
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from solar_jax.errors import UserError
from solar_jax.storage import paths
from solar_jax.studying.arms import PlannedRun, Results
from solar_jax.studying.documents import SPLITS, Documents

RESULTS, DOCUMENTS = "results.parquet", "documents.parquet"


def check_pyarrow() -> None:
    """Raises a UserError where the package that writes Parquet is missing."""
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError("study writes Parquet with the package pyarrow, which is not installed; take the extra `data`.")


def result_rows(
    runs: Iterable[PlannedRun], results: Results, documents: Documents, rates: Mapping[str, float],
    epochs: Mapping[int, float],
) -> list[dict[str, Any]]:  # fmt: skip
    """One row for each run, evaluation and split; no times, so that a resumed study has the same rows.

    Args:
      runs: in the order of the rows; those without a result have none.
      results: of finished runs.
      documents: the held-out documents.
      rates: the chosen rate of each arm.
      epochs: passes over the training rows, by number of steps.
    """
    rows = []
    for run in (run for run in runs if run in results):
        arm, result = run.arm, results[run]
        for at, step in enumerate(result.steps):
            for split in SPLITS:
                mask = documents.split(split)
                tokens = int(documents.tokens[mask].sum())
                rows.append(
                    {
                        "arm": arm.name, "operator": arm.layer_map.operator, "control": arm.control,
                        "layers": arm.layer_map.layers, "trainable": arm.trainable, "rate": run.rate,
                        "chosen": rates.get(arm.name) == run.rate, "seed": run.seed, "step": step,
                        "tokens": step * arm.step_tokens, "flops": arm.flops_at(step), "epochs": epochs[step],
                        "training_loss": result.training[step - 1] if step else None, "split": split,
                        "loss": float(result.losses[at, mask].sum() / tokens), "documents": int(mask.sum()),
                        "document_tokens": tokens,
                    }
                )  # fmt: skip
    return rows


def document_rows(runs: Iterable[PlannedRun], results: Results, documents: Documents) -> list[dict[str, Any]]:
    """One row for each run, evaluation and document, with its mean loss in nats a token."""
    rows = []
    for run in (run for run in runs if run in results):
        for at, step in enumerate(results[run].steps):
            for i, name in enumerate(documents.ids):
                rows.append(
                    {
                        "arm": run.arm.name, "rate": run.rate, "seed": run.seed, "step": step,
                        "split": SPLITS[int(not documents.validation[i])], "document": name,
                        "tokens": int(documents.tokens[i]),
                        "loss": float(results[run].losses[at, i] / documents.tokens[i]),
                    }
                )  # fmt: skip
    return rows


def write_parquet(file: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows, of which there must be one, as a Parquet file that appears complete."""
    import pyarrow  # imported here: slow, and an extra
    import pyarrow.parquet

    content = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), content)
    paths.write_file(file, content.getvalue())
