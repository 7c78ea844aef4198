"""Preference losses, a table over log-probability sums and lengths of pairs, and the objective that minimises them.

A row holds whole pairs: sequence 2p of a row is the chosen one of pair p, sequence 2p + 1 the rejected one. "weights"
mark the answers' tokens, and "reference" has each sequence's log-probability under the reference model at its first
token. A first pass gives the log-probabilities, from which each sequence's coefficient in the gradient follows; the
second pass is cross-entropy with these coefficients as weights, so that no more is saved than in pretraining.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from solar_jax.config import PreferenceConfig
from solar_jax.data.chat.rows import most_sequences
from solar_jax.errors import UserError
from solar_jax.training.objectives import Batch, Forward, Measures, Objective, Sums, ends_of_answers

_TIE = 1e-3  # nats


@dataclasses.dataclass(frozen=True)
class Sides:
    """Sums over the answers of pairs, arrays of one shape."""

    chosen: jax.Array  # log-probability by the policy
    rejected: jax.Array
    reference_chosen: jax.Array  # by the reference
    reference_rejected: jax.Array
    chosen_tokens: jax.Array  # trained tokens
    rejected_tokens: jax.Array

    @property
    def ratios(self) -> tuple[jax.Array, jax.Array]:
        """Log-ratios of policy to reference."""
        return self.chosen - self.reference_chosen, self.rejected - self.reference_rejected

    @property
    def margin(self) -> jax.Array:
        """Difference of the log-ratios."""
        return self.ratios[0] - self.ratios[1]

    @property
    def mean_margin(self) -> jax.Array:
        """Difference of the log-ratios per token."""
        chosen, rejected = self.ratios
        return chosen / self.chosen_tokens - rejected / self.rejected_tokens

    @property
    def means(self) -> tuple[jax.Array, jax.Array]:
        """Log-probability per token by the policy."""
        return self.chosen / self.chosen_tokens, self.rejected / self.rejected_tokens


Loss = Callable[[Sides, PreferenceConfig], jax.Array]  # nats or a dimensionless loss, one a pair


def _sigmoid(s: Sides, c: PreferenceConfig) -> jax.Array:
    """DPO (arXiv 2305.18290, eq. 7); with label smoothing the conservative form of its appendix."""
    z, e = c.beta * s.margin, c.label_smoothing
    return -(1 - e) * jax.nn.log_sigmoid(z) - e * jax.nn.log_sigmoid(-z)


def _robust(s: Sides, c: PreferenceConfig) -> jax.Array:
    """Unbiased under a share of flipped labels (arXiv 2403.00409)."""
    z, e = c.beta * s.margin, c.label_smoothing
    return (-(1 - e) * jax.nn.log_sigmoid(z) + e * jax.nn.log_sigmoid(-z)) / (1 - 2 * e)


def _ipo(s: Sides, c: PreferenceConfig) -> jax.Array:
    """IPO (arXiv 2310.12036, eq. 17), of log-ratios per token."""
    return (s.mean_margin - 1 / (2 * c.beta)) ** 2


def _apo_zero(s: Sides, c: PreferenceConfig) -> jax.Array:
    """APO-zero (arXiv 2408.06266, eq. 7): raises the chosen answer and lowers the rejected one."""
    chosen, rejected = s.ratios
    return 1 - jax.nn.sigmoid(c.beta * chosen) + jax.nn.sigmoid(c.beta * rejected)


def _apo_down(s: Sides, c: PreferenceConfig) -> jax.Array:
    """APO-down (arXiv 2408.06266, eq. 8): lowers both, the rejected answer more."""
    return jax.nn.sigmoid(c.beta * s.ratios[0]) + 1 - jax.nn.sigmoid(c.beta * s.margin)


def _simpo(s: Sides, c: PreferenceConfig) -> jax.Array:
    """SimPO (arXiv 2405.14734, eq. 6), with its target margin gamma."""
    chosen, rejected = s.means
    return -jax.nn.log_sigmoid(c.beta * (chosen - rejected) - c.gamma)


def _orpo(s: Sides, c: PreferenceConfig) -> jax.Array:
    """The odds ratio of ORPO (arXiv 2403.07691, eq. 7); its cross-entropy is added over tokens."""
    odds = [mean - jnp.log(-jnp.expm1(jnp.minimum(mean, -1e-7))) for mean in s.means]
    return -c.beta * jax.nn.log_sigmoid(odds[0] - odds[1])


@dataclasses.dataclass(frozen=True)
class Kind:
    """A loss, what it needs, and what it adds per token."""

    loss: Loss
    reference: bool = True  # depends on the reference model
    tokens: str = ""  # a mean cross-entropy that is added: of the "chosen" answers, or of chosen "sequences"


# config.preferences.losses
LOSSES: dict[str, Kind] = {
    "sigmoid": Kind(_sigmoid),
    "sigmoid_norm": Kind(lambda s, c: -jax.nn.log_sigmoid(c.beta * s.mean_margin)),
    "hinge": Kind(lambda s, c: jax.nn.relu(1 - c.beta * s.margin)),
    "ipo": Kind(_ipo),
    "robust": Kind(_robust),
    "apo_zero": Kind(_apo_zero),
    "apo_down": Kind(_apo_down),
    "simpo": Kind(_simpo, reference=False),
    "orpo": Kind(_orpo, reference=False, tokens="sequences"),
    "sft": Kind(lambda s, c: jnp.zeros_like(s.chosen), reference=False, tokens="chosen"),
}


@dataclasses.dataclass(frozen=True)
class LossSum:
    """A weighted sum of losses."""

    cfg: PreferenceConfig
    parts: tuple[tuple[str, float], ...]  # names of `LOSSES` and their weights

    @property
    def needs_reference(self) -> bool:
        return any(LOSSES[name].reference for name, _ in self.parts)

    def of_pairs(self, sides: Sides) -> jax.Array:
        """The losses of pairs, without what is added per token."""
        found = [weight * LOSSES[name].loss(sides, self.cfg) for name, weight in self.parts]
        return sum(found[1:], found[0])

    def token_weight(self, tokens: str) -> float:
        """The weight of a mean cross-entropy over tokens, see `Kind.tokens`."""
        return sum(weight for name, weight in self.parts if LOSSES[name].tokens == tokens)

    def at_reference(self) -> float | None:
        """The loss where policy and reference are equal; None if it depends on more than their ratio."""
        if not all(LOSSES[name].reference for name, _ in self.parts):
            return None
        zero, one = jnp.zeros(()), jnp.ones(())
        return float(self.of_pairs(Sides(zero, zero, zero, zero, one, one)))


def make_loss(cfg: PreferenceConfig) -> LossSum:
    """The losses that `config.preferences.losses` names, entries "NAME[:WEIGHT]".

    Raises:
      UserError: an entry is unknown or has a weight that is no number.
    """
    parts = []
    if not cfg.losses:
        raise UserError("config.preferences.losses must name at least one loss, found ().")
    for entry in cfg.losses:
        name, _, text = entry.partition(":")
        if name not in LOSSES:
            raise UserError(f"config.preferences.losses must be among {', '.join(LOSSES)}, found {name!r}.")
        try:
            weight = float(text or 1)
        except ValueError:
            weight = math.nan
        if not 0 < weight < math.inf:
            raise UserError(f"config.preferences.losses: the weight of {name} must be above 0, found {text!r}.")
        parts.append((name, weight))
    return LossSum(cfg, tuple(parts))


# ---- Sums over the sequences of rows ---------------------------------------------------------------------------------
def _membership(segment_ids: jax.Array, sequences: int) -> jax.Array:
    """[B, T] -> [B, T, sequences] float32, 1 where a token belongs to a sequence."""
    return (segment_ids[..., None] == jnp.arange(sequences)).astype(jnp.float32)


def _summed(member: jax.Array, x: jax.Array) -> jax.Array:
    """[B, T, sequences], [B, T] -> [B, sequences], in float32."""
    return jnp.einsum("bts,bt->bs", member, x, precision=jax.lax.Precision.HIGHEST)


def _spread(member: jax.Array, x: jax.Array) -> jax.Array:
    """[B, T, sequences], [B, sequences] -> [B, T]."""
    return jnp.einsum("bts,bs->bt", member, x, precision=jax.lax.Precision.HIGHEST)


def sequence_sums(forward: Forward, batch: Batch, sequences: int) -> jax.Array:
    """Log-probability of the trained tokens of each sequence of a row, [B, sequences]."""
    x, head, laid_out = forward.hidden(batch)
    found = forward.tokens(x, head, laid_out["targets"])
    member = _membership(batch["segment_ids"], sequences)
    log_probs = found["log_prob"].reshape(batch["weights"].shape)
    return _summed(member, log_probs * batch["weights"])


def _sides(member: jax.Array, batch: Batch, sums: jax.Array) -> Sides:
    """The sides of all pairs [B, pairs] from the policy's sums [B, sequences]."""
    reference = _summed(member, batch["reference"]) if "reference" in batch else jnp.zeros_like(sums)
    tokens = _summed(member, batch["weights"])
    tokens = jnp.maximum(tokens, 1.0)
    return Sides(
        sums[:, ::2], sums[:, 1::2], reference[:, ::2], reference[:, 1::2], tokens[:, ::2], tokens[:, 1::2]
    )  # fmt: skip


