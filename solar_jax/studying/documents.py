"""Held-out documents of a study and their losses: validation and test, apart from each other and from training text."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np
import tokenizers

from solar_jax.config import DataConfig, ModelConfig, TrainConfig
from solar_jax.data.doubts import check_ids
from solar_jax.data.packing import Rows, cut_rows, tokenise
from solar_jax.data.pipeline import heldout_batches
from solar_jax.data.prepared.rows import is_prepared
from solar_jax.data.sources import Document, Source, part, sources_of, split
from solar_jax.errors import UserError
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.studying.config import StudyConfig
from solar_jax.training.objectives import Batch
from solar_jax.training.partition import Partition
from solar_jax.training.state import model_shardings
from solar_jax.training.step import make_forward

SPLITS = ("validation", "test")
LEAST = 2  # documents of each split
MOST_SEARCHED = 1 << 28  # characters of training text in which held-out documents are searched for

# (params, batch) -> [B, T] float32, the log-probability of each target in nats
TargetStep = Callable[[Params, Batch], jax.Array]


@dataclasses.dataclass(frozen=True)
class Documents:
    """N held-out documents, packed into rows in which each sees only itself."""

    ids: tuple[str, ...]  # [N]
    tokens: np.ndarray  # [N] int64, the targets of each
    validation: np.ndarray  # [N] bool; the others are test
    rows: Rows
    note: str  # what was left out, and why

    def split(self, name: str) -> np.ndarray:
        """[N] bool, which documents are of a split."""
        return self.validation if name == "validation" else ~self.validation

    @property
    def fingerprint(self) -> str:
        """Hash of the documents' tokens and of their order."""
        return hashlib.sha256(self.rows.stream.tobytes() + repr(self.ids).encode()).hexdigest()

    def batches(self, size: int, sharding: jax.sharding.Sharding) -> list[Batch]:
        """All rows in batches [size, T]; the last is filled with rows of weight 0."""
        return heldout_batches([self.rows[i] for i in range(len(self.rows))], size, sharding)

    def losses(self, step: TargetStep, params: Params, batches: Sequence[Batch]) -> np.ndarray:
        """Returns the summed loss of each document, [N] float64, nats."""
        found, row = np.zeros(len(self.ids)), 0
        for batch in batches:
            log_probs = np.asarray(step(params, batch), np.float64)
            segments, weights = np.asarray(batch["segment_ids"]), np.asarray(batch["weights"]) > 0
            for k in range(min(len(segments), len(self.rows) - row)):
                owners = self.rows.pieces(row)[2]
                counts = weights[k]
                np.subtract.at(found, owners[segments[k][counts]], log_probs[k][counts])
                row += 1
        return found


def make_target_step(
    cfg: ModelConfig, train: TrainConfig, length: int, mesh: jax.sharding.Mesh, partition: Partition
) -> TargetStep:
    """A jitted function that gives the log-probability of each target of a batch; arguments as in `make_train_step`."""
    forward = make_forward(cfg, train, length, mesh)

    def log_probs(params: Params, batch: Batch) -> jax.Array:
        model = forward(partition.merged(params, partition.trained(params)))
        x, head, laid_out = model.hidden(batch)
        return model.tokens(x, head, laid_out["targets"])["log_prob"].reshape(batch["weights"].shape)

    return jax.jit(
        log_probs,
        in_shardings=(model_shardings(cfg, mesh, partition), rules.batch_sharding(mesh)),
        out_shardings=rules.replicated(mesh),
    )


