"""Run folder: which run it belongs to, what it holds, and whether to start, resume or stop."""

import dataclasses
import difflib
import hashlib
import pathlib
import tempfile
from collections.abc import Collection
from typing import Any

import ml_collections

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.adapters import OWN, own_record
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.companions import LINEAGE
from solar_jax.checkpoints.hf_config import with_dtype
from solar_jax.checkpoints.write_hf import write_companions
from solar_jax.config import Config, GrowthConfig, resolve
from solar_jax.data.chat.encoding import Rules
from solar_jax.data.corpus import AnyRows, Corpus
from solar_jax.errors import UserError
from solar_jax.orbax_store.layout import MODEL_FOLDER
from solar_jax.parallel import processes
from solar_jax.storage import bucket_folder, paths
from solar_jax.storage.atomic_folder import new_folder
from solar_jax.storage.json_files import read_json, read_json_object, write_json
from solar_jax.storage.paths import is_local
from solar_jax.training.partition import make_partition


def flat(tree: dict[str, Any], prefix: str = "config") -> dict[str, Any]:
    """Flattens a nested dict to {"config.train.steps": 12, ...}."""
    out = {}
    for key, value in tree.items():
        path = f"{prefix}.{key}"
        out |= flat(value, path) if isinstance(value, dict) else {path: value}
    return out


def config_dict(config: Config) -> dict[str, Any]:
    """Returns the resolved config as JSON holds it."""
    return as_json(dataclasses.asdict(config))


def as_json(tree: Any) -> Any:
    """Returns a tree whose tuples are lists, as JSON returns them."""
    if isinstance(tree, dict):
        return {key: as_json(value) for key, value in tree.items()}
    return list(tree) if isinstance(tree, tuple) else tree


_TEXT = "data.json"

# Keys, or groups of keys, that do not affect training results: a restart may change them.
_FREE = (
    "logging", "data.workers", "preferences.cache", "train.compiled",
    *(f"checkpoint.{key}" for key in ("keep", "keep_every", "keep_best", "restore")),
)  # fmt: skip
TOKENIZER, DATA = "tokenizer", "data"  # other names that --allow_changed accepts
RULES = "rules"  # of records: template, its date, and a hash of everything that their tokens depend on
_DIFFERENCES = 4  # shown at most


def check_allowed(names: Collection[str]) -> None:
    """Raises a UserError for a name in --allow_changed that is not a key, a group of keys, "tokenizer" or "data"."""
    keys = [key.removeprefix("config.") for key in flat(config_dict(Config()))]
    known = {TOKENIZER, DATA, *keys, *(key.split(".")[0] for key in keys)}
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ", such as train.steps, mesh, tokenizer or data."
            raise UserError(f"--allow_changed={name}: expected config keys without the 'config.' prefix{hint}")


def _is_among(key: str, names: Collection[str]) -> bool:
    """Returns whether a key, e.g. config.train.steps, or its group is named; "data" names the text, not keys."""
    key = key.removeprefix("config.")
    return key in names or (key.split(".")[0] in names and not key.startswith("data."))


def check_place(workdir: pathlib.Path) -> None:
    """Raises a UserError for a bucket that checkpoints cannot be written to."""
    if not is_local(workdir) and not str(workdir).startswith("gs://"):
        raise UserError(f"{workdir}: checkpoints go to a local folder or to gs://; change --workdir.")


def check_owner(workdir: pathlib.Path, config: Config, allowed: Collection[str] = ()) -> bool:
    """Returns whether `workdir` already holds this run; `allowed`: keys, or groups of keys, that may differ.

    Raises:
      UserError: it holds another run, or other files.
    """
    if is_local(workdir) and workdir.exists() and not workdir.is_dir():
        raise UserError(f"{workdir}: must be a folder, found a file.")
    if is_local(workdir):
        found = {p.name for p in workdir.iterdir()} if workdir.exists() else set()
    elif (found := bucket_folder.names(workdir)) <= {_TEXT, MODEL_FOLDER}:
        return False  # left by a kill before config.json was written
    if not found:
        return False
    if "config.json" not in found:
        raise UserError(f"{workdir}: holds files but no run (no config.json); give another --workdir.")
    try:  # read with the current names and defaults
        there = flat(config_dict(resolve(ml_collections.ConfigDict(read_json_object(workdir / "config.json")))))
    except UserError as e:
        raise UserError(f"{workdir / 'config.json'}: {e}") from e
    here = flat(config_dict(config))
    changed = [
        key
        for key in sorted(here | there)
        if here.get(key) != there.get(key) and not _is_among(key, _FREE) and not _is_among(key, allowed)
    ]
    if changed:
        shown = [f"{key} is {there.get(key)!r} where this one's is {here.get(key)!r}" for key in changed]
        names = ",".join(key.removeprefix("config.") for key in changed)
        raise UserError(
            f"{workdir}: holds another run, whose {_some(shown)}; give another --workdir, or "
            f"--allow_changed={names} to resume it anyway."
        )
    return True


def _some(differences: list[str]) -> str:
    more = len(differences) - _DIFFERENCES
    return ", ".join(differences[:_DIFFERENCES]) + (f" (and {more} more)" if more > 0 else "")


def template_date(workdir: pathlib.Path) -> str:
    """The date that a run's chat template wrote when the run began; "" if it has not begun, or needs none."""
    return (read_json(workdir / _TEXT) or {}).get(RULES, {}).get("date", "")


