"""Streams a checkpoint into a new folder, with its lineage and, on request, a certificate."""

import contextlib
import ctypes
import dataclasses
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from solar_jax.checkpoints import lineage, write_orbax
from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.companions import CARD, LINEAGE
from solar_jax.checkpoints.hf_config import with_dtype
from solar_jax.checkpoints.model_card import base_model, model_card
from solar_jax.checkpoints.open import open_checkpoint
from solar_jax.checkpoints.upcycled import why_not_hf
from solar_jax.checkpoints.views import cast, grown
from solar_jax.checkpoints.write_hf import WRITERS, parse_size, pieces, write_companions, write_model
from solar_jax.cli.progress import byte_bar
from solar_jax.config import GrowthConfig
from solar_jax.errors import UserError
from solar_jax.growth.operators import make_layer_map
from solar_jax.growth.picture import picture
from solar_jax.model.shapes import parameter_count
from solar_jax.orbax_store.layout import MODEL_FOLDER
from solar_jax.parallel import processes
from solar_jax.storage.atomic_folder import check_space, check_target, new_folder, partial
from solar_jax.storage.bucket_folder import bucket_folder, check_bucket
from solar_jax.storage.paths import is_local

_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclasses.dataclass(frozen=True)
class Target:
    """Output folder, format and options."""

    out: pathlib.Path
    form: str = "hf"  # "hf" or "orbax"
    dtype: str | None = None  # dtype that all weights are cast to; each as stored if None
    max_shard_size: str = "5GB"  # hf: at most this many bytes of weights per file
    overwrite: bool = False  # replace an existing checkpoint at `out`


def convert_checkpoint(
    c: Checkpoint, target: Target, made_by: str, *, verify: bool = False, losses: Mapping[str, float] | None = None,
    numbers: str = "", **more: Any,
) -> None:  # fmt: skip
    """Writes a checkpoint to the target; the folder appears once it is complete.

    With several processes, each writes its own share.

    Args:
      c: an opened checkpoint or a view.
      target: where to write, and in which format.
      made_by: the command, for the lineage.
      verify: compare the result with its source and add certificate.json.
      losses: held-out loss in nats per token by model, for the model card of an HF folder.
      numbers: Markdown of other results, for the card too.
      more: additional lineage keys.

    Raises:
      UserError: the target exists or lacks disk space, or the result fails verification; no folder appears then.
    """
    if target.form == "hf" and (reason := why_not_hf(c)):
        raise UserError(reason)
    _return_freed_blocks()
    c = cast(c, target.dtype)
    limit, hf, local = parse_size(target.max_shard_size), target.form == "hf", is_local(target.out)
    total = sum(p.nbytes for p in pieces(c)) if hf else write_orbax.total_bytes(c)
    index, count = processes.index_and_count()
    if index == 0:
        if local:
            check_target(target.out, target.overwrite)
            check_space(target.out, total)
        else:
            check_bucket(target.out, target.overwrite)
            if hf:  # shards are written to a temporary folder and then uploaded
                check_space(pathlib.Path(tempfile.gettempdir()), min(total, WRITERS * limit))
        print(
            f"writing {c.where}, {c.layer_map.operator}, {c.cfg.num_hidden_layers} layers, "
            f"{parameter_count(c.cfg):,} parameters, as {target.form}, {c.common_dtype or 'mixed dtypes'}, "
            f"{total / 1e9:.2f} GB, to {target.out}",
            flush=True,
        )
    job = {
        "source": lineage.fingerprint(c.source), "form": target.form, "dtype": c.cast_to, "limit": limit,
        "layer_map": dataclasses.asdict(c.layer_map), "versions": lineage.versions(), "processes": count,
    } | ({"merge": c.source.recipe} if c.source.recipe else {})  # fmt: skip
    more |= {"base_model": base} if (base := base_model(c)) else {}
    record = lineage.lineage_record(c, made_by, form=target.form, dtype=c.common_dtype, **more)
    with _shared_folder(target, job) as (folder, has, put):
        model = folder if hf else folder / MODEL_FOLDER
        with byte_bar(total, target.out.name) as bar, _left_told(target, total, bar) as progress:
            if hf:
                write_model(
                    folder, c, max_shard_size=limit, progress=progress, process=(index, count), has=has, put=put
                )  # fmt: skip
            else:
                # In a bucket, arrays are written in place as they are computed, without a local copy.
                write_orbax.write_params(folder if local else target.out, c, progress)
                model.mkdir(exist_ok=True)
                write_companions(model, with_dtype(c.hf_config, c.common_dtype), c.companions)
        if index == 0:
            lineage.write_record(model, record, LINEAGE)
            if hf:
                # A run's folder has the name, its export is always `hf`.
                name = target.out.parent.name if made_by == "train" else target.out.name
                (model / CARD).write_text(model_card(c, name, made_by, losses, numbers))
        if verify and local:
            processes.wait(f"{target.out} is written")
            if index == 0:
                _certify(c, folder, model, target.out)
    if verify and not local and index == 0:
        model = target.out if hf else target.out / MODEL_FOLDER
        try:
            _certify(c, target.out, model, target.out)
        except UserError:
            (model / "config.json").unlink()  # without it the folder is not a checkpoint
            raise


