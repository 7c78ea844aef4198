"""Show what the seam does in a grown model, before and after healing.

    python -m solar_jax.seam --model SRC [--text FILE] --out DIR
    python -m solar_jax.seam --model GROWN --model HEALED --out DIR

By layer: the residual stream, the logit lens, gradients, how far weights moved and how far twins are apart (layers
that copied the same one), and the loss without each layer and with twins exchanged. DIR gets report.md, seam.json, and
pictures with the layer map beneath. Layer maps come from the models' lineage.json. Models are measured one after
another on the same rows: a few held-out ones of --text, an entry of config.data.sources.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

from absl import flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.errors import UserError
from solar_jax.storage.paths import is_local

PRECISION = {"float32": "float32", "bfloat16": "bf16"}  # --dtype -> config.train.precision


def define_flags() -> None:
    flags.DEFINE_multi_string("model", [], "SRC; once for each model, drawn on the same axes.")
    flags.DEFINE_string("text", None, "FILE, folder or other entry of config.data.sources; pydoc-topics if not given.")
    flags.DEFINE_string("out", None, "New folder.")
    flags.DEFINE_string("source", None, "SRC that the models were grown from; found by their lineage if not given.")
    flags.DEFINE_integer("rows", 8, "Rows of text.")
    flags.DEFINE_integer("length", 256, "Tokens of a row.")
    flags.DEFINE_enum("dtype", "float32", tuple(PRECISION), "Dtype of weights and activations.")
    flags.DEFINE_enum("ablate", "all", ("all", "new", "none"), "Layers to leave out, one at a time.")
    flags.DEFINE_bool("compilation_cache", True, "Reuse compiled programs at the next start.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.model or not f.out:
        raise UserError("seam needs --model SRC, once for each model, and --out DIR.")
    if len(set(f.model)) < len(f.model):
        raise UserError("--model: a model is given twice; give each once.")
    for name, value in (("rows", f.rows), ("length", f.length)):
        if value < 1:
            raise UserError(f"--{name} must be at least 1, found {value}.")
    out = command.folder_from_flag(f.out)
    if not is_local(out):
        raise UserError(f"--out={f.out}: expected a local folder.")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"--out={f.out}: already exists; give a new folder.")
    for source in [*f.model, *([f.source] if f.source else [])]:
        check_local(source)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

import dataclasses
import datetime
import sys

import jax

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.lineage import public, public_command, versions
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import load_tokenizer
from solar_jax.cli.progress import count_bar
from solar_jax.config import MeshConfig, TrainConfig
from solar_jax.growth.picture import picture
from solar_jax.hardware import compilation
from solar_jax.inspecting.ancestry import ancestry, find_start
from solar_jax.inspecting.heldout_text import Sample, check_sample_text, heldout_sample
from solar_jax.inspecting.measure import Subject, measured, paired_with_first
from solar_jax.inspecting.picture import PICTURES, draw_subject
from solar_jax.inspecting.report import DEFINITIONS, seam_report
from solar_jax.model.shapes import parameter_count
from solar_jax.parallel import processes
from solar_jax.parallel.mesh import make_mesh
from solar_jax.storage.atomic_folder import new_folder
from solar_jax.storage.json_files import write_json


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    compilation.use_cache(f.compilation_cache)
    inspect_seams(
        f.model, command.folder_from_flag(f.out), f.text, source=f.source, rows=f.rows, length=f.length,
        dtype=f.dtype, ablate=f.ablate,
    )  # fmt: skip


def inspect_seams(
    models: Sequence[str], out: pathlib.Path, text: str | None = None, *, source: str | None = None, rows: int = 8,
    length: int = 256, dtype: str = "float32", ablate: str = "all",
) -> dict[str, Any]:  # fmt: skip
    """Measures models and writes report, numbers and pictures; the folder appears once all is there.

    Args:
      models: SRC of each; the first has the tokenizer.
      out: a new folder.
      text: an entry of config.data.sources; pydoc-topics if None.
      source: SRC of what was grown; None to find it by lineage.
      rows: at most so many, all in one batch.
      length: T.
      dtype: a key of `PRECISION`.
      ablate: a name in `inspecting.measure.ABLATE`.

    Returns:
      The content of seam.json.

    Raises:
      UserError: a bad source or text, or models with different tokenizers.
    """
    check_sample_text(text, length)
    opened = [open_checkpoint(one) for one in models]
    _check_tokenizers(models, opened)
    sample = heldout_sample(text, length, rows, opened[0])
    subjects = _subjects(models, opened, source, ablate)
    mesh = make_mesh(MeshConfig())
    train = TrainConfig(precision=PRECISION[dtype])
    total = sum(one.work() for one in subjects)
    _announce(subjects, sample, length, dtype, total)
    found = []
    with count_bar(total, 0, "layers run") as done:
        for one in subjects:
            found.append(measured(one, sample, train, mesh, done))
    content: dict[str, Any] = {
        "command": public_command(sys.argv),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "text": public(sample.text),
        "rows": len(sample.rows),
        "length": length,
        "documents": sample.documents,
        "dtype": dtype,
        "devices": jax.device_count(),
        "definitions": DEFINITIONS,
        "differences": paired_with_first(found),
        "models": found,
        "versions": versions(),
    }
    if processes.is_first():
        _write(out, content)
    return content


def _check_tokenizers(models: Sequence[str], opened: Sequence[Checkpoint]) -> None:
    first, *others = [load_tokenizer(c).get_vocab(with_added_tokens=True) for c in opened]
    for name, vocabulary in zip(models[1:], others, strict=True):
        if vocabulary != first:
            raise UserError(f"--model={name}: its tokens are not those of {models[0]}; losses would not compare.")


def _subjects(models: Sequence[str], opened: Sequence[Checkpoint], source: str | None, ablate: str) -> list[Subject]:
    names = [short_name(one) for one in models]
    if len(set(names)) < len(names):
        names = list(models)
    found = []
    for name, c in zip(names, opened, strict=True):
        its = ancestry(c)
        found.append(Subject(name, c, its, find_start(c, its, source), ablate))
    return found


def short_name(source: str) -> str:
    """Returns the end of a path; of a run's export, the run's too."""
    parts = pathlib.PurePath(source).parts
    return "/".join(parts[-2:] if parts[-1] in ("hf", "adapter") else parts[-1:])


def _announce(subjects: Sequence[Subject], sample: Sample, length: int, dtype: str, total: int) -> None:
    for one in subjects:
        c = one.checkpoint
        its = one.ancestry.layer_map
        base = dataclasses.replace(c.cfg, num_hidden_layers=its.base_layers, no_rope_layers=())
        _say(f"{one.name}: {picture(its, parameter_count(base), parameter_count(c.cfg))}")
        _say(f"  {' '.join([*one.ancestry.notes, one.start.said])}")
    devices = jax.devices()
    _say(
        f"{len(sample.rows)} rows of {length} tokens from {sample.documents} held-out document(s) of {sample.text}, in "
        f"{dtype} on {len(devices)} x {devices[0].device_kind}; {total:,} layers to run"
    )


def _write(out: pathlib.Path, content: dict[str, Any]) -> None:
    with new_folder(out) as folder:
        drawn = {name: draw_subject(name, content["models"]) for name in PICTURES}
        for name, png in drawn.items():
            if png is not None:
                (folder / f"{name}.png").write_bytes(png)
        report = seam_report(content, [name for name, png in drawn.items() if png is not None])
        (folder / "report.md").write_text(report)
        write_json(folder / "seam.json", content)
    _say(report.split("## ")[0].strip())
    _say(f"{out}: report.md, seam.json and {sum(png is not None for png in drawn.values())} pictures written")


def _say(text: str) -> None:
    if processes.is_first():
        print(text, flush=True)


if __name__ == "__main__":
    command.start(main)