def _valid(member: jax.Array, batch: Batch) -> jax.Array:
    """[B, pairs] float32, 1 for a pair, 0 for padding."""
    return (_summed(member, batch["weights"])[:, ::2] > 0).astype(jnp.float32)


def shares(batch: Batch, sequences: int) -> Batch:
    """Adds to the whole batch of a step what gives means over all of its tokens, however it is split.

    "chosen", "rejected" and "sequences" [B, T]: a token's share of the mean over the chosen answers, the rejected
    ones, and the chosen sequences with their prompts, times the number of pairs.
    """
    member = _membership(batch["segment_ids"], sequences)
    valid = _valid(member, batch)
    pairs, weights = jnp.sum(valid), batch["weights"]
    chosen = jnp.repeat(valid, 2, axis=1) * (jnp.arange(sequences) % 2 == 0)
    masks = {
        "chosen": weights * _spread(member, chosen),
        "rejected": weights * (1 - _spread(member, chosen)),
        "sequences": _spread(member, chosen),
    }
    return batch | {name: mask * pairs / jnp.maximum(jnp.sum(mask), 1.0) for name, mask in masks.items()}


def preference_objective(mixture: LossSum, length: int) -> Objective:
    """The objective of pairs in rows of T = `length` tokens; its count is that of the pairs.

    The names of what is logged are TRL's, and "kl", the mean of both answers' log-ratios.
    """
    sequences, cfg = most_sequences(length), mixture.cfg

    def objective(forward: Forward, batch: Batch) -> tuple[jax.Array, jax.Array, Sums]:
        x, head, laid_out = forward.hidden(batch)
        found = {
            name: value.reshape(batch["weights"].shape)
            for name, value in jax.lax.stop_gradient(forward.tokens(x, head, laid_out["targets"], stats=True)).items()
        }
        member = _membership(batch["segment_ids"], sequences)
        valid, log_probs = _valid(member, batch), found["log_prob"]
        added = mixture.token_weight("chosen") * batch["chosen"]
        added += mixture.token_weight("sequences") * batch["sequences"]

        def of_pairs(sums: jax.Array) -> jax.Array:
            return jnp.sum(valid * mixture.of_pairs(_sides(member, batch, sums)))

        sums = _summed(member, log_probs * batch["weights"])
        total, coefficients = jax.value_and_grad(of_pairs)(sums)
        total -= jnp.sum(added * log_probs)
        weights = added - batch["weights"] * _spread(member, coefficients)
        weights = jax.lax.stop_gradient(weights).reshape(laid_out["targets"].shape)
        carrier, _ = forward.cross_entropy(x, head, laid_out["targets"], weights)
        loss = carrier + jax.lax.stop_gradient(total - carrier)

        sides = _sides(member, batch, sums)
        rewards = sides.ratios if mixture.needs_reference else sides.means
        chosen, rejected = (cfg.beta * r for r in rewards)
        by_pair = {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
            "rewards/margins": chosen - rejected,
            "logps/chosen": sides.chosen,
            "logps/rejected": sides.rejected,
        } | ({"kl": (sides.ratios[0] + sides.ratios[1]) / 2} if mixture.needs_reference else {})
        by_token = {
            "logits/chosen": batch["chosen"] * found["mean_logit"],
            "logits/rejected": batch["rejected"] * found["mean_logit"],
            "mean_token_accuracy": batch["chosen"] * found["is_top"],
        }
        metrics = {name: jnp.sum(valid * value) for name, value in by_pair.items()}
        return loss, jnp.sum(valid), metrics | {name: jnp.sum(value) for name, value in by_token.items()}

    return Objective(objective, lambda batch: shares(batch, sequences))