def _return_freed_blocks() -> None:
    """Makes glibc return blocks of 16 MiB and more to the system once they are freed.

    By default, freeing a block raises the size from which blocks are returned, up to 32 MiB. Blocks of a tensor are
    then kept in the heaps of all threads, which held three times what was in use. Other C libraries have no such call.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 24)


@contextlib.contextmanager
def _left_told(target: Target, total: int, bar: Callable[[int], None]) -> Iterator[Callable[[int], None]]:
    """Yields a progress callback; Ctrl-C then says what is left and how to go on."""
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        bar(more)

    try:
        yield progress
    except KeyboardInterrupt as e:
        raise KeyboardInterrupt(
            f"{target.out}: interrupted after {done / 1e9:.2f} of {total / 1e9:.2f} GB; the same command goes on from "
            f"what is complete, and removing {partial(target.out)} gives that up."
        ) from e


def open_grown(source: str, growth: GrowthConfig | None) -> Checkpoint:
    """Opens SRC, grown where `growth` is given; prints the layer map.

    Raises:
      UserError: bad source, or growth that does not fit it.
    """
    c = open_checkpoint(source)
    if growth is None:
        return c
    deeper = grown(c, make_layer_map(c.cfg.num_hidden_layers, growth))
    print(picture(deeper.layer_map, parameter_count(c.cfg), parameter_count(deeper.cfg)), flush=True)
    return deeper


@contextlib.contextmanager
def _shared_folder(target: Target, job: dict[str, Any]) -> Iterator[tuple[pathlib.Path, Any, Any]]:
    """Yields the folder to write, which the first process makes for all, and `write_model`'s `has` and `put`."""
    index, _ = processes.index_and_count()
    has = put = None
    with contextlib.ExitStack() as stack:
        if not is_local(target.out):
            folder, has, put = stack.enter_context(
                bucket_folder(target.out, overwrite=target.overwrite, job=job, first=index == 0)
            )
        elif index == 0:
            folder = stack.enter_context(new_folder(target.out, overwrite=target.overwrite, job=job))
        else:
            folder = partial(target.out.parent.resolve() / target.out.name)
        processes.wait(f"{target.out} is there to be filled")
        yield folder, has, put
        processes.wait(f"{target.out} is filled")
    processes.wait(f"{target.out} has its name")


def _certify(c: Checkpoint, folder: pathlib.Path, model: pathlib.Path, out: pathlib.Path) -> None:
    from solar_jax.checkpoints.verify import certificate  # imported here, since few conversions are verified

    certificate.write_certificate(c, folder, model, out)
