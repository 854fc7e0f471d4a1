"""Experts: the grouped product, their training over devices and microbatches, balance.

One small model with experts serves all tests; transformers is compared with elsewhere.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file, save_file

from dpojax.batch import Batch
from dpojax.config import TrainConfig
from dpojax.data.packing import Example, as_batch
from dpojax.data.synthetic import make_reviews, make_tokenizer
from dpojax.expert_shards import make_by_shard
from dpojax.loading import load_model
from dpojax.log_probs import as_head
from dpojax.losses.make import make_loss
from dpojax.metrics import add, summarize
from dpojax.models.decoder import Model, make_model
from dpojax.models.experts import mix_experts
from dpojax.models.families import as_decoder_config
from dpojax.models.huggingface import read_params, write_model
from dpojax.models.shape import DecoderConfig, ExpertShape
from dpojax.optimizer import make_optimizer, make_schedule
from dpojax.placing import Keeping, make_kept_model
from dpojax.reference import copy_params
from dpojax.routing import Choice, Routing, count_choices, load_balancing_loss
from dpojax.run import run
from dpojax.sharding import (
    as_shardings,
    make_constrain,
    make_look_up,
    make_mesh,
    rows_sharding,
)
from dpojax.spread import Spread
from dpojax.train_step import init_state, make_eval_step, make_train_step

Step = tuple[Any, dict[str, float]]  # gradient and metrics

SMALL = DecoderConfig(
    vocabulary_size=64,
    width=16,
    num_layers=2,
    num_heads=2,
    num_key_heads=2,
    head_dimension=8,
    mlp_width=24,
    initializer_range=0.3,
    experts=ExpertShape(number=4, per_token=2, width=8, renormalised=True),
)


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(SMALL)


@pytest.fixture(scope="module")
def params(model: Model) -> Any:
    return jax.jit(model.init)(jax.random.key(0))


def make_batch(count: int = 8, seed: int = 0, length: int = 24) -> Batch:
    """Pairs of different lengths, one a row, padded."""
    random = np.random.default_rng(seed)

    def tokens() -> np.ndarray:
        return random.integers(1, 64, random.integers(1, 9)).astype(np.int32)

    examples = [Example(tokens(), (tokens(), tokens())) for _ in range(count)]
    return as_batch([[example] for example in examples], length=length)


def take_step(
    model: Model, params: Any, *, objective: str = "dpo", mesh: Any = None, **how: Any
) -> Step:
    """The gradient of one step, as the mean that Adam keeps of it, and its metrics."""
    schedule = make_schedule(
        "constant", learning_rate=1e-3, num_steps=9, warmup_steps=0
    )
    optimizer = make_optimizer("adamw", schedule, max_grad_norm=0.0)
    loss, batch = make_loss(objective), make_batch()
    state = init_state(copy_params(params), optimizer, loss)
    reference = jax.tree.map(lambda array: 1.1 * array, params)
    if mesh is not None:
        shardings = as_shardings(state, mesh)
        state = jax.device_put(state, shardings)
        reference = jax.device_put(reference, as_shardings(reference, mesh))
        batch = jax.device_put(batch, rows_sharding(mesh))
        how |= {"state_shardings": shardings, "rows_sharding": rows_sharding(mesh)}
        how |= {"spread": Spread(mesh)}
    step = make_train_step(model.apply, loss, optimizer, **how)
    state, sums = step(state, reference, batch)
    values = {k: v for k, v in summarize(sums).items() if "_se" not in k}
    momentum = optax.tree.get(state.opt_state, "mu")
    return jax.tree.map(lambda mean: np.asarray(mean) / 0.1, momentum), values


@pytest.fixture(scope="module")
def plain(model: Model, params: Any) -> Step:
    """One step without the balance in the objective."""
    return take_step(model, params)


@pytest.fixture(scope="module")
def balanced(model: Model, params: Any) -> Step:
    return take_step(model, params, aux_loss_coefficient=0.5)


def make_sharded(mesh: Mesh, dtype: str) -> Model:
    return make_model(
        SMALL,
        compute_dtype=jnp.dtype(dtype),
        constrain=make_constrain(mesh),
        by_shard=make_by_shard(mesh),
    )


def assert_close(first: Any, second: Any, tolerance: float) -> None:
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance),
        first,
        second,
    )


# -- Files ----------------------------------------------------------------------------

SETTINGS = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}


def test_a_file_has_a_tensor_for_each_expert_and_is_read_in_any_parts(
    model: Model, params: Any, tmp_path: Path
):
    """Experts may be divided over devices, or each of them."""
    write_model(tmp_path / "model", params, SETTINGS, lambda _: None)
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    up = tensors["model.layers.1.block_sparse_moe.experts.2.w3.weight"]
    kernel = params["blocks"]["experts"]["up"]["kernel"]
    np.testing.assert_array_equal(up, kernel[1, 2].T)
    mesh = make_mesh(1, 4, 1)
    by_expert = NamedSharding(mesh, P(None, "fsdp"))
    ours = as_shardings(params, mesh)
    theirs = jax.tree.map(
        lambda leaf, sharding: by_expert if leaf.ndim == 4 else sharding, params, ours
    )
    for shardings in (ours, theirs):
        read = read_params(tmp_path / "model", model.params, shardings)
        assert jax.tree.map(lambda array: array.sharding, read) == shardings
        jax.tree.map(np.testing.assert_array_equal, read, params)


def test_a_missing_expert_is_refused_by_name(model: Model, params: Any, tmp_path: Path):
    write_model(tmp_path / "model", params, SETTINGS, lambda _: None)
    path = tmp_path / "model" / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.0.block_sparse_moe.experts.3.w2.weight"]
    save_file(tensors, path)
    shardings = as_shardings(params, make_mesh())
    with pytest.raises(ValueError, match=r"lacks the tensor .*experts\.3\.w2\.weight"):
        read_params(tmp_path / "model", model.params, shardings)


def test_a_run_logs_the_balance_and_trains_on_it_where_the_config_says_so(
    tmp_path: Path,
):
    tokenizer = make_tokenizer()
    reviews = make_reviews(8, seed=0)
    pairs = [
        {"prompt": "the film was", "chosen": one, "rejected": other}
        for one, other in zip(reviews[::2], reviews[1::2], strict=True)
    ]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), "utf-8")
    gradients = {}
    for asked in (False, True):
        settings = SETTINGS | {
            "vocab_size": len(tokenizer),
            "output_router_logits": asked,
            "router_aux_loss_coef": 100.0,
            "initializer_range": 0.3,
        }
        model = make_model(as_decoder_config(settings))
        params = jax.jit(model.init)(jax.random.key(0))
        directory = tmp_path / f"model-{asked}"
        write_model(directory, params, settings, tokenizer.save_pretrained)
        result = run(
            TrainConfig(
                model=str(directory),
                data=(str(data),),
                output=str(tmp_path / f"run-{asked}"),
                test_size=2,
                max_length=128,
                batch_size=2,
                steps=1,
                sample_prompts=0,
            )
        )
        lines = (result.directory / "metrics.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        assert {row["split"] for row in rows} == {"train", "test"}
        assert all(row["aux_loss"] > 0 for row in rows)
        gradients[asked] = next(row["grad_norm"] for row in rows if "grad_norm" in row)
    assert gradients[True] > 2 * gradients[False]


# -- One layer ------------------------------------------------------------------------


@pytest.mark.parametrize("spread", ["random", "one", "last"])
def test_the_grouped_product_equals_every_expert_computed_for_itself(spread: str):
    """However uneven the groups: experts without a token, and one with all of them."""
    random = np.random.default_rng(0)
    experts, width, inside, rows, length = 5, 6, 7, 3, 4
    shapes = [(experts, width, inside)] * 2 + [(experts, inside, width)]
    kernels = [random.normal(size=shape).astype(np.float32) for shape in shapes]
    hidden = random.normal(size=(rows, length, width)).astype(np.float32)
    weight = random.uniform(size=(rows, length, 2)).astype(np.float32)
    index = {
        "random": random.permuted(
            np.tile(np.arange(experts), (rows, length, 1)), axis=-1
        )[..., :2],
        "one": np.tile(np.array([0, 1]), (rows, length, 1)),
        "last": np.tile(np.array([4, 2]), (rows, length, 1)),
    }[spread]

    def plain(kernels: Any, hidden: Any, weight: Any) -> jax.Array:
        gate, up, down = kernels
        every = jnp.tanh(jnp.einsum("rlw,ewi->rlei", hidden, gate))
        every *= jnp.einsum("rlw,ewi->rlei", hidden, up)
        every = jnp.einsum("rlei,eiw->rlew", every, down)
        chosen = jnp.take_along_axis(every, index[..., None], axis=2)
        return jnp.sum(chosen * weight[..., None], axis=2)

    def grouped(kernels: Any, hidden: Any, weight: Any) -> jax.Array:
        rows = (hidden, weight, jnp.asarray(index, jnp.int32))
        return mix_experts(kernels, rows, activate=jnp.tanh)

    arguments = (kernels, hidden, weight)
    assert_close(jax.jit(grouped)(*arguments), jax.jit(plain)(*arguments), 1e-4)
    slopes = random.normal(size=hidden.shape).astype(np.float32)

    def gradient(function: Any) -> Any:
        def total(*arguments: Any) -> jax.Array:
            return jnp.sum(slopes * function(*arguments))

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*arguments)

    assert_close(gradient(grouped), gradient(plain), 1e-4)


def test_in_bfloat16_weights_and_sums_stay_exact():
    """Two experts' outputs are added before, not after, they are rounded."""
    random = np.random.default_rng(1)
    shapes = [(4, 8, 8)] * 3
    kernels = [jnp.asarray(random.normal(size=s), jnp.bfloat16) for s in shapes]
    hidden = jnp.asarray(random.normal(size=(2, 3, 8)), jnp.bfloat16)
    weight = jnp.asarray(random.uniform(size=(2, 3, 2)), jnp.float32)
    index = jnp.tile(jnp.array([0, 3]), (2, 3, 1))

    def run(chosen: slice) -> jax.Array:
        one = weight[..., chosen], index[..., chosen]
        return mix_experts(kernels, (hidden, *one), activate=jnp.tanh)

    both = run(slice(2))
    assert both.dtype == jnp.float32
    rounded = [run(part).astype(jnp.bfloat16) for part in (slice(1), slice(1, 2))]
    apart = rounded[0].astype(jnp.float32) + rounded[1].astype(jnp.float32)
    # Each of the two apart has been rounded once, so they are near, and not equal.
    assert_close(both, apart, 0.1)
    assert not jnp.array_equal(both.astype(jnp.bfloat16), apart.astype(jnp.bfloat16))


