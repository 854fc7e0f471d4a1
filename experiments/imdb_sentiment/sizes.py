"""How large the IMDb experiment is: every number that changes its result.

This file knows no model and no data; a size is written beside what it made, and what
was made with another size is never continued.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Size:
    """One setting of the whole experiment."""

    vocabulary: int
    """Entries of the byte-level BPE trained on the reviews."""
    width: int
    num_layers: int
    num_heads: int
    window: int
    """Tokens of a piece of a review in pre-training."""
    length: int
    """Tokens of a prompt and its completion; all completions are cut there."""
    pretrain_steps: int
    sft_steps: int
    batch_size: int
    """Of pre-training and SFT, in pieces."""
    num_reviews: int | None
    """Of each split that is read; None: all."""
    num_prompts: int
    """Beginnings of reviews that the SFT model continues to make the pairs."""
    num_completions: int
    """Of each (the paper: 4, which make 6 pairs)."""
    num_held_out: int
    """Beginnings of test reviews that every policy is measured on."""
    best_of: tuple[int, ...]
    """Samples of which the oracle chooses the best."""
    pairs_per_step: int
    steps: int
    """Of every alignment run."""
    points: int
    """Evaluations along each, evenly spaced; the last is at its end."""
    learning_rates: tuple[float, ...]
    """Every objective is run with each."""
    pretrain_rate: float = 2e-3
    sft_rate: float = 5e-4


TINY = Size(
    vocabulary=384,
    width=32,
    num_layers=1,
    num_heads=2,
    window=24,
    length=24,
    pretrain_steps=4,
    sft_steps=2,
    batch_size=8,
    num_reviews=300,
    num_prompts=12,
    num_completions=4,
    num_held_out=8,
    best_of=(1, 2),
    pairs_per_step=4,
    steps=2,
    points=1,
    learning_rates=(5e-4,),
)
SMALL = Size(
    vocabulary=4096,
    width=128,
    num_layers=4,
    num_heads=4,
    window=64,
    length=40,
    pretrain_steps=2_000,
    sft_steps=600,
    batch_size=32,
    num_reviews=None,
    num_prompts=2_000,
    num_completions=4,
    num_held_out=256,
    best_of=(1, 2, 4, 8, 16),
    pairs_per_step=32,
    steps=120,
    points=3,
    learning_rates=(5e-4, 1e-4, 2e-4),
)
LARGE = Size(
    vocabulary=16_384,
    width=768,
    num_layers=12,
    num_heads=12,
    window=256,
    length=64,
    pretrain_steps=6_000,
    sft_steps=1_500,
    batch_size=64,
    num_reviews=None,
    num_prompts=25_000,
    num_completions=4,
    num_held_out=512,
    best_of=(1, 2, 4, 8, 16, 32, 64),
    pairs_per_step=64,
    steps=1_200,
    points=12,
    learning_rates=(1e-6,),
    pretrain_rate=6e-4,
    sft_rate=1e-5,
)
SIZES = {"tiny": TINY, "small": SMALL, "large": LARGE}
