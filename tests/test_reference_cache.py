"""The reference's log-probabilities, computed once: what they equal, and what is kept.

Where only keys and files matter, a stand-in counts what would have been computed.
"""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import SMALL, keep_gradient

from dpojax import precompute as precompute_room
from dpojax import reference_cache
from dpojax.cli import main
from dpojax.command_config import EvalConfig, ReferenceConfig
from dpojax.commands import evaluate_policy
from dpojax.config import (
    LoraConfig,
    LossConfig,
    MovingConfig,
    OptimizerConfig,
    TrainConfig,
)
from dpojax.data.packing import Example, as_batch, with_mismatched
from dpojax.examples import load_split
from dpojax.losses.make import make_loss
from dpojax.losses.objective import Need
from dpojax.measure import make_measure
from dpojax.metrics import summarize
from dpojax.models.decoder import Model, make_model
from dpojax.policy import load_policy, make_policy
from dpojax.precompute import precompute, reference
from dpojax.prepare import make_configured_loss
from dpojax.reference import copy_params
from dpojax.reference_cache import Cache, find_cache, hash_example, read_cache
from dpojax.reference_pass import make_reference_step, with_reference
from dpojax.run import run
from dpojax.sharding import make_mesh, make_placement
from dpojax.train_step import init_state, make_train_step


def random_examples(count: int, completions: int = 2, seed: int = 0) -> list[Example]:
    """Of different lengths, every third with tokens that are not scored."""
    rng = np.random.default_rng(seed)

    def tokens(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 128, rng.integers(low, high)).astype(np.int32)

    examples = []
    for number in range(count):
        some = tuple(tokens(3, 12) for _ in range(completions))
        masks = tuple(np.arange(len(one)) % 3 != 1 for one in some)
        masks = masks if number % 3 == 0 else None
        examples.append(Example(tokens(1, 9), some, masks=masks))
    return examples


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(SMALL)


@pytest.fixture(scope="module")
def two(model: Model) -> tuple[Any, Any]:
    """A policy and a reference."""
    init = jax.jit(model.init)
    return init(jax.random.key(0)), init(jax.random.key(1))


def precomputed(
    model: Model, params: Any, examples: list[Example], place: Path
) -> list[Example]:
    mesh = make_mesh()
    return with_reference(
        examples,
        make_reference_step(model.apply, mesh),
        lambda: params,
        find_cache(place, {}),
        batch_size=4,
        placement=make_placement(mesh),
    )


# -- The numbers ----------------------------------------------------------------------


@pytest.mark.parametrize(("objective", "parts"), [("ld_dpo", 1), ("aot", 2)])
def test_loss_and_gradients_are_those_of_the_reference_in_every_step(
    objective: str, parts: int, model: Model, two: tuple[Any, Any], tmp_path: Path
):
    policy, frozen = two
    loss = make_loss(objective)
    examples = random_examples(8)
    step = make_train_step(model.apply, loss, keep_gradient(), num_microbatches=parts)

    def taken(some: list[Example], reference: Any) -> tuple[Any, dict[str, float]]:
        batch = as_batch([[one] for one in some], length=32)
        state, sums = step(
            init_state(copy_params(policy), keep_gradient()), reference, batch
        )
        return state.opt_state, summarize(sums)

    gradient, values = taken(precomputed(model, frozen, examples, tmp_path), None)
    wanted_gradient, wanted = taken(examples, frozen)
    assert values.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(values[name], value, 1e-5, 1e-6, err_msg=name)
    for got, leaf in zip(
        jax.tree.leaves(gradient), jax.tree.leaves(wanted_gradient), strict=True
    ):
        np.testing.assert_allclose(got, leaf, 1e-5, 1e-5 * np.abs(leaf).max())


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_in_other_rows_the_numbers_are_the_same_but_for_rounding(
    dtype: str, bound: float, two: tuple[Any, Any], tmp_path: Path
):
    """So at step 0 log-ratios are not exactly 0; a step of bfloat16 is 2^-8."""
    model = make_model(SMALL, compute_dtype=jnp.dtype(dtype))
    examples = random_examples(30, completions=3)
    examples.append(examples[4])  # measured once
    found = precomputed(model, two[1], examples, tmp_path)
    batch = as_batch([[one] for one in examples], length=64, num_completions=3)
    needs: frozenset[Need] = frozenset({"reference", "prefix"})
    measure = make_measure(model.apply, needs)
    scores = jax.jit(measure)(two[0], two[1], batch).scores
    assert scores.reference is not None and scores.reference_prefix is not None
    whole = np.array([one.reference for one in found])
    prefix = np.array([one.reference_prefix for one in found])
    np.testing.assert_allclose(whole, scores.reference[:, 0], bound)
    np.testing.assert_allclose(prefix, scores.reference_prefix[:, 0], bound)
    assert not np.allclose(prefix, whole, 0.1)
    assert len(read_cache(find_cache(tmp_path, {}))) == 30


