"""Held-out measures of any model, on the rows that a run's config holds out."""

import dataclasses
import pathlib
import tempfile

import jax

from solar_jax.checkpoints.checkpoint import Checkpoint
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.tokenizer import eos_id, load_tokenizer
from solar_jax.config import Config, ModelConfig
from solar_jax.data.chat.encoding import load_rules
from solar_jax.data.chat.formats import kind_of
from solar_jax.data.corpus import heldout_indices, heldout_rows, load_corpus
from solar_jax.data.pipeline import Batch, heldout_batches
from solar_jax.model.precision import precision
from solar_jax.model.shapes import Params, param_shapes
from solar_jax.parallel import rules
from solar_jax.training.objectives import Measures, answer_measures, text_measures
from solar_jax.training.preferences import make_loss, preference_measures
from solar_jax.training.reference import log_probs
from solar_jax.training.step import EvalStep, make_eval_step, means, with_error


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out rows on a mesh."""

    config: Config
    mesh: jax.sharding.Mesh
    batches: list[Batch]
    measures: Measures
    _steps: dict[ModelConfig, EvalStep] = dataclasses.field(default_factory=dict)  # compiled, by shape

    def of(self, c: Checkpoint) -> dict[str, float]:
        """Measures of a model by name: "loss" in nats, and with pairs "accuracy" and its standard error."""
        if c.cfg not in self._steps:
            length = self.config.data.sequence_length
            self._steps[c.cfg] = make_eval_step(c.cfg, self.config.train, length, self.mesh, self.measures)
        return with_error(means(self._steps[c.cfg], _params(self.config, self.mesh, c), self.batches))


def _params(config: Config, mesh: jax.sharding.Mesh, c: Checkpoint) -> Params:
    dtypes = jax.tree.map(lambda s: s.dtype, param_shapes(c.cfg, precision(config.train).weights))
    return load_params(c, rules.parameter_shardings(c.cfg, mesh), dtypes)


def open_heldout(config: Config, c: Checkpoint, mesh: jax.sharding.Mesh, *, with_reference: bool = True) -> HeldOut:
    """Opens a config's held-out rows, tokenised as for `c`.

    Args:
      config: of a run, with nothing left to the planner; its data, preferences, evaluation and precision count.
      c: a model with the tokenizer and template.
      mesh: of the evaluation.
      with_reference: `c` is the reference of pairs; without one only measures that need none mean something.

    Raises:
      UserError: bad data.
    """
    tokenizer, eos = load_tokenizer(c), eos_id(c)
    encoding = load_rules(config.data, c.companions, c.where, tokenizer, eos)
    corpus = load_corpus(config.data, tokenizer, eos, c.cfg.vocab_size, encoding)
    kind, length, windows = kind_of(config.data.format), config.data.sequence_length, config.evaluation.windows
    known, measures = None, text_measures
    if kind != "text":
        assert encoding is not None
        measures = answer_measures(encoding.end)
    if kind == "pairs":
        loss = make_loss(config.preferences)
        assert encoding is not None
        measures = preference_measures(loss, length, encoding.end)
        if loss.needs_reference and with_reference:
            with tempfile.TemporaryDirectory() as folder:
                wanted, place = heldout_indices(corpus, windows), pathlib.Path(folder)
                known = log_probs(wanted, c.cfg, _params(config, mesh, c), config, mesh, place, lambda text: None)
    size = rules.padded_rows(config.evaluation.batch_size, mesh)
    batches = heldout_batches(heldout_rows(corpus, windows, known), size, rules.batch_sharding(mesh))
    return HeldOut(config, mesh, batches, measures)
