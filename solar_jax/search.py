"""Find the best cut: which layers of a base to repeat so that the deeper model starts at the lowest loss.

    python -m solar_jax.search --source SRC --add 18 --out FILE.json [--text FILE] [--other FILE]
    python -m solar_jax.search --config configs/dus_48l.py --add 16 --slice v5e-8 --dry_run

Layers are copied as they are and never scaled. Every layer's input is computed once; a cut then costs only the layers
after the base's order is left. FILE.json holds the cuts with their losses, FILE.png the picture. The same command
resumes after a kill. With --config, the text, its held-out part and the source are those of a run.
"""

import dataclasses
import pathlib
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from solar_jax.checkpoints.find import check_local
from solar_jax.cli import command
from solar_jax.config import DTYPES, Config, DataConfig, resolve
from solar_jax.data.sources import check_sources
from solar_jax.errors import UserError

LENGTH = 256  # tokens of a row
WINDOWS = 40  # held-out rows, and rows of another domain
CODE = "python-stdlib"  # the default of --other


def define_flags() -> None:
    flags.DEFINE_string("source", None, "SRC: HF folder, hub id, gs:// or s3:// folder, .gguf file, run, or smollm2.")
    flags.DEFINE_integer("add", None, "Layers to add, at least 1.")
    flags.DEFINE_string("out", None, "JSON file of results; the picture is written beside it.")
    flags.DEFINE_list("text", [], "Texts to search on, as config.data.sources takes them; pydoc-topics if not given.")
    flags.DEFINE_string("other", CODE, "Text of another domain, on which the best is confirmed; '' for none.")
    config_flags.DEFINE_config_file("config", None, "Config file of a run, whose source and text are taken.")
    flags.DEFINE_integer("tokens", 2048, "Tokens of the search text, about; the final text has twice as many.")
    flags.DEFINE_integer("length", None, f"Tokens of a row; {LENGTH}, or a config's own if that is less.")
    flags.DEFINE_integer("windows", WINDOWS, "Held-out rows that confirm the best.")
    flags.DEFINE_float("forwards", 60.0, "Budget: as much computation as so many forwards of the base.")
    flags.DEFINE_enum("dtype", None, DTYPES[:2], "Dtype of weights and activations; the model's own if not given.")
    flags.DEFINE_float("beta", 1.0, "Only 1: what the second visit of a block counts for.")
    flags.DEFINE_float("scale", 1.0, "Only 1: the factor of copied layers.")
    flags.DEFINE_string("slice", None, "TPU slice whose time is predicted, such as v5e-8; needs --dry_run.")
    flags.DEFINE_bool("dry_run", False, "Print what a search would cost, and stop; no weights are read.")
    flags.DEFINE_bool("overwrite", False, "Replace another search's result at --out.")
    flags.DEFINE_bool("compilation_cache", True, "Reuse compiled programs at the next start.")


def check() -> None:
    """Raises a UserError for flags that cannot work; does not import jax."""
    f = flags.FLAGS
    for name in ("beta", "scale"):
        if getattr(f, name) != 1.0:
            raise UserError(
                f"--{name} must be 1, found {getattr(f, name):g}: with {name} = 0 any cut is perfect, as the added "
                "layers change nothing, so a search has copies only."
            )
    if f.add is None or not (f.source or f.config) or not (f.out or f.dry_run):
        raise UserError("search needs --source SRC (or --config FILE), --add N and --out FILE.json (or --dry_run).")
    if f.add < 1:
        raise UserError(f"--add must be at least 1, the number of layers to add, found {f.add}.")
    for name, least in (("tokens", 1), ("windows", 1), ("length", 2), ("forwards", 1)):
        if getattr(f, name) is not None and getattr(f, name) < least:
            raise UserError(f"--{name} must be at least {least}, found {getattr(f, name)}.")
    if f.slice and not f.dry_run:
        raise UserError(f"--slice={f.slice} only predicts; add --dry_run.")
    if f.out and not f.out.endswith(".json"):
        raise UserError(f"--out must end in .json, found {f.out!r}.")
    config = asked_config()
    if not f.dry_run:
        check_local(config.source)
        check_sources(config.data)
        if config.data.format != "text":
            raise UserError(f"search reads text, but config.data.format={config.data.format!r}; give --text FILE.")


def asked_config() -> Config:
    """Returns the run that the flags describe: of --config, or one of text rows packed so that none sees another."""
    f = flags.FLAGS
    config = resolve(f.config) if f.config is not None else Config(source=f.source, data=DataConfig(holdout="position"))
    data = config.data
    if f.text:
        data = dataclasses.replace(data, sources=tuple(f.text), format="text")
    data = dataclasses.replace(data, sequence_length=f.length or min(LENGTH, data.sequence_length))
    return dataclasses.replace(config, source=f.source or config.source, data=data)


if __name__ == "__main__":
    command.begin(define_flags, check)  # before the slow imports

from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.hardware import compilation
from solar_jax.hardware.slices import find_slice
from solar_jax.parallel import processes
from solar_jax.planning.search import of_slice, present
from solar_jax.searching.candidates import check_added
from solar_jax.searching.cost import SearchCost, search_cost
from solar_jax.searching.find import SearchSettings
from solar_jax.searching.run import search_cuts
from solar_jax.training.run import say


def main(argv: Sequence[str]) -> None:
    del argv
    f = flags.FLAGS
    processes.join()
    compilation.use_cache(f.compilation_cache)
    config, settings = asked_config(), SearchSettings(f.add, f.forwards)
    if f.dry_run:
        say(str(predicted(config, settings, f.slice, f.tokens, f.dtype)))
        return
    search_cuts(
        config, settings, pathlib.Path(f.out), other=f.other, tokens=f.tokens, windows=f.windows, dtype=f.dtype,
        overwrite=f.overwrite, recipe=recipe_name(),
    )  # fmt: skip


def recipe_name() -> str:
    """Returns the config that the next command names."""
    found = flags.FLAGS["config"].value
    name = getattr(flags.FLAGS["config"], "config_filename", None) if found is not None else None
    return name or "dus_48l:smollm2"


def predicted(
    config: Config, settings: SearchSettings, slice_name: str | None, tokens: int, dtype: str | None
) -> SearchCost:
    """Predicts what a search costs, on a slice or on the devices that are present.

    Raises:
      UserError: the config has no shape and its source cannot be opened, or the model does not fit.
    """
    cfg, own = config.model.architecture, "bfloat16"
    if not cfg.num_hidden_layers:
        c = open_checkpoint(config.source)
        cfg, own = c.cfg, c.dtype
    check_added(settings.add, cfg.num_hidden_layers)
    length = config.data.sequence_length
    return search_cost(
        cfg, of_slice(find_slice(slice_name)) if slice_name else present(), rows=-(-tokens // length), length=length,
        forwards=settings.forwards, width=4 if (dtype or own) == "float32" else 2,
    )  # fmt: skip


if __name__ == "__main__":
    command.start(main)