def _prefers(margin: jax.Array) -> jax.Array:
    """1 for a margin in nats above 0, 0 below, a half where rounding decides."""
    return jnp.where(jnp.abs(margin) < _TIE, 0.5, (margin > 0).astype(jnp.float32))


def preference_measures(mixture: LossSum, length: int, end: int) -> Measures:
    """Held-out measures of pairs.

    The loss; the share of pairs with the higher reward on the chosen side ("accuracy", a half for equal ones), and with
    the higher log-probability a token there ("likelihood_accuracy", which needs no reference); the margin of rewards;
    and the probability of the token `end` where an answer ends.
    """
    sequences, cfg = most_sequences(length), mixture.cfg

    def measures(forward: Forward, batch: Batch) -> Mapping[str, tuple[jax.Array, jax.Array]]:
        x, head, laid_out = forward.hidden(batch)
        log_probs = forward.tokens(x, head, laid_out["targets"])["log_prob"].reshape(batch["weights"].shape)
        batch = shares(batch, sequences)
        member = _membership(batch["segment_ids"], sequences)
        valid, sums = _valid(member, batch), _summed(member, log_probs * batch["weights"])
        sides, pairs = _sides(member, batch, sums), jnp.sum(valid)
        added = mixture.token_weight("chosen") * batch["chosen"]
        added += mixture.token_weight("sequences") * batch["sequences"]
        rewards = sides.ratios if mixture.needs_reference else sides.means
        margins = cfg.beta * (rewards[0] - rewards[1])
        total = jnp.sum(valid * mixture.of_pairs(sides)) - jnp.sum(added * log_probs)
        ends = ends_of_answers(batch, end)
        means = sides.means
        return {
            "loss": (total, pairs),
            "accuracy": (jnp.sum(valid * _prefers(margins / cfg.beta)), pairs),
            "likelihood_accuracy": (jnp.sum(valid * _prefers(means[0] - means[1])), pairs),
            "margin": (jnp.sum(valid * margins), pairs),
            "end_probability": (jnp.sum(ends * jnp.exp(log_probs)), jnp.sum(ends)),
        }

    return measures