def test_by_hand_the_balance_of_three_tokens():
    """Two experts, one for each token; the third token is padding.

    Token 1 goes to expert 0 with 0.9, token 2 to expert 1 with 0.6, so f = (1/2, 1/2)
    and P = ((0.9 + 0.4) / 2, (0.1 + 0.6) / 2); the loss is 2 * (0.5 * 0.65 + 0.5 *
    0.35) = 1. With token 2 padding too it is 2 * 1 * 0.9.
    """
    probability = jnp.array([[[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]]])
    choice = Choice(probability, jnp.argmax(probability, -1, keepdims=True))

    def balance(*real: bool) -> float:
        routing = count_choices(choice, jnp.array([real]))
        return float(load_balancing_loss(Routing(*(array[0] for array in routing))))

    assert balance(True, True, False) == pytest.approx(1.0)
    assert balance(True, False, False) == pytest.approx(1.8)
    assert balance(False, False, False) == 0


# -- Training -------------------------------------------------------------------------


def test_gradients_are_finite_and_reach_router_and_every_expert(plain: Step):
    gradient, _ = plain
    for leaf in jax.tree.leaves(gradient):
        assert np.isfinite(leaf).all()
    experts = gradient["blocks"]["experts"]
    assert (np.abs(experts["router"]["kernel"]).max(axis=1) > 0).all()
    for name in ("gate", "up", "down"):
        assert (np.abs(experts[name]["kernel"]).max(axis=(2, 3)) > 0).all()