def test_a_step_without_the_reference_takes_a_fifth_less(
    model: Model, two: tuple[Any, Any]
):
    """With layers recomputed, 4 forward passes of 5 remain; and one set of weights."""
    examples = random_examples(8)
    known = [one._replace(reference=(-1.0, -2.0)) for one in examples]
    optimizer = keep_gradient()
    step: Any = make_train_step(model.apply, make_loss("dpo"), optimizer)
    state = jax.eval_shape(lambda: init_state(two[0], optimizer))

    def cost(some: list[Example], reference: Any) -> tuple[float, int]:
        batch = as_batch([[one] for one in some], length=32)
        compiled = step.lower(state, reference, batch).compile()
        memory = compiled.memory_analysis()
        return compiled.cost_analysis()["flops"], memory.argument_size_in_bytes

    (less, held), (more, held_by_both) = cost(known, None), cost(examples, two[1])
    assert 0.7 < less / more < 0.85
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(two[1]))
    assert held_by_both - held >= 0.99 * size


# -- What is computed again, and what is not ------------------------------------------


class Counted(NamedTuple):
    """How many examples a precomputation computed, and all that it gave."""

    computed: int
    examples: list[Example]


@pytest.fixture(scope="module")
def cached(config: TrainConfig, place: Path) -> TrainConfig:
    return replace(config, reference="precomputed", reference_cache=str(place / "kept"))


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Callable[[TrainConfig], Counted]:
    """Precomputes with a stand-in for the model, and counts."""
    seen: list[int] = []

    def step(params: Any, batch: Any) -> np.ndarray:
        seen.append(int(np.count_nonzero(batch.live)))
        return stand_in(params, batch)

    monkeypatch.setattr(precompute_room, "make_reference_step", lambda *_, **__: step)

    def counted(config: TrainConfig) -> Counted:
        seen.clear()
        loss, mesh = make_configured_loss(config.loss), make_mesh()
        loaded = load_policy(config, loss, mesh)
        assert make_policy(config, loss, loaded, mesh).reference is None
        names = ("train", "test")
        splits = [load_split(config, loss, loaded.tokenizer, name) for name in names]
        found = precompute(config, loaded, mesh, splits).splits
        return Counted(sum(seen), [one for split in found for one in split])

    return counted


def stand_in(params: Any, batch: Any) -> Any:
    """Gives each completion minus the number of its scored tokens."""
    lengths = -np.asarray(batch.completion_length, np.float32)
    return np.stack([lengths, lengths], axis=-1)


def changed_weights(model: Path, directory: Path, by: float) -> str:
    """A copy of a model, one number of it changed."""
    shutil.copytree(model, directory)
    tensors = load_file(directory / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][3, 5] += by
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return str(directory)


def test_what_changes_a_number_is_computed_again_and_nothing_else(
    cached: TrainConfig, place: Path, tmp_path: Path, count: Any
):
    """Moved, a model is the same; with one weight changed it is not.

    Adapters exist beside one base, whose numbers are theirs at step 0. Only precomputed
    can their reference be another model.
    """
    kept = replace(cached, reference_cache=str(tmp_path / "kept"))
    first = count(kept)
    assert first.computed == 20 == len(first.examples)
    own, rank = Path(str(kept.model)), LoraConfig(rank=2)
    moved = changed_weights(own, tmp_path / "moved", 0.0)
    changed = changed_weights(own, tmp_path / "changed", 1e-3)
    loss = LossConfig(name="ld_dpo", beta=0.5)
    same = {
        "the run": replace(kept, loss=loss, epochs=3, steps=None, seed=7),
        "the splits": replace(kept, max_examples=7, test_size=2),
        "the place": replace(kept, reference=f"precomputed:{moved}"),
        "adapters": replace(kept, lora=LoraConfig(rank=4, kind="dora")),
    }
    for name, config in same.items():
        assert count(config).computed == 0, name
    other = {
        "the model": replace(kept, lora=rank, reference=f"precomputed:{changed}"),
        "the dtype": replace(kept, compute_dtype="bfloat16"),
        "the base": replace(kept, lora=replace(rank, base="int8")),
        "nothing": replace(kept, model=changed),
    }
    found = {name: count(config).computed for name, config in other.items()}
    assert found == dict.fromkeys(other, 20) | {"nothing": 0}


