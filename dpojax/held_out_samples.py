"""The held-out prompts that a run continues at each evaluation: texts, length and KL.

This file knows no loop.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from dpojax.config import TrainConfig
from dpojax.data.packing import Example
from dpojax.evaluation import make_sample_kl, make_sampler, sample_metrics
from dpojax.loading import Loaded
from dpojax.losses.make import Loss
from dpojax.reference import Params
from dpojax.run_directory import write_samples
from dpojax.sharding import Placement

# (run directory, step, seed, params, reference) -> what was measured of the samples
Sampled = Callable[[Path, int, int, Params, Params | None], dict[str, float]]


def make_sample_writer(
    config: TrainConfig,
    loss: Loss,
    loaded: Loaded,
    test: Sequence[Example],
    placement: Placement,
) -> Sampled:
    """A function that continues the same held-out prompts, writes them and measures."""
    prompts = [example.prompt.tolist() for example in test[: config.sample_prompts]]
    if not prompts or "reward_head" in loss.needs:
        return lambda *_: {}
    sampler = make_sampler(
        loaded,
        num_new=config.sample_tokens,
        batch_size=len(prompts),
        placement=placement,
    )
    kl = make_sample_kl(
        loaded, prompts, num_new=config.sample_tokens, placement=placement
    )

    def sampled(
        directory: Path,
        step: int,
        seed: int,
        params: Params,
        reference: Params | None,
    ) -> dict[str, float]:
        completions = sampler(params, prompts, seed)
        write_samples(directory, step, prompts, completions, loaded.tokenizer)
        values = sample_metrics(completions, loaded.eos_token)
        if reference is not None:
            values |= kl(params, reference, completions)
        return values

    return sampled