@pytest.mark.parametrize(
    ("sizes", "dtype", "tolerance"),
    [
        ((2, 2, 1), "float32", 2e-5),
        ((1, 2, 2), "float32", 2e-5),
        ((1, 1, 4), "float32", 2e-5),
        ((1, 1, 1, 4), "float32", 2e-5),
        ((1, 2, 1, 2), "float32", 2e-5),
        ((1, 1, 2, 2), "float32", 2e-5),
        ((2, 1, 1, 2), "bfloat16", 5e-2),
        ((2, 1, 2), "bfloat16", 5e-2),  # of a step that one device computes exactly
    ],
)
def test_devices_that_share_rows_or_experts_equal_one(
    balanced: Step,
    params: Any,
    sizes: tuple[int, ...],
    dtype: str,
    tolerance: float,
):
    if jax.device_count() != 4:
        pytest.skip("needs the four virtual devices that conftest asks for")
    mesh = make_mesh(*sizes)
    gradient, values = take_step(
        make_sharded(mesh, dtype), params, mesh=mesh, aux_loss_coefficient=0.5
    )
    names = ["loss", "aux_loss", "logps/chosen", "rewards/margins", "grad_norm"]
    assert_close(gradient, balanced[0], tolerance)
    assert_close(
        [values[name] for name in names],
        [balanced[1][name] for name in names],
        5 * tolerance,
    )


@pytest.mark.parametrize(
    "experts", [None, ExpertShape(number=3, per_token=2, width=8, renormalised=True)]
)
def test_an_axis_of_experts_that_cannot_be_divided_is_refused(experts: Any):
    keeping = Keeping(make_mesh(expert=2), None, "none", None, 0.0)
    with pytest.raises(ValueError, match=r"--mesh\.expert is 2, .* must divide them"):
        make_kept_model(replace(SMALL, experts=experts), keeping, None)


