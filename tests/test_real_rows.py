"""A step on real preferences, by every way of computing it, against the plain way.

The plain way knows nothing of ours: each prompt and completion is a padded row of its
own, attention has all scores, the softmax all logits, nothing is recomputed, and DPO is
its formula. Prompts and completions are those of HH, so that their lengths are ragged
as people's are; token ids are folded into a small vocabulary.
"""

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import keep_gradient

from dpojax.data.loader import packed_batches
from dpojax.data.packing import Example, as_batch
from dpojax.data.records import load_records
from dpojax.data.tokenize import load_tokenizer, tokenize_records
from dpojax.log_probs import logits_of
from dpojax.losses.make import make_loss
from dpojax.metrics import summarize
from dpojax.models.attention import attention
from dpojax.models.decoder import make_model
from dpojax.models.flash import flash_attention
from dpojax.models.functional import Params
from dpojax.models.kernels import make_attend
from dpojax.models.remat import Remat
from dpojax.models.shape import DecoderConfig
from dpojax.sharding import make_by_shard_and_head, make_constrain, make_mesh
from dpojax.spread import Spread
from dpojax.train_step import init_state, make_train_step

MOST_TOKENS, VOCABULARY = 160, 1020
CONFIG = DecoderConfig(
    vocabulary_size=VOCABULARY,
    width=32,
    num_layers=2,
    num_heads=4,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=48,
    window=40,
    window_layers=(True, False),
    initializer_range=0.2,
)


class Plain(NamedTuple):
    examples: list[Example]
    policy: Params
    reference: Params
    reference_log_probs: np.ndarray  # [examples, 2]
    loss: jax.Array
    gradient: Params
    token_metrics: dict[str, float]


@pytest.fixture(scope="module")
def plain(shared: Path) -> Plain:
    """Twelve pairs, two models, and the loss and gradient of the plain way."""
    examples = real_pairs(shared, 12)
    model = make_model(CONFIG, remat="none", attend=attention)
    policy, reference = (jax.jit(model.init)(jax.random.key(seed)) for seed in (0, 1))
    rows = [[Example(e.prompt, (one,))] for e in examples for one in e.completions]
    batch = as_batch(rows, length=MOST_TOKENS)

    def token_log_probs(params: Params) -> jax.Array:
        return jax.nn.log_softmax(logits_of(*model.apply(params, batch)))

    def log_probs(params: Params) -> jax.Array:
        every = token_log_probs(params)
        labels = jnp.asarray(batch.labels)[..., None]
        taken = jnp.take_along_axis(every, labels, -1)[..., 0]
        return jnp.sum(taken * batch.scored, axis=1).reshape(-1, 2)

    def loss(params: Params, under_reference: jax.Array) -> jax.Array:
        ratio = log_probs(params) - under_reference
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * (ratio[:, 0] - ratio[:, 1])))

    its = jax.jit(log_probs)(reference)
    value, gradient = jax.jit(jax.value_and_grad(loss))(policy, its)
    every = np.asarray(jax.jit(token_log_probs)(policy))
    entropy = -np.sum(np.exp(every) * every, axis=-1)
    hits, chosen = every.argmax(-1) == batch.labels, batch.scored[::2]
    token_metrics = {
        "entropy": float(entropy[batch.scored].mean()),
        "mean_token_accuracy": float(hits[::2][chosen].mean()),
    }
    its = np.asarray(its)
    return Plain(examples, policy, reference, its, value, gradient, token_metrics)


def real_pairs(shared: Path, count: int) -> list[Example]:
    """Pairs of HH that differ in length as much as any."""
    path = shared / "data" / "hh_harmless_base_test.jsonl.gz"
    records, _ = load_records([str(path)], split="train", kind="pair", max_examples=400)
    tokenizer = load_tokenizer(shared / "tokenizers" / "gpt2_encoder.json")
    examples, _ = tokenize_records(
        records, tokenizer, max_length=MOST_TOKENS, too_long="drop"
    )
    examples = sorted(
        examples, key=lambda e: len(e.prompt) + sum(map(len, e.completions))
    )
    places = np.linspace(0, len(examples) - 1, count).astype(int)
    return [folded(examples[place]) for place in places]


def folded(example: Example) -> Example:
    prompt, *completions = (
        tokens % VOCABULARY for tokens in (example.prompt, *example.completions)
    )
    return Example(prompt, tuple(completions))


class Way(NamedTuple):
    kernel: str
    remat: Remat
    mesh: tuple[int, int, int]
    num_microbatches: int
    precomputed: bool


WAYS = {
    "blocks, all recomputed, rows over four devices": Way(
        "xla", "full", (1, 4, 1), 1, False
    ),
    "flash, heads and vocabulary divided too, reference precomputed": Way(
        "flash", "save_attention", (1, 2, 2), 1, True
    ),
    "products kept, two microbatches": Way("xla", "dots", (4, 1, 1), 2, False),
}


@pytest.mark.parametrize("name", WAYS)
def test_packed_rows_give_the_plain_loss_and_gradient(plain: Plain, name: str):
    way = WAYS[name]
    mesh = make_mesh(*way.mesh)
    attend = make_attend("xla")
    if way.kernel == "flash":
        on_mesh = make_by_shard_and_head(mesh)

        def attend(*arrays: jax.Array, window: Any, scale: Any, cap: Any) -> jax.Array:
            fixed = partial(
                flash_attention, interpret=True, block=64, scale=scale, cap=cap
            )
            return on_mesh(fixed)(*arrays, window=window)

    model = make_model(
        CONFIG, remat=way.remat, attend=attend, constrain=make_constrain(mesh)
    )
    step = make_train_step(
        model.apply,
        make_loss("dpo", beta=0.1),
        keep_gradient(),
        num_microbatches=way.num_microbatches,
        token_metrics=("entropy", "mean_token_accuracy"),
        chunk_size=100,
        tile_size=300,
        spread=Spread(mesh),
    )
    examples, reference = plain.examples, plain.reference
    if way.precomputed:
        reference, known = None, plain.reference_log_probs.tolist()
        examples = [
            example._replace(reference=tuple(numbers))
            for example, numbers in zip(examples, known, strict=True)
        ]
    batches = packed_batches(examples, len(examples), 4 * way.num_microbatches)
    [(rows, batch)] = list(batches)
    assert len(rows) < len(examples)  # some share a row
    state = init_state(jax.tree.map(jnp.copy, plain.policy), keep_gradient())
    state, sums = step(state, reference, batch)
    found = summarize(sums)
    for name, value in {"loss": plain.loss, **plain.token_metrics}.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)

    def close(found: jax.Array, wanted: jax.Array) -> None:
        largest = float(jnp.max(jnp.abs(wanted)))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * largest)

    jax.tree.map(close, state.opt_state, plain.gradient)
