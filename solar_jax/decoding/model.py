"""A checkpoint made ready to answer: weights on the devices, tokenizer, chat template, end tokens."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import tokenizers

from solar_jax.checkpoints.checkpoint import Checkpoint, numpy_dtype
from solar_jax.checkpoints.load import load_params
from solar_jax.checkpoints.tokenizer import end_ids, load_tokenizer
from solar_jax.config import MeshConfig, ModelConfig
from solar_jax.data.chat.template import Template, load_template, special_tokens
from solar_jax.decoding.engine import Engine
from solar_jax.decoding.weights import quantised
from solar_jax.errors import UserError
from solar_jax.model.shapes import Params
from solar_jax.parallel import rules
from solar_jax.parallel.mesh import make_mesh


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model and what stands around it."""

    cfg: ModelConfig
    params: Params
    dtype: str
    tokenizer: tokenizers.Tokenizer
    ends: list[int]
    companions: dict[str, bytes]
    where: str
    mesh: jax.sharding.Mesh | None = None  # that the weights lie on

    def engine(self, rows: int, context: int = 0) -> Engine:
        """An engine that answers `rows` requests at a time."""
        return Engine(
            self.cfg, self.params, self.tokenizer,
            ends=self.ends, compute_dtype=numpy_dtype(self.dtype), rows=rows, context=context, mesh=self.mesh,
        )  # fmt: skip

    @property
    def specials(self) -> dict[str, str]:
        """The special tokens of tokenizer_config.json by name, such as bos_token."""
        return special_tokens(self.companions, self.where)

    @property
    def template(self) -> Template:
        """The chat template.

        Raises:
          UserError: there is none.
        """
        return load_template("tokenizer", self.companions, self.where)

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, with those that the tokenizer puts around it."""
        return self.encoding(text).ids

    def encoding(self, text: str, *, add_special_tokens: bool = True) -> tokenizers.Encoding:
        """The tokens of a text and where each begins in it.

        A batch of one: unlike the call for a single text, it lets the process's other threads go on.
        """
        return self.tokenizer.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_chat(self, messages: Sequence[Any]) -> list[int]:
        """The tokens of a conversation, up to where the answer begins.

        Raises:
          UserError: it is no conversation, or the template refuses it.
        """
        for i, message in enumerate(messages if isinstance(messages, list) else []):
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise UserError(f"messages[{i}] must be an object with a role and content, found {message!r}.")
        if not isinstance(messages, list) or not messages:
            raise UserError(f"messages must be a list with at least one message, found {messages!r}.")
        text = self.template.render(messages, add_generation_prompt=True)
        return self.encoding(text, add_special_tokens=False).ids


def load_model(c: Checkpoint, dtype: str, *, quantize: str = "") -> Loaded:
    """Loads a checkpoint, its heads and MLP split over the devices as far as they divide.

    Args:
      c: the checkpoint.
      dtype: of weights, activations and cache.
      quantize: "int8" for projections in int8, for an engine; "" for none.
    """
    tokenizer = load_tokenizer(c)
    mesh = decoding_mesh(c.cfg, jax.devices())
    params = load_params(c, rules.parameter_shardings(c.cfg, mesh), numpy_dtype(dtype))
    if quantize:
        params = quantised(params)
    return Loaded(c.cfg, params, dtype, tokenizer, end_ids(c), c.companions, c.where, mesh)


def decoding_mesh(cfg: ModelConfig, devices: Sequence[jax.Device]) -> jax.sharding.Mesh:
    """A mesh that splits heads and MLP as far as they divide, and rows over the rest of the devices."""
    count = len(devices)
    ways = max(n for n in range(1, count + 1) if _divides(cfg, n) and count % n == 0)
    return make_mesh(MeshConfig(data=count // ways, fsdp=1, tensor=ways), devices)


def _divides(cfg: ModelConfig, ways: int) -> bool:
    return all(n % ways == 0 for n in (cfg.num_key_value_heads, cfg.num_attention_heads, cfg.intermediate_size))