def test_what_truncation_leaves_decides_and_only_what_is_new_is_computed(
    cached: TrainConfig, place: Path, tmp_path: Path, count: Any
):
    kept = replace(cached, reference_cache=str(tmp_path / "kept"))
    assert count(kept).computed == 20
    shorter = count(replace(kept, max_length=24))
    assert 0 < shorter.computed <= 20
    for one in shorter.examples:  # the stand-in's numbers belong to these tokens
        assert one.reference == tuple(-len(some) for some in one.completions)
    rows = (place / "pairs.jsonl").read_text().splitlines()
    pair = json.loads(rows[3])
    rows[3] = json.dumps(pair | {"chosen": pair["chosen"] + " really"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    assert count(replace(kept, data=(str(tmp_path / "pairs.jsonl"),))).computed == 1


def test_another_chat_template_is_computed_again(
    cached: TrainConfig, tmp_path: Path, count: Any
):
    """The second renders the first of two chats otherwise, and the other alike."""
    model = tmp_path / "model"
    shutil.copytree(str(cached.model), model)
    chats = [
        {
            "prompt": [{"role": "user", "content": asked}],
            "chosen": [{"role": "assistant", "content": "I loved it"}],
            "rejected": [{"role": "assistant", "content": "I hated it"}],
        }
        for asked in ("the film", "the book", "a novel")
    ]
    data = tmp_path / "chats.jsonl"
    data.write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    kept = replace(
        cached,
        model=str(model),
        data=(str(data),),
        test_size=1,
        reference_cache=str(tmp_path / "kept"),
    )

    def counted(before_books: str) -> int:
        template = (
            "{% for m in messages %}{% if 'book' in m['content'] %}"
            + before_books
            + "{% endif %} {{ m['content'] }} {{ eos_token }}{% endfor %}"
        )
        (model / "chat_template.jinja").write_text(template)
        return count(kept).computed

    assert [counted(text) for text in ("", "", "really")] == [3, 0, 1]


def test_other_adapters_are_computed_again(
    config: TrainConfig, cached: TrainConfig, tmp_path: Path, count: Any
):
    """Trained further, adapters are their own reference: their numbers and scale."""
    lora, first = LoraConfig(rank=2), tmp_path / "first"
    few = {"steps": 1, "sample_prompts": 0}
    run(replace(config, output=str(first), lora=lora, **few))
    kept = replace(cached, reference_cache=str(tmp_path / "kept"))

    def counted(name: str) -> int:
        return count(replace(kept, model=str(tmp_path / name))).computed

    shutil.move(first / "final", tmp_path / "own")
    for name in ("moved", "trained", "scaled"):
        shutil.copytree(tmp_path / "own", tmp_path / name)
    weights = tmp_path / "trained/adapter_model.safetensors"
    tensors = load_file(weights)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] * 1.001}, weights, {"format": "pt"})
    settings = tmp_path / "scaled/adapter_config.json"
    held = json.loads(settings.read_text())
    settings.write_text(json.dumps(held | {"lora_alpha": held["lora_alpha"] + 1}))
    found = {name: counted(name) for name in ("own", "moved", "trained", "scaled")}
    assert found == {"own": 20, "moved": 0, "trained": 20, "scaled": 20}


