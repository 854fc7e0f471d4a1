"""The shape of a decoder: what distinguishes one model from another, as fields.

A family of models is a choice of these fields, see `dpojax.models.families`. This file
knows neither how a decoder computes nor where a config comes from.
"""

from dataclasses import dataclass
from typing import Literal

from dpojax.models.rotary import Rope, Scaling


@dataclass(frozen=True, kw_only=True)
class ExpertShape:
    """Experts in the place of each layer's MLP, some of which see a token."""

    number: int
    per_token: int
    width: int  # of one expert's inside
    renormalised: bool  # weights of the chosen experts are made to add up to 1


@dataclass(frozen=True, kw_only=True)
class DecoderConfig:
    """The shape of a decoder; the defaults are Llama's."""

    vocabulary_size: int
    width: int
    num_layers: int
    num_heads: int
    num_key_heads: int  # fewer than num_heads: grouped queries
    head_dimension: int
    mlp_width: int
    norm: Literal["rms", "rms_from_one", "layer"] = "rms"  # from_one: times 1 + scale
    norm_epsilon: float = 1e-5
    # Where norms stand around attention and MLP, and whether one follows the other.
    arrangement: Literal["pre", "post", "both", "parallel", "parallel_one_norm"] = "pre"
    # Norms of queries and keys: of each head, or of all heads together.
    query_key_norm: Literal["none", "head", "projection"] = "none"
    mlp: Literal["gated", "plain"] = "gated"
    experts: ExpertShape | None = None  # gated; in every layer, or in none
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    output_bias: bool = False  # of attention's output
    mlp_bias: bool = False
    head_bias: bool = False  # of the output matrix
    positions: Literal["rotary", "learned"] = "rotary"
    rope_theta: float = 10_000.0
    rope_scaling: Scaling | None = None
    rotary_dimension: int | None = None  # of a head's, how many turn; None: all
    rotary_pairs: Literal["halves", "neighbours"] = "halves"
    rotary_layers: tuple[bool, ...] | None = None  # which layers turn; None: all
    # A token sees keys whose position is less than this behind its own.
    window: int | None = None
    window_layers: tuple[bool, ...] | None = None  # which layers have it; None: all
    window_rope: Rope | None = None  # the embedding of layers with a window, if another
    attention_scale: float | None = None  # of scores; None: head_dimension ** -0.5
    attention_cap: float | None = None  # scores become cap * tanh(score / cap)
    logit_cap: float | None = None  # final logits likewise
    embedding_scale: float = 1.0
    residual_scale: float = 1.0  # of what attention and MLP add
    logit_scale: float = 1.0
    tied_output: bool = False  # the output matrix is the embedding
    # What final hidden states meet: the output matrix, or a reward model's one row.
    head: Literal["vocabulary", "score"] = "vocabulary"
    max_length: int = 2048  # positions that the model is meant for
    initializer_range: float = 0.02


def layer_ropes(config: DecoderConfig) -> list[Rope | None]:
    """The rotary embedding of each layer."""
    if config.positions == "learned":
        return [None] * config.num_layers
    whole = Rope(theta=config.rope_theta, scaling=config.rope_scaling)
    windowed = config.window_rope or whole
    turns = config.rotary_layers or (True,) * config.num_layers
    return [
        (whole if window is None else windowed) if turn else None
        for turn, window in zip(turns, layer_windows(config), strict=True)
    ]


def layer_windows(config: DecoderConfig) -> list[int | None]:
    """The window of each layer."""
    has_window = config.window_layers or (True,) * config.num_layers
    return [config.window if windowed else None for windowed in has_window]
