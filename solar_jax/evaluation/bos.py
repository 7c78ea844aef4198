"""BOS check: the loss of a fixed text with and without BOS, which shows how the model was trained."""

import dataclasses
from typing import Any

from solar_jax.errors import UserError
from solar_jax.evaluation.harness import SolarModel
from solar_jax.evaluation.trie import Query

TEXT = (
    "A river begins as a small stream in the hills. Rain and melted snow feed it, other streams join it on its way, "
    "and by the time it reaches the plain it is wide and slow. People have always settled on the banks of rivers, "
    "because they give water for fields and animals, fish to eat, and a road on which boats can carry goods from town "
    "to town."
)
WORSE = 0.1  # nats per token by which a setting may lose to the other


@dataclasses.dataclass(frozen=True)
class BosLosses:
    """Mean loss per token of the text with and without BOS, and which of both is used."""

    with_bos: float
    without: float
    uses: bool

    def line(self) -> str:
        used = "with" if self.uses else "without"
        losses = f"{self.with_bos:.4f} nats per token with BOS, {self.without:.4f} without"
        return f"BOS check: {losses}; texts are read {used} it"

    def record(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def check_bos_setting(model: SolarModel, *, stops: bool = True) -> BosLosses:
    """Measures both settings on a fixed text.

    Args:
      model: as it is going to be evaluated.
      stops: raise where the setting in use is worse by more than `WORSE`.

    Raises:
      UserError: the other setting of --add_bos_token reads the text clearly better.
    """
    tokens = tuple(model.tok_encode(TEXT, add_special_tokens=False))
    bos = model.prefix_token_id
    queries = [Query((bos, *tokens[:-1]), tokens[1:]), Query(tokens[:-1], tokens[1:])]  # the same targets
    losses = {number: -scored.total / (len(tokens) - 1) for number, scored in model.scorer.scores(queries)}
    model.scorer.counts.reset()
    found = BosLosses(losses[0], losses[1], model.tok_encode(TEXT)[0] == bos and tokens[0] != bos)
    own, other = (losses[0], losses[1]) if found.uses else (losses[1], losses[0])
    if stops and own > other + WORSE:
        raise UserError(
            f"BOS: texts would be read {'with' if found.uses else 'without'} it, at {own:.2f} nats per token, where "
            f"the other way has {other:.2f}; give --add_bos_token={'false' if found.uses else 'true'}, or "
            "--nocheck_bos."
        )
    return found