def test_tokens_boundaries_and_masks_make_the_key_and_a_full_mask_is_none():
    one = Example(np.array([5, 6]), (np.array([7, 8]), np.array([9])))
    full = one._replace(masks=(np.ones(2, bool), np.ones(1, bool)), weight=3.0)
    assert hash_example(one) == hash_example(full)
    others = [
        Example(np.array([5]), (np.array([6, 7, 8]), np.array([9]))),
        Example(np.array([5, 6]), (np.array([7]), np.array([8, 9]))),
        Example(np.array([5, 6]), (np.array([7, 8, 9]),)),
        Example(np.array([5, 6]), (np.array([9]), np.array([7, 8]))),
        Example(np.array([5, 6]), (np.array([7, 1]), np.array([9]))),
        full._replace(masks=(np.array([True, False]), np.ones(1, bool))),
    ]
    assert len({hash_example(example) for example in (one, *others)}) == 7
    half = Example(np.array([5]), (np.array([7, 8]),), masks=(np.arange(2) < 1,))
    whole = Example(np.array([5, 7]), (np.array([8]),))
    assert hash_example(half) != hash_example(whole)


# -- Files ----------------------------------------------------------------------------


def fill(examples: list[Example], cache: Cache, step: Any = stand_in) -> int:
    """How many examples are computed."""
    seen: list[int] = []

    def counted(params: Any, batch: Any) -> Any:
        seen.append(int(np.count_nonzero(batch.live)))
        return step(params, batch)

    how: Any = {
        "batch_size": 4,
        "placement": make_placement(make_mesh())._replace(
            put=lambda batch: batch, num_shards=2
        ),
    }
    found = with_reference(examples, counted, lambda: None, cache, per_file=8, **how)
    for one in found:
        lengths = [
            len(some) if one.masks is None else np.count_nonzero(one.masks[index])
            for index, some in enumerate(one.completions)
        ]
        assert one.reference == one.reference_prefix == tuple(-n for n in lengths)
    return sum(seen)


def test_what_was_computed_before_an_interruption_is_kept(tmp_path: Path):
    cache, calls = find_cache(tmp_path, {}), iter(range(100))

    def interrupted(params: Any, batch: Any) -> np.ndarray:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return stand_in(params, batch)

    examples = random_examples(40)
    with pytest.raises(KeyboardInterrupt):
        fill(examples, cache, interrupted)
    kept = len(read_cache(cache))
    assert 8 <= kept < 40
    assert fill(examples, cache) == 40 - kept
    assert fill(examples, cache) == 0
    assert {path.suffix for path in cache.directory.iterdir()} == {
        ".json",
        ".safetensors",
    }