def test_no_token_leaves_its_device_for_an_expert(tmp_path: Path):
    """Of all that devices exchange, only weights are more than in a dense model."""
    if jax.device_count() != 4:
        pytest.skip("needs the four virtual devices that conftest asks for")
    mesh = make_mesh(2, 2, 1)
    tokenizer = make_tokenizer()
    settings = SETTINGS | {"vocab_size": len(tokenizer)}
    config = as_decoder_config(settings)
    params = jax.jit(make_model(config).init)(jax.random.key(0))
    write_model(tmp_path / "model", params, settings, tokenizer.save_pretrained)
    loaded = load_model(str(tmp_path / "model"), Keeping(mesh, "float32"))
    dense = make_model(
        replace(config, experts=None),
        constrain=make_constrain(mesh),
        look_up=make_look_up(mesh),
        remat="none",
    )
    batch = make_batch(length=23)

    def exchanged(model: Model) -> list[str]:
        """The shapes of what has a number of tokens among its dimensions."""
        forward = jax.jit(
            lambda params, batch: model.apply(params, batch)[0],
            in_shardings=(as_shardings(model.params, mesh), rows_sharding(mesh)),
        )
        text = forward.lower(model.params, batch).compile().as_text() or ""
        shapes = re.findall(r"= (.*?)\{.* (?:all-\w+|collective-\w+)\(", text)
        assert any("[16,16]" in shape for shape in shapes)  # weights of attention
        return sorted(shape for shape in shapes if re.search(r"\b(23|46|184)\b", shape))

    assert exchanged(loaded.model) == exchanged(dense)


@pytest.mark.parametrize("coefficient", [0.0, 0.5])
def test_microbatches_equal_the_whole_batch(
    plain: Step, balanced: Step, model: Model, params: Any, coefficient: float
):
    whole, values = balanced if coefficient else plain
    split, split_values = take_step(
        model, params, num_microbatches=4, aux_loss_coefficient=coefficient
    )
    assert_close(whole, split, 1e-5)
    assert_close(values, split_values, 1e-5)


def test_the_balance_counts_by_its_coefficient_and_is_logged_anyway(
    plain: Step, balanced: Step, model: Model, params: Any
):
    batch = make_batch()

    def balance(params: Any) -> jax.Array:
        routing = as_head(model.apply(params, batch)[1]).routing
        assert routing is not None
        whole = Routing(*(jnp.sum(array, axis=0) for array in routing))
        return load_balancing_loss(whole)

    value, slope = jax.jit(jax.value_and_grad(balance))(params)
    (without, values), (with_it, other_values) = plain, balanced
    assert values["aux_loss"] == other_values["aux_loss"] == pytest.approx(value)
    assert values["loss"] == other_values["loss"]
    expected = jax.tree.map(lambda one, other: one + 0.5 * other, without, slope)
    assert_close(with_it, expected, 1e-5)


def test_the_balance_of_an_evaluation_does_not_depend_on_its_batches(
    model: Model, params: Any
):
    step = make_eval_step(model.apply, make_loss("dpo"))
    batch = make_batch()
    halves = [
        jax.tree.map(lambda array, rows=rows: array[rows], batch)
        for rows in (slice(6), slice(6, 8))
    ]
    whole = summarize(step(params, params, batch)[0])
    parts = summarize(add(*(step(params, params, half)[0] for half in halves)))
    assert whole["aux_loss"] == pytest.approx(parts["aux_loss"], rel=1e-6)
    assert whole["aux_loss"] > 2  # that of experts that are all alike is per_token


def test_padding_and_empty_rows_do_not_count_in_the_balance(model: Model, params: Any):
    step = make_eval_step(model.apply, make_loss("dpo"))
    short, long = (
        summarize(step(params, params, make_batch(length=length))[0])
        for length in (24, 40)
    )
    assert short["aux_loss"] == pytest.approx(long["aux_loss"], rel=1e-6)


def test_a_reward_model_logs_its_balance_too(params: Any):
    scalar = make_model(replace(SMALL, head="score"))
    rewards = jax.jit(scalar.init)(jax.random.key(1))
    _, values = take_step(scalar, rewards, objective="bradley_terry")
    assert values["aux_loss"] > 0


def test_a_model_without_experts_has_no_balance_to_train_on():
    dense = make_model(replace(SMALL, experts=None))
    params = jax.jit(dense.init)(jax.random.key(0))
    _, values = take_step(dense, params)
    assert "aux_loss" not in values
    with pytest.raises(ValueError, match="aux_loss_coefficient is 0.5, but the model"):
        take_step(dense, params, aux_loss_coefficient=0.5)
