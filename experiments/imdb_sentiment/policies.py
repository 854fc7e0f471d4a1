"""What a policy writes for held-out beginnings: its reward and its KL to the SFT model.

It knows no training: it is given parameters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from oracle import Oracle

from dpojax.data.tokenize import encode_prompt
from dpojax.evaluation import Sampler, make_sampler, sampled_kl
from dpojax.loading import Loaded
from dpojax.models.functional import Params
from dpojax.sharding import make_mesh, make_placement

BATCH = 256  # completions sampled or scored at one time
SPARE = 4  # tokens sampled beyond what is scored: see `Writer`


class Written(NamedTuple):
    """Completions of prompts, those of a prompt side by side."""

    prompts: list[list[int]]  # repeated for each
    tokens: list[list[int]]  # as far as they count
    whole: list[str]  # prompt and completion, as far as that counts: for the oracle
    texts: list[str]  # completions with the spare tokens: for training data


class Writer:
    """Samples any parameters of one model, at temperature 1.

    A prompt and its completion have `length` tokens at most. Text for training is a
    few tokens longer, so that training, which cuts at `length` as well, sees no end of
    sequence that the sampler did not write.
    """

    def __init__(self, sft: Loaded, length: int, num_samples: int = 1):
        self.sft, self._length, self._samples = sft, length, num_samples
        self._sampler: Sampler = make_sampler(
            sft,
            num_new=length + SPARE,
            batch_size=max(1, BATCH // num_samples),
            placement=make_placement(make_mesh()),
            num_samples=num_samples,
        )

    def write(self, params: Params, openings: Sequence[str], seed: int) -> Written:
        """What these parameters write after each opening."""
        tokenizer = self.sft.tokenizer
        prompts = [encode_prompt(text, tokenizer) for text in openings]
        sampled = self._sampler(params, prompts, seed)
        repeated = [prompt for prompt in prompts for _ in range(self._samples)]
        tokens = [
            row[: self._length - len(prompt)]
            for prompt, row in zip(repeated, sampled, strict=True)
        ]
        first = (text for text in openings for _ in range(self._samples))
        whole = [a + self._text(b) for a, b in zip(first, tokens, strict=True)]
        return Written(repeated, tokens, whole, [self._text(row) for row in sampled])

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.sft.tokenizer.decode(list(tokens), skip_special_tokens=True))


def measure(
    writer: Writer, params: Params, openings: Sequence[str], oracle: Oracle, seed: int
) -> dict[str, Any]:
    """Reward and KL of a policy's samples, with standard errors over the prompts.

    `kl` is KL(policy || SFT) summed over a completion, the paper's quantity;
    `kl_per_token` is that over the tokens of all completions; `reverse_per_token` is
    KL(SFT || policy) on the policy's samples per token, which DiscoPOP's script reports
    (there with the prompt's tokens).
    """
    written = writer.write(params, openings, seed)
    scores = oracle.log_odds(written.whole)
    kl, reverse = (
        sampled_kl(
            writer.sft,
            one,
            other,
            written.prompts,
            written.tokens,
            batch_size=BATCH,
            placement=make_placement(make_mesh()),
        )
        for one, other in ((params, writer.sft.params), (writer.sft.params, params))
    )
    length = float(np.mean([len(row) for row in written.tokens]))
    positive = 1 / (1 + np.exp(-scores))
    return {
        "reward": float(scores.mean()),
        "reward_se": standard_error(scores),
        "positive": float(positive.mean()),
        "kl": kl["kl"],
        "kl_se": kl["kl_se"],
        "kl_per_token": kl["kl"] / length,
        "reverse_per_token": reverse["kl"] / length,
        "length": length,
        "sample": written.whole[0],
    }


def standard_error(values: Float[np.ndarray, " values"]) -> float:
    """Of the mean; 0 of a single value."""
    return float(np.std(values) / np.sqrt(max(1, len(values) - 1)))