@pytest.mark.parametrize("how", ["cut short", "changed", "empty"])
def test_a_damaged_file_is_never_trusted(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    cache, examples = find_cache(tmp_path, {}), random_examples(40)
    fill(examples, cache)
    path = min(cache.directory.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    held = len(load_file(path)["keys"])
    content[-3] ^= 64
    damaged = {"cut short": content[:-4], "changed": content, "empty": b""}[how]
    path.write_bytes(damaged)
    assert fill(examples, cache) == held
    assert "is damaged and removed" in capsys.readouterr().out
    assert fill(examples, cache) == 0


def test_damaged_files_that_another_process_removes_meanwhile_are_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """While the first is being read, both disappear."""
    cache = find_cache(tmp_path, {})
    cache.directory.mkdir()
    paths = [cache.directory / f"{name}.safetensors" for name in "ab"]
    for path in paths:
        path.write_bytes(b"damaged")
    said: list[str] = []

    def remove_both(text: str) -> None:
        said.append(text)
        for path in paths:
            path.unlink()

    monkeypatch.setattr(reference_cache, "say", remove_both)
    assert read_cache(cache) == {} and len(said) == 1


def test_numbers_that_are_not_finite_are_refused_and_not_kept(tmp_path: Path):
    cache = find_cache(tmp_path, {})

    def overflows(params: Any, batch: Any) -> np.ndarray:
        return stand_in(params, batch) - np.inf

    with pytest.raises(ValueError, match="damage in its weights"):
        fill(random_examples(4), cache, overflows)
    assert read_cache(cache) == {}


def test_by_hand_the_numbers_stand_where_their_completions_do():
    examples = [
        one._replace(reference=(-1.0, -float(n)), reference_prefix=(-0.5, -n / 2))
        for n, one in enumerate(random_examples(3), start=2)
    ]
    batch = as_batch([examples[:2], [], examples[2:]], length=96, num_slots=2)
    assert batch.reference is not None and batch.reference_prefix is not None
    empty = [0, 0]
    wanted = [[[-1, -2], [-1, -3]], [empty, empty], [[-1, -4], empty]]
    assert batch.reference.tolist() == wanted
    np.testing.assert_array_equal(batch.reference_prefix, np.array(wanted) / 2)


def test_batches_with_and_without_the_numbers_are_not_mixed():
    with_numbers, without = random_examples(2)
    with_numbers = with_numbers._replace(reference=(-1.0, -2.0))
    with pytest.raises(ValueError, match="1 of 2 examples of a batch come with"):
        as_batch([[with_numbers], [without]], length=64)
    # KTO's examples get another completion, of which nothing is known.
    assert all(one.reference is None for one in with_mismatched([with_numbers] * 2, 32))


# -- Runs -----------------------------------------------------------------------------


def test_a_run_and_its_resumption_take_each_examples_own_numbers(
    cached: TrainConfig,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
):
    """At a learning rate of almost 0 the policy stays: all losses are log 2."""
    still = OptimizerConfig(learning_rate=1e-30)
    parts = replace(cached, output=str(tmp_path / "run"), optimizer=still, steps=2)
    parts = replace(parts, sample_prompts=0, evaluate_every=1)
    run(replace(parts, stop_after=1))
    directory = run(replace(parts, resume=True)).directory
    said = capsys.readouterr().out
    assert said.count("At step 0 the policy is not equal to the reference") == 1
    rows = map(json.loads, (directory / "metrics.jsonl").read_text().splitlines())
    found = {(row["split"], row["step"]): row for row in rows}
    trained, tested = [("train", 1), ("train", 2)], [("test", n) for n in range(3)]
    assert found.keys() == {*trained, *tested}
    for row in found.values():
        assert abs(row["loss"] - math.log(2)) < 1e-5
        assert row["logratios/chosen_se"] < 1e-4 < 1 < row["logps/chosen_se"]
    again = replace(parts, resume=True)
    with pytest.raises(ValueError, match="another reference: it was precomputed"):
        run(replace(again, reference=None, reference_cache=None))
    shutil.move(str(place / "model"), tmp_path / "model")
    changed_weights(tmp_path / "model", place / "model", 0.5)
    with pytest.raises(ValueError, match="another content of the reference"):
        run(again)
    shutil.rmtree(place / "model")
    shutil.move(tmp_path / "model", place / "model")


def test_the_command_computes_ahead_what_a_run_of_the_same_flags_uses(
    cached: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = [
        *("--model", str(cached.model), "--data", *cached.data, "--test-size", "4"),
        *("--max-length", "96", "--batch-size", "4"),
    ]
    main(["reference", *flags])
    said = capsys.readouterr().out
    assert "0 examples reused, 20 to compute" in said
    directory = tmp_path / "dpojax" / "reference"
    assert [len(list(one.glob("*.safetensors"))) for one in directory.iterdir()] == [1]
    main(["reference", *flags, "--reference", f"precomputed:{cached.model}"])
    assert "20 examples reused, 0 to compute" in capsys.readouterr().out


def test_settings_that_cannot_take_effect_are_refused(
    cached: TrainConfig, config: TrainConfig, place: Path
):
    def refused(message: str, base: TrainConfig = cached, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            run(replace(base, output=str(place / "nowhere"), **changes))

    def loss(name: str) -> LossConfig:
        return LossConfig(name=name)

    refused("no effect on a reference that is computed", reference=None)
    refused("names no model", reference="precomputed:")
    refused("no model directory 'nowhere'", reference="precomputed:nowhere")
    refused("leave out --moving", moving=MovingConfig(kind="tr_dpo"))
    refused("compares whole distributions", loss=loss("tdpo2"))
    refused("changes with the batch", loss=loss("kto"))
    refused("uses no reference", loss=loss("simpo"))
    assert not (place / "nowhere").exists()
    data, model = config.data, str(config.model)
    with pytest.raises(ValueError, match="is for training"):
        evaluate_policy(EvalConfig(model=model, data=data, reference="precomputed"))
    with pytest.raises(ValueError, match="uses no reference"):
        reference(ReferenceConfig(model=model, data=data, loss=loss("simpo")))