def choose_documents(
    study: StudyConfig, tokenizer: tokenizers.Tokenizer, eos: int, vocab_size: int
) -> Documents:  # fmt: skip
    """Chooses the validation and test documents among those that the run's config holds out.

    Their order, and which half each is in, follow from a hash of the text alone. A document whose text, apart from
    whitespace, is also a training document or part of one, or is held out twice, is left out.

    Args:
      study: its config.
      tokenizer: of the base.
      eos: the end-of-sequence token, the last target of every document that is read to its end.
      vocab_size: V of the base.

    Raises:
      UserError: a source is a prepared folder, which has no text, or too few documents are left.
    """
    cfg = study.run.data
    found, note = _unseen(cfg)
    most = {"validation": study.validation_documents, "test": study.test_documents}
    chosen: list[tuple[str, Document]] = []
    for name in SPLITS:
        of = sorted((d for d in found if _half(d) == name), key=lambda d: _hash(d.text))
        of = of[: most[name]] if most[name] else of
        if len(of) < LEAST:
            raise UserError(
                f"config.run.data.sources: {len(of)} held-out document(s) for the {name} text of the study, which "
                f"needs at least {LEAST}; add documents or lower config.run.data.holdout_every={cfg.holdout_every}."
            )
        chosen += [(name, document) for document in of]
    ids = [document.id for _, document in chosen]
    streams = tokenise([document.text for _, document in chosen], tokenizer, eos)
    check_ids(ids, streams, tokenizer, vocab_size)
    if study.document_tokens:
        streams = [stream[: study.document_tokens + 1] for stream in streams]
    return Documents(
        ids=tuple(ids),
        tokens=np.array([len(stream) - 1 for stream in streams]),
        validation=np.array([name == "validation" for name, _ in chosen]),
        rows=packed_rows(ids, streams, cfg.sequence_length),
        note=note,
    )


def packed_rows(ids: Sequence[str], streams: Sequence[np.ndarray], length: int) -> Rows:
    """Packs documents' tokens, each with its last target, into rows of T = `length` in which each sees only itself."""
    starts = np.cumsum([0, *map(len, streams)], dtype=np.int64)
    begins, sizes, owners, counts = cut_rows("best_fit", starts, 0, length)
    firsts = np.cumsum([0, *counts], dtype=np.int64)
    return Rows("best_fit", length, True, list(ids), np.concatenate(streams), begins, sizes, owners, firsts)


def _unseen(cfg: DataConfig) -> tuple[list[Document], str]:
    """Returns the held-out documents that training text does not contain, and a sentence about the others."""
    seen, searched = set(), 0
    training: list[str] = []
    for text in map(_normal, (d.text for d in _of_sources(cfg, held_out=False))):
        seen.add(_hash(text))
        searched += len(text)
        if searched <= MOST_SEARCHED:
            training.append(text)
    joined = "\n".join(training) if searched <= MOST_SEARCHED else None
    found, twice, contained = [], 0, 0
    for document in _of_sources(cfg, held_out=True):
        text = _normal(document.text)
        if (key := _hash(text)) in seen:
            twice += 1
        elif joined is not None and text in joined:
            contained += 1
        elif text:
            found.append(document)
        seen.add(key)
    how = "" if joined is not None else "; training text is too long to be searched for parts of it"
    return found, (
        f"{len(found)} held-out documents; left out: {twice} that are a training document or held out twice, "
        f"{contained} that are part of one{how}"
    )


def _of_sources(cfg: DataConfig, *, held_out: bool) -> Iterator[Document]:
    for source in sources_of(cfg):
        _check_has_text(source)
        yield from part(source, split(source, cfg.holdout_every, cfg.holdout), held_out)


def _check_has_text(source: Source) -> None:
    if is_prepared(source.path):
        raise UserError(
            f"config.run.data.sources: {source.path} is a prepared folder, which has no text to choose a study's "
            "documents from; name the text itself."
        )


def _normal(text: str) -> str:
    return " ".join(text.split())


def _hash(text: str) -> bytes:
    """16 bytes, independent of the hash by which documents are held out."""
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"study").digest()


def _half(document: Document) -> str:
    return SPLITS[hashlib.blake2b(document.text.encode(), digest_size=1, person=b"halves").digest()[0] % 2]
