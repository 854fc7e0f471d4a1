"""Adapters in the upper layers only: what lies below them is computed once."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from test_lora import MODULES, SMALL, constant_adamw, make_batch, moved

from dpojax.gradient import as_judge
from dpojax.log_probs import as_head
from dpojax.losses.make import make_loss
from dpojax.measure import make_measure
from dpojax.models.adapter_modules import as_last_layers
from dpojax.models.decoder import DecoderConfig, Model, make_model
from dpojax.models.functional import Params
from dpojax.models.lora import Frozen, LoraShape, graft, make_roles, start_adapters
from dpojax.models.quantized import make_quantize
from dpojax.models.remat import Remat
from dpojax.models.shape import ExpertShape
from dpojax.train_step import init_state, make_update

NUM_LAYERS, ADAPTED = 7, 3
TRUNK = NUM_LAYERS - ADAPTED
DEEP = replace(SMALL, num_layers=NUM_LAYERS)
ALTERNATING = tuple(layer % 3 == 0 for layer in range(NUM_LAYERS))
WHOLE = LoraShape(modules=MODULES, rank=4, alpha=8.0)
UPPER = replace(WHOLE, layers=ADAPTED)
KINDS: dict[str, tuple[DecoderConfig, Any, Remat]] = {
    "int8": (DEEP, "int8", "none"),
    "windows and experts": (
        replace(
            DEEP,
            window=4,
            window_layers=ALTERNATING,
            rotary_layers=ALTERNATING,
            experts=ExpertShape(number=4, per_token=2, width=32, renormalised=True),
        ),
        None,
        "full",
    ),
}


def make_base(config: DecoderConfig, quantization: Any) -> Params:
    base = jax.jit(make_model(config).init)(jax.random.key(0))
    convert, name = make_quantize(quantization), jax.tree_util.keystr
    return jax.tree.map_with_path(
        lambda path, leaf: convert(name(path, simple=True, separator="/"), leaf), base
    )


def without_lower_products(adapters: Params) -> Params:
    """Adapters of every layer, of which those of the trunk's layers add nothing."""
    flat: dict = flatten_dict(adapters)
    return unflatten_dict(
        {
            path: leaf.at[:TRUNK].set(0) if path[-1] == "b" else leaf
            for path, leaf in flat.items()
        }
    )


def upper_part(adapters: Params) -> Params:
    return jax.tree.map(lambda leaf: leaf[TRUNK:], adapters)