def text_record(checkpoint: Checkpoint, corpus: Corpus, rules: Rules | None = None) -> dict[str, Any]:
    """Builds data.json, the origin of a run's tokens: hashes of the tokenizer and of each source's rows.

    A prepared folder is identified by its manifest; of rows packed by this run, an evenly spread sample is hashed.
    Records that were left out are listed by reason.
    """
    record: dict[str, Any] = {TOKENIZER: hashlib.sha256(checkpoint.companions["tokenizer.json"]).hexdigest()}
    for part, sources in (("train", corpus.train), ("heldout", corpus.heldout)):
        for i, (_, rows) in enumerate(sources):  # wherever they are stored
            record[f"{part} source {i}"] = {
                "rows": len(rows), "tokens": rows.tokens, "hash": getattr(rows, "key", None) or _hash_of_some(rows)
            }  # fmt: skip
            if account := corpus.accounts.get(f"{part} source {i}"):
                record[f"{part} source {i}"] |= account.json()
    if rules is not None:
        record[RULES] = {
            "template": rules.template.name, "date": rules.template.date, "hash": rules.fingerprint(),
        }  # fmt: skip
    return record


def _hash_of_some(rows: AnyRows, count: int = 64) -> str:
    found = hashlib.sha256()
    for i in sorted({k * (len(rows) - 1) // max(1, count - 1) for k in range(count)}):
        for name, value in sorted(rows[i].items()):
            found.update(name.encode() + value.tobytes())
    return found.hexdigest()


def check_text(workdir: pathlib.Path, record: dict[str, Any], allowed: Collection[str] = ()) -> None:
    """Raises a UserError if the tokenizer or the data of a run are not those that it began with."""
    file = workdir / _TEXT
    if (before := read_json(file)) is None:  # written by an older version
        return
    if TOKENIZER not in allowed and before[TOKENIZER] != record[TOKENIZER]:
        raise UserError(
            f"{workdir}: began with another tokenizer (tokenizer.json with SHA-256 {before[TOKENIZER][:12]}... where "
            f"this one's is {record[TOKENIZER][:12]}...); --allow_changed={TOKENIZER} resumes the run anyway."
        )
    changed = [name for name in [*before, *(set(record) - set(before))] if before.get(name) != record.get(name)]
    changed = [name for name in changed if name != TOKENIZER]
    if DATA in allowed or not changed:
        return
    shown = [f"{name}: {_told(before.get(name))} where this one has {_told(record.get(name))}" for name in changed]
    raise UserError(f"{workdir}: began with other data, {_some(shown)}; --allow_changed={DATA} resumes the run anyway.")


def _told(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "none"
    if "rows" not in entry:
        return f"{entry['template']} (rules {entry['hash'][:12]}...)"
    return f"{entry['rows']:,} rows of {entry['tokens']:,} tokens in all ({entry['hash'][:12]}...)"


def update(workdir: pathlib.Path, config: Config, record: dict[str, Any]) -> None:
    """Records the config and data that a run resumes with, where they were allowed to change."""
    for name, value in (("config.json", config_dict(config)), (_TEXT, record)):
        if read_json(workdir / name) != value:
            write_json(workdir / name, value)


def create(
    workdir: pathlib.Path, config: Config, c: Checkpoint, record: dict[str, Any], search: dict[str, Any] | None = None
) -> None:  # fmt: skip
    """Creates the folder with config.json, data.json and `model/`, which turns its checkpoints back into a model.

    In a bucket it counts as a run once it has config.json, which is written last.
    """
    if is_local(workdir):
        with new_folder(workdir) as folder:
            _fill(folder, config, c, record, search)
        return
    with tempfile.TemporaryDirectory(prefix="solar_jax_run_") as temporary:
        folder = pathlib.Path(temporary)
        _fill(folder, config, c, record, search)
        files = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
        for name in sorted(files, key=lambda name: name == "config.json"):
            paths.write_file(workdir / name, (folder / name).read_bytes())


def _fill(
    folder: pathlib.Path, config: Config, c: Checkpoint, record: dict[str, Any], search: dict[str, Any] | None
) -> None:  # fmt: skip
    write_json(folder / "config.json", config_dict(config))
    write_json(folder / _TEXT, record)
    _write_model(folder / MODEL_FOLDER, config, c, search=search)


def _write_model(
    folder: pathlib.Path, config: Config, c: Checkpoint, base: str | None = None, search: dict[str, Any] | None = None
) -> None:
    """Writes what makes a folder of checkpoints a model: its config, its tokenizer and its lineage.

    `base` is what adapters adapt, where that is another model than the config's source with its growth. `search` is
    how its cut was found.
    """
    folder.mkdir(parents=True)
    write_companions(folder, with_dtype(c.hf_config, config.export.dtype), c.companions)
    more = {"search": search} if search else {}
    lineage.write_record(folder, lineage.lineage_record(c, "train", name=config.name, **more), LINEAGE)
    if config.lora.rank:
        layers = make_partition(config.train.trainable, c.layer_map, config.lora).layers
        source, growth = (config.source, config.growth) if base is None else (base, GrowthConfig("identity"))
        trained = [i for i, trains in enumerate(layers) if trains]
        write_json(folder / OWN, own_record(config.lora, source, growth, trained))


def add_model(workdir: pathlib.Path, c: Checkpoint, config: Config, base: str | None) -> None:
    """Makes the folder of an arm one that opens as a model, on the first process; `base` as in `_write_model`."""
    if not processes.is_first() or (workdir / MODEL_FOLDER / "config.json").exists():
        return
    with tempfile.TemporaryDirectory(prefix="solar_jax_run_") as temporary:
        made = pathlib.Path(temporary) / MODEL_FOLDER
        _write_model(made, config, c, base)
        for file in sorted(made.rglob("*"), key=lambda f: f.name == "config.json"):
            target = workdir / MODEL_FOLDER / file.relative_to(made).as_posix()
            if is_local(workdir):
                target.parent.mkdir(parents=True, exist_ok=True)
            paths.write_file(target, file.read_bytes())
