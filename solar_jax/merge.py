"""Merge checkpoints: mergekit's YAML read as it is, or a method and weighted models.

    python -m solar_jax.merge --config merge.yml --out DIR [--verify]
    python -m solar_jax.merge --method slerp --model A:0.4 --model B:0.6 --out DIR
    python -m solar_jax.merge --method ties --base BASE --model A:0.5 --model B:0.5 --density 0.5 --out DIR
    python -m solar_jax.merge --candidates paper --model A --model B --eval_config dpo:smollm2 --out DIR

A model is any SRC, or SRC+ADAPTER. Weights are streamed in blocks: memory stays small for any model. --candidates
merges in several ways without writing them, measures each on the rows that a training config holds out, and writes the
best: that of the lowest held-out loss of the first --eval_config.
"""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from absl import flags

from solar_jax.checkpoints.companions import CANDIDATES
from solar_jax.cli import command
from solar_jax.cli.config_files import find_config
from solar_jax.config import DTYPES
from solar_jax.errors import UserError


def define_flags() -> None:
    flags.DEFINE_string("config", None, "Recipe in mergekit's YAML.")
    flags.DEFINE_string("method", None, "Merge method, in place of a recipe.")
    flags.DEFINE_multi_string("model", [], "SRC[:WEIGHT], with --method; once for each model.")
    flags.DEFINE_string("base", None, "SRC that differences are taken from, with --method.")
    flags.DEFINE_float("density", None, "Share of each difference that is kept, with --method.")
    flags.DEFINE_string("candidates", None, "Merges to try: paper, or METHOD:WEIGHT of the second model, ...")
    flags.DEFINE_multi_string("eval_config", [], "Training config whose held-out rows measure candidates.")
    flags.DEFINE_string("reference", None, "SRC: reference of held-out pairs; the --eval_config's source if not given.")
    flags.DEFINE_enum("to", "hf", ("hf", "orbax"), "Format to write.")
    flags.DEFINE_enum("dtype", None, DTYPES, "Dtype of the arithmetic and of the weights written, with --method.")
    command.define_target_flags()


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    if not f.out or [f.config, f.method, f.candidates].count(None) != 2:
        raise UserError("merge needs --out DIR and one of --config FILE, --method NAME and --candidates NAMES.")
    for flag in ("model", "base", "density", "dtype"):
        if f.config and f[flag].present:
            raise UserError(f"--{flag} goes with --method; a recipe says it itself.")
    if not f.config and not f.model:
        raise UserError("--method and --candidates need --model SRC, once for each model.")
    if bool(f.candidates) != bool(f.eval_config):
        raise UserError("--candidates needs --eval_config CONFIG, whose held-out rows measure them, and only it does.")
    for config in f.eval_config:
        find_config(config)
    command.folder_from_flag(f.out)
    command.check_push_flag(f.out)
    if f.push_to_hub and f.to != "hf":
        raise UserError(f"--push_to_hub needs --to hf, found {f.to}.")


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.convert import Target, convert_checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.push import push
from solar_jax.checkpoints.scratch import open_source
from solar_jax.merging.candidates import Candidate, best_of, make_candidates
from solar_jax.merging.recipe import Recipe, read_recipe, short_recipe
from solar_jax.merging.view import merged, open_model
from solar_jax.parallel import processes
from solar_jax.storage.atomic_folder import check_target
from solar_jax.storage.paths import is_local


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    target = Target(command.folder_from_flag(f.out), f.to, None, f.max_shard_size, f.overwrite)
    if f.candidates:
        candidates = make_candidates(f.candidates, f.model, f.base, f.dtype)
        merge_best(candidates, f.model, f.eval_config, target, reference=f.reference, verify=f.verify)
    else:
        merge(recipe_from_flags(), target, verify=f.verify)
    if f.push_to_hub:
        print(f"uploaded to {push(target.out, f.push_to_hub)}")


def recipe_from_flags() -> Recipe:
    f = flags.FLAGS
    if f.config:
        return read_recipe(pathlib.Path(f.config))
    return short_recipe(f.method, [weighted(text) for text in f.model], f.base, f.density, f.dtype)


def weighted(text: str) -> tuple[str, float]:
    """Splits SRC:WEIGHT; the weight is 1 if there is none."""
    source, colon, weight = text.rpartition(":")
    try:
        return (source, float(weight)) if colon and source else (text, 1.0)
    except ValueError:
        return text, 1.0


def merge(recipe: Recipe, target: Target, *, verify: bool = False) -> None:
    """Writes the merged model to the target.

    Raises:
      UserError: bad recipe, inputs that do not fit together, or a bad target; nothing is written then.
    """
    convert_checkpoint(merged(recipe), target, "merge", verify=verify)
    print(f"{target.out}: written")


Measured = Mapping[str, Mapping[str, float]]  # by config: measures by name


def merge_best(
    candidates: Sequence[Candidate], models: Sequence[str], configs: Sequence[str], target: Target, *,
    reference: str | None = None, verify: bool = False, numbers: str = "",
) -> str:  # fmt: skip
    """Measures candidate merges and writes the best one, with the table of all as candidates.json.

    Args:
      candidates: merges of `models`.
      models: the inputs, measured too.
      configs: training configs with the held-out rows; the first one's loss decides.
      target: where the best is written.
      reference: of pairs, if it is not their config's source.
      verify: as in `merge`.
      numbers: Markdown for the model card, before the candidates' table.

    Returns:
      The name of the best.
    """
    if is_local(target.out):
        check_target(target.out, target.overwrite)
    measure = _measure(configs, reference)
    opened = {name: open_model(name) for name in {m for c in candidates for m in c.recipe.models}}
    found: dict[str, Measured] = {}
    print(f"measuring {len(candidates)} candidates and {len(models)} models on {', '.join(configs)}", flush=True)
    for model in models:
        _tell("/".join(pathlib.PurePath(model).parts[-2:]), measure(opened[model]))
    views = {one.name: merged(one.recipe, opened) for one in candidates}
    for name, view in views.items():
        found[name] = measure(view)
        _tell(name, found[name])
    losses = {name: of[configs[0]]["loss"] for name, of in found.items()}
    best = best_of(losses)
    print(f"best: {best}", flush=True)
    table = {"best": best, "measured": found}
    view = views[best]
    view = dataclasses.replace(
        view, companions=view.companions | {CANDIDATES: (json.dumps(table, indent=2) + "\n").encode()}
    )
    convert_checkpoint(view, target, "merge", verify=verify, losses=losses, numbers=numbers, candidates=table)
    print(f"{target.out}: written")
    return best


def _measure(configs: Sequence[str], reference: str | None) -> Callable[[Checkpoint], Measured]:
    from solar_jax.cli.config_files import load_config  # imported here, since few merges are measured
    from solar_jax.planning.heldout import planned_heldout

    heldout = {}
    for name in configs:
        config = load_config(name)
        start = open_checkpoint(reference) if reference else open_source(config.source, config.model, config.seed)
        heldout[name] = planned_heldout(config, start)
    return lambda c: {name: rows.of(c) for name, rows in heldout.items()}


def _tell(name: str, measured: Measured) -> None:
    for config, of in measured.items():
        line = f"{name:<24}{config:<20}loss {of['loss']:.4f}"
        if "accuracy" in of:
            line += f"   accuracy {100 * of['accuracy']:.1f} +- {100 * of['accuracy_error']:.1f} %"
        if "end_probability" in of:
            line += f"   end token {100 * of['end_probability']:.1f} %"
        print(line, flush=True)


if __name__ == "__main__":
    command.start(main)