def largest_difference(one: Any, other: Any) -> float:
    def relative(x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.max(jnp.abs(x - y)) / jnp.maximum(jnp.max(jnp.abs(y)), 1e-9)

    return float(max(jax.tree.leaves(jax.tree.map(relative, one, other))))


@pytest.mark.parametrize("kind", KINDS)
def test_they_are_those_of_every_layer_whose_lower_ones_add_nothing(kind: str):
    """Hidden states, what experts chose, and the gradient."""
    config, quantization, remat = KINDS[kind]
    config_of = partial(make_model, config, remat=remat, quantization=quantization)
    modules = MODULES - {"mlp/up", "mlp/down"} if config.experts else MODULES
    models = [config_of(lora=replace(one, modules=modules)) for one in (WHOLE, UPPER)]
    base, batch = make_base(config, quantization), make_batch(count=2)
    drawn = [model.init_adapters(jax.random.key(1)) for model in models]
    jax.tree.map(np.testing.assert_array_equal, upper_part(drawn[0]), drawn[1])
    whole = without_lower_products(moved(drawn[0]))

    def computed(model: Model, adapters: Params) -> Any:
        def loss(adapters: Params) -> tuple[jax.Array, Any]:
            hidden, output = model.apply(graft(base, adapters), batch)
            return jnp.sum(hidden**2), (hidden, as_head(output).routing)

        return jax.jit(jax.grad(loss, has_aux=True))(adapters)

    slopes, wanted = computed(models[0], whole)
    upper_slopes, found = computed(models[1], upper_part(whole))
    assert largest_difference(found, wanted) < 1e-6
    assert largest_difference(upper_slopes, upper_part(slopes)) < 1e-6


def test_doras_magnitudes_are_those_of_the_layers_that_have_them():
    whole = replace(WHOLE, kind="dora")
    base = make_base(DEEP, None)
    started = [
        start_adapters(
            base, make_model(DEEP, lora=one).init_adapters(jax.random.key(1))
        )
        for one in (whole, replace(whole, layers=ADAPTED))
    ]
    jax.tree.map(np.testing.assert_array_equal, upper_part(started[0]), started[1])


def test_with_dropout_the_trunk_has_the_bits_of_the_reference():
    shape = replace(UPPER, dropout=0.5)
    model, base, batch = (
        make_model(DEEP, lora=shape),
        make_base(DEEP, None),
        make_batch(),
    )
    adapters = moved(model.init_adapters(jax.random.key(1)))
    trace = jax.jit(model.trace)
    roles = make_roles(shape)(adapters, Frozen(base), jnp.int32(0))
    policy, reference = (trace(params, batch) for params in roles)
    np.testing.assert_array_equal(policy[: TRUNK + 1], reference[: TRUNK + 1])
    assert all(jnp.abs(policy - reference).max(axis=(1, 2))[TRUNK + 1 :] > 1e-3)


def test_a_cache_holds_the_trunks_layers_too():
    model, base = make_model(DEEP, lora=UPPER), make_base(DEEP, None)
    params = graft(base, moved(model.init_adapters(jax.random.key(1))))
    batch = make_batch(count=1)
    prompt = jnp.asarray(batch.tokens)[:, :6]
    position, example = jnp.arange(6)[None], jnp.ones((1, 6), jnp.int32)
    row = batch._replace(
        tokens=prompt, position=position, example=example, branch=0 * example
    )

    @jax.jit
    def in_two_parts(params: Params) -> jax.Array:
        empty = model.empty_cache(1, 6)
        first, _, cache = model.extend(
            params, prompt[:, :4], position[:, :4], example, empty, 0
        )
        rest, _, _ = model.extend(
            params, prompt[:, 4:], position[:, 4:], example, cache, 4
        )
        return jnp.concatenate([first, rest], axis=1)

    wanted = jax.jit(model.apply)(params, row)[0]
    np.testing.assert_allclose(in_two_parts(params), wanted, rtol=1e-4, atol=1e-4)


# -- What they cost -------------------------------------------------------------------


@pytest.mark.parametrize(("runs", "parts"), [(1, 1), (4, 2)])
def test_policy_and_reference_of_all_runs_pass_the_trunk_once(runs: int, parts: int):
    """Loops by their turns: the trunk's, forward alone; those above it forward and
    backward, and under the reference. One more goes through the parts."""
    model, loss = make_model(DEEP, lora=UPPER), make_loss("dpo")
    optimizer = constant_adamw()
    measure = make_measure(model.apply, loss.needs, begin=model.begin)
    update = make_update(
        measure,
        as_judge(loss),
        optimizer,
        num_microbatches=parts,
        roles=make_roles(UPPER),
    )

    def state(key: jax.Array) -> Any:
        return init_state(model.init_adapters(key), optimizer)

    step: Callable[..., Any] = update
    if runs > 1:
        step = jax.vmap(update, in_axes=(0, None, None))
        states = jax.eval_shape(jax.vmap(state), jax.random.split(jax.random.key(0), 4))
    else:
        states = jax.eval_shape(state, jax.random.key(0))
    lowered = jax.jit(step).lower(states, Frozen(model.params), make_batch())
    text = lowered.compile().as_text()
    assert text is not None
    turns = Counter(map(int, re.findall(r'known_trip_count":\{"n":"(\d+)"', text)))
    assert turns == {TRUNK: 1, ADAPTED: 3} | ({parts: 1} if parts > 1 else {})


# -- How many there can be ------------------------------------------------------------


def test_all_layers_are_no_upper_layers_and_more_than_all_are_refused():
    base = make_model(DEEP).params
    assert as_last_layers(NUM_LAYERS, base) is None
    assert as_last_layers(None, base) is None
    assert as_last_layers(1, base) == 1
    for wanted in (0, 8):
        with pytest.raises(
            ValueError, match=f"lora.layers is {wanted};.*7 layers, 1 to"
        ):
            as_last_layers(wanted, base)
