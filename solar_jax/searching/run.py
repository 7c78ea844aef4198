"""A whole search: texts, prediction, the search itself and its files; and growth of a run by what it finds."""

import dataclasses
import pathlib
from typing import Any

from solar_jax.checkpoints import lineage
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import Config
from solar_jax.data.corpus import load_corpus
from solar_jax.errors import UserError
from solar_jax.parallel import processes
from solar_jax.parallel.mesh import make_mesh
from solar_jax.planning.search import present
from solar_jax.searching.candidates import check_added
from solar_jax.searching.cost import search_cost
from solar_jax.searching.find import SearchSettings, find_cut, search_identity, store_file
from solar_jax.searching.picture import plot_search
from solar_jax.searching.result import NEXT, doubts_of, search_record, search_table
from solar_jax.searching.texts import SearchText, heldout_text, other_text, training_texts
from solar_jax.storage.json_files import read_json, write_json
from solar_jax.storage.paths import is_local
from solar_jax.training.run import say

SEARCH = "search"  # the value of config.growth.operator by which a run searches its cut
TOKENS, ROWS = 2048, 8  # of a run's search text: so many tokens, and rows at least


@dataclasses.dataclass(frozen=True)
class SearchTexts:
    """Texts of one search."""

    search: SearchText
    final: SearchText
    confirm: list[SearchText]


def search_cuts(
    config: Config, settings: SearchSettings, out: pathlib.Path, *, other: str, tokens: int, windows: int,
    dtype: str | None = None, overwrite: bool = False, recipe: str = "dus_48l:smollm2",
) -> dict[str, Any]:  # fmt: skip
    """Searches and writes the result.

    Args:
      config: source, data and length of rows.
      settings: added layers and budget.
      out: the JSON file; its picture is written beside it.
      other: text of another domain; "" for none.
      tokens: of the search text.
      windows: rows that confirm.
      dtype: of weights and activations; the checkpoint's if None.
      overwrite: replace another search's result.
      recipe: the config that the next command names.

    Returns:
      The content of `out`.

    Raises:
      UserError: bad source or text, or `out` holds something else.
    """
    c = open_checkpoint(config.source)
    n = c.cfg.num_hidden_layers
    check_added(settings.add, n)
    dtype = dtype or ("float32" if c.dtype == "float32" else "bfloat16")
    texts = open_texts(config, c, other, tokens, windows)
    key, identity = search_identity(c, [texts.search, texts.final, *texts.confirm], settings, dtype)
    if (there := read_json(out)) is not None and not overwrite:
        if not isinstance(there, dict) or there.get("key") != key:
            raise UserError(f"{out}: holds another result; give another --out, or --overwrite to replace it.")
        say(f"{out}: this search is complete.\n{search_table(there)}")
        return there
    text = texts.search
    cost = search_cost(
        c.cfg, present(), rows=len(text.rows), length=config.data.sequence_length,
        forwards=settings.forwards, width=4 if dtype == "float32" else 2,
    )  # fmt: skip
    say(f"source     {lineage.public(c.where)}, {n} layers, {dtype}; {settings.add} to add, copies only")
    say(f"text       {text.name}: {text.tokens:,} tokens of {len(text.documents)} documents")
    say(f"predicted  {cost}")
    if is_local(out):
        out.parent.mkdir(parents=True, exist_ok=True)
    found = find_cut(
        c, make_mesh(cost.config), text, settings, final=texts.final, confirm=texts.confirm, dtype=dtype, store=out,
        say=say,
    )  # fmt: skip
    content = search_record(found, c, text, texts.final, identity, key)
    picture = out.with_suffix(".png")
    if processes.is_first():
        plot_search(picture, found, f"{lineage.public(c.where)}: {n} layers and {settings.add} more")
        write_json(out, content)
        store_file(out, key).unlink(missing_ok=True)
    say(search_table(content))
    for doubt in doubts_of(found):
        say(f"note: {doubt}")
    say(NEXT.format(source=config.source, slices=found.slices, config=recipe))
    say(f"{out}, {picture}: written")
    return content


def open_texts(config: Config, c: Checkpoint, other: str, tokens: int, windows: int) -> SearchTexts:
    """Opens a search's texts: training rows to search on, held-out rows and another domain to confirm.

    Raises:
      UserError: a source cannot be read or is too small.
    """
    tokenizer, eos, data = load_tokenizer(c), eos_id(c), config.data
    corpus = load_corpus(data, tokenizer, eos, c.cfg.vocab_size)
    name = ", ".join(pathlib.PurePath(source.path).name for source, _ in corpus.train)
    search, final = training_texts(corpus, tokens, name)
    confirm = [heldout_text(corpus, windows, name)]
    if other:
        length = data.sequence_length
        confirm.append(other_text(other, tokenizer, eos, length, windows, c.cfg.vocab_size))
    return SearchTexts(search, final, confirm)


def searched(config: Config, folder: pathlib.Path) -> tuple[Config, dict[str, Any] | None]:
    """Replaces growth by search with the cut that a search of the run's training text finds.

    The result is kept beside the run's folder, so that a restart searches no more.

    Args:
      config: of a run.
      folder: of the run.

    Returns:
      The config, with operator `slices` in place of `search`, and what the run's lineage says of the search; the config
      itself and None for any other operator.

    Raises:
      UserError: the run cannot search.
    """
    growth = config.growth
    if growth.operator != SEARCH:
        return config, None
    if not is_local(folder):
        raise UserError(f"{folder}: config.growth.operator=search needs a local --workdir; or run `search` first.")
    if growth.add < 1 or growth.at_step:
        raise UserError(
            "config.growth.operator=search needs config.growth.add of at least 1 and at_step=0, found "
            f"add={growth.add} and at_step={growth.at_step}."
        )
    out = folder.with_name(f"{folder.name}.search.json")
    if not out.exists() and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds a run that did not search, or other files; give another --workdir.")
    tokens = max(TOKENS, ROWS * config.data.sequence_length)
    found = search_cuts(config, SearchSettings(growth.add), out, other="", tokens=tokens, windows=ROWS)
    record = {key: found[key] for key in ("key", "best", "base_loss", "dus", "text", "settings")}
    growth = dataclasses.replace(growth, operator="slices", slices=found["best"]["slices"])
    return dataclasses.replace(config, growth=growth), record
