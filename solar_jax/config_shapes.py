"""Shapes of models in the config tree: the architecture of a checkpoint, and the part of it that a run may state."""

import dataclasses

from solar_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Architecture of a Llama-family decoder; field names are Hugging Face's `config.json` keys."""

    vocab_size: int = 0  # V
    hidden_size: int = 0  # D
    intermediate_size: int = 0  # F
    num_hidden_layers: int = 0  # L
    num_attention_heads: int = 0  # N
    num_key_value_heads: int = 0  # K
    head_dim: int = 0  # H
    max_position_embeddings: int = 0  # tokens
    rope_theta: float = 0.0
    rms_norm_eps: float = 0.0
    tie_word_embeddings: bool = False
    sliding_window: int = 0  # tokens that a query sees, itself included; 0: all before it
    attention_bias: str = ""  # projections with a bias: "", "qkv" or "qkvo"
    qk_norm: bool = False  # queries and keys pass an RMSNorm over H before they are rotated
    no_rope_layers: tuple[int, ...] = ()  # layers whose queries and keys are not rotated
    mlp_bias: bool = False  # gate, up and down projections have a bias
    post_norm: bool = False  # what attention and MLP add passes an RMSNorm (HF `use_post_norm`)
    num_local_experts: int = 0  # E, experts in place of the MLP; 0: one MLP
    num_experts_per_tok: int = 0  # k, experts of a token
    norm_topk_prob: bool = True  # the weights of a token's experts sum to 1
    expert_granularity: int = 1  # shards of one MLP that an expert was made of
    embedding_multiplier: float = 0.0  # of the embeddings; here and in the next three, 0 stands for none
    attention_multiplier: float = 0.0  # of the scores, in place of H ** -0.5
    residual_multiplier: float = 0.0  # of what attention and MLP add
    logits_multiplier: float = 0.0  # of the logits
    rope_scaling: str = ""  # a name of model.rope.SCALINGS; those below are its numbers (HF `rope_parameters`)
    rope_factor: float = 0.0  # linear, dynamic, llama3, yarn: `factor`
    rope_low_freq_factor: float = 0.0  # llama3
    rope_high_freq_factor: float = 0.0  # llama3
    rope_original_positions: int = 0  # llama3, yarn: `original_max_position_embeddings`
    rope_attention_factor: float = 0.0  # yarn: of cosines and sines
    rope_beta_fast: float = 0.0  # yarn: turns from which a frequency is kept
    rope_beta_slow: float = 0.0  # yarn: turns up to which it is divided by the factor
    rope_untruncated: bool = False  # yarn: the borders between them are not rounded to whole pairs

    def __post_init__(self) -> None:
        scalings = ("", "linear", "dynamic", "llama3", "yarn")
        for key, known in (("attention_bias", ("", "qkv", "qkvo")), ("rope_scaling", scalings)):
            if (value := getattr(self, key)) not in known:
                raise UserError(f"config.model.{key} must be one of {', '.join(map(repr, known))}, found {value!r}.")


@dataclasses.dataclass(frozen=True)
class ShapeConfig:
    """Shape that a run's checkpoint is expected to have, under Hugging Face's `config.json` keys.

    0 means "as the checkpoint says"; any other value has to agree with it. With `source="scratch"` it is the new
    model's shape.
    """

    vocab_size: int = 0
    hidden_size: int = 0
    intermediate_size: int = 0
    num_hidden_layers: int = 0
    num_attention_heads: int = 0
    num_key_value_heads: int = 0
    head_dim: int = 0
    max_position_embeddings: int = 0
    rope_theta: float = 0.0
    rms_norm_eps: float = 0.0
    tie_word_embeddings: bool = False
    sliding_window: int = 0

    @property
    def architecture(self) -> ModelConfig:
        """The plain Llama of this shape."""
        return ModelConfig(**vars(self))
