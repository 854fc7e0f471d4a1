"""What the functional tools work on: a small model, its pairs, and training as a scan.

The embedded task's model wrote eight completions of each opening, and an exact reward
ranks them. Of each opening the best stands against the worst and the second best
against the second worst, one pair a row, with the reference's log-probabilities. A
training run is one compiled function of parameters, pairs and the order of rows, so
that it can be differentiated, repeated and compared.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from dpojax.batch import Batch
from dpojax.compilation_cache import use_compilation_cache
from dpojax.config import TrainConfig
from dpojax.data.packing import as_batch, row_length
from dpojax.examples import load_examples
from dpojax.loading import Loaded, load_model
from dpojax.losses.make import Loss, make_loss
from dpojax.measure import Apply, Params, make_measure
from dpojax.optimizer import make_optimizer, make_schedule
from dpojax.placing import Keeping
from dpojax.sentiment import MAX_LENGTH, make_task
from dpojax.sharding import make_mesh
from dpojax.train_step import TrainState, make_train_step
from dpojax.whole_files import write_json_lines

PAIRS_OF_OPENING = 2
LEARNING_RATE = 7e-4
AT_ONCE = 64  # rows of a forward pass, and per-example gradients in memory


# (state, pairs, order) -> state, jitted
Training = Callable[[TrainState, Batch, Any], TrainState]


class Setting(NamedTuple):
    """A model that is policy and reference at first, and pairs that it wrote."""

    model: Loaded
    pairs: Batch  # NumPy arrays, one pair a row
    opening: np.ndarray  # [pairs]: the number of each pair's opening
    is_clear: np.ndarray  # [pairs]: whether it is an opening's best against its worst


class Split(NamedTuple):
    """Pairs whose openings differ from part to part."""

    train: Batch
    validation: Batch
    test: Batch
    flipped: np.ndarray  # [train pairs]: whether the label is wrong


def load_setting(directory: Path) -> Setting:
    """The embedded task with its seed 0, made where the directory does not have it.

    Args:
      directory: of the task's files.
    """
    use_compilation_cache()
    saved = directory / "task.json"
    if not saved.exists():
        directory.mkdir(parents=True)
        task = make_task(directory, TrainConfig(seed=0))
        saved.write_text(json.dumps([task.model, task.rankings]), encoding="utf-8")
    name, rankings = json.loads(saved.read_text("utf-8"))
    lines = Path(rankings).read_text("utf-8").splitlines()
    rows = [pair for line in lines for pair in pairs_of(json.loads(line))]
    write_json_lines(directory / "all_pairs.jsonl", rows)
    model = load_model(name, Keeping(make_mesh()))
    return make_setting(model, directory / "all_pairs.jsonl")


def pairs_of(ranking: dict[str, Any]) -> list[dict[str, str]]:
    """The k-th best completion against the k-th worst, where their rewards differ."""
    scores, texts = ranking["scores"], ranking["completions"]
    places = np.argsort(scores, kind="stable")
    ends = [(places[-1 - k], places[k]) for k in range(PAIRS_OF_OPENING)]
    return [
        {"prompt": ranking["prompt"], "chosen": texts[best], "rejected": texts[worst]}
        for best, worst in ends
        if scores[best] > scores[worst]
    ]


def make_setting(model: Loaded, file: Path) -> Setting:
    """Lays a file of pairs out, and adds what the model as reference says of them."""
    examples = load_examples(
        [str(file)],
        make_loss("dpo"),
        model.tokenizer,
        split="train",
        test_size=0,
        max_length=MAX_LENGTH,
    )
    length = max(map(row_length, examples))
    batch = as_batch([[example] for example in examples], length=length)
    known = log_probs(model.model.apply, model.params, batch)
    prompts = [example.prompt.tobytes() for example in examples]
    opening = np.unique(prompts, return_inverse=True)[1]
    # They stand together, and the first is the best against the worst.
    is_clear = np.append(True, opening[1:] != opening[:-1])
    pairs = batch._replace(reference=np.asarray(known)[:, None])
    return Setting(model, pairs, opening, is_clear)


@partial(jax.jit, static_argnums=0)
def log_probs(apply: Apply, params: Params, pairs: Batch) -> Array:
    """Log-probability of each completion of each pair ``[pairs, 2]``, nats."""
    measure = make_measure(apply, frozenset())

    def of_row(row: Batch) -> Array:
        alone = jax.tree.map(lambda array: array[None], row)
        return measure(params, None, alone).scores.policy[0, 0]

    rows = jax.tree.map(jnp.asarray, pairs)
    return jax.lax.map(of_row, rows, batch_size=AT_ONCE)


def margins(apply: Apply, params: Params, pairs: Batch) -> Array:
    """Log-ratio of the chosen completion less that of the rejected ``[pairs]``, nats.

    Implicit rewards differ by beta times this.
    """
    assert pairs.reference is not None
    log_ratio = log_probs(apply, params, pairs) - jnp.asarray(pairs.reference)[:, 0]
    return log_ratio[:, 0] - log_ratio[:, 1]


def accuracy(margin: Array) -> float:
    """The share of pairs that are ranked rightly; a tie counts one half."""
    return float(jnp.mean((1 + jnp.sign(margin)) / 2))


def take(pairs: Batch, rows: Any) -> Batch:
    """Some of the rows."""
    return jax.tree.map(lambda array: array[rows], pairs)


def flip(pairs: Batch, where: np.ndarray) -> Batch:
    """The same pairs, chosen and rejected exchanged in some rows.

    Tokens stay where they are: which branch they belong to is a number.
    """
    swapped = np.where(pairs.branch > 0, 3 - pairs.branch, 0)

    def exchange(array: Any) -> np.ndarray:
        return np.where(where[:, None, None], array[..., ::-1], array)

    return pairs._replace(
        branch=np.where(where[:, None], swapped, pairs.branch),
        completion_length=exchange(pairs.completion_length),
        score=exchange(pairs.score),
        reference=exchange(pairs.reference),
    )


def make_split(
    setting: Setting,
    seed: int,
    *,
    num_train: int,
    num_validation: int = 0,
    flipped: float = 0.0,
    clear: bool = True,
    openings: np.ndarray | None = None,
) -> Split:
    """Divides pairs by their openings; what is left over is for tests.

    Args:
      setting: all pairs.
      seed: decides which opening is where and which labels are wrong.
      num_train: pairs to train on.
      num_validation: pairs with right labels to estimate from.
      flipped: share of the training pairs whose labels are wrong.
      clear: whether both of these are the best against the worst only; tests are not.
      openings: those to use; None: all.
    """
    rng = np.random.default_rng(seed)
    used = np.unique(setting.opening) if openings is None else openings
    number = np.full(setting.opening.max() + 1, -1)
    number[rng.permutation(used)] = np.arange(len(used))
    place = number[setting.opening]
    rows = np.argsort(place, kind="stable")
    rows = rows[place[rows] >= 0]
    usable = rows[setting.is_clear[rows]] if clear else rows
    train, later = usable[:num_train], usable[num_train:]
    # An opening that a cut would divide goes to neither side.
    validation = later[place[later] > place[train[-1]]][:num_validation]
    last = np.concatenate([train, validation])[-1]
    test = rows[place[rows] > place[last]]
    wrong = np.zeros(num_train, bool)
    wrong[rng.permutation(num_train)[: round(flipped * num_train)]] = True
    parts = (take(setting.pairs, part) for part in (train, validation, test))
    right, validation, test = parts
    return Split(flip(right, wrong), validation, test, wrong)


def shuffled(num_pairs: int, batch_size: int, num_steps: int, seed: int) -> np.ndarray:
    """The rows of each step ``[steps, batch_size]``: one permutation after another."""
    rng = np.random.default_rng(seed)
    epochs = -(-num_steps * batch_size // num_pairs)
    rows = np.concatenate([rng.permutation(num_pairs) for _ in range(epochs)])
    return rows[: num_steps * batch_size].reshape(num_steps, batch_size)


def make_training(
    apply: Apply, loss: Loss, optimizer: optax.GradientTransformation
) -> Training:
    """Builds ``(state, pairs, order) -> state``: as many steps as `order` has rows.

    The steps are the train step's; pairs of weight 0 are as good as not there.
    """
    step = make_train_step(apply, loss, optimizer)

    def training(state: TrainState, pairs: Batch, order: Any) -> TrainState:
        rows = jax.tree.map(jnp.asarray, pairs)

        def one(state: TrainState, places: Array) -> tuple[TrainState, None]:
            return step(state, None, take(rows, places))[0], None

        return jax.lax.scan(one, state, jnp.asarray(order))[0]

    return jax.jit(training)


def make_run_optimizer(num_steps: int) -> optax.GradientTransformation:
    """The embedded task's, whose learning rate falls to 0 on a line."""
    schedule = make_schedule(
        "linear", learning_rate=LEARNING_RATE, num_steps=num_steps, warmup_steps=0
    )
    return make_optimizer("adamw", schedule, beta2=0.99)


def in_parts(pairs: Batch) -> Batch:
    """``[pairs, ...]`` to ``[parts, AT_ONCE, ...]``; the number must divide."""
    return jax.tree.map(
        lambda array: jnp.asarray(array).reshape(-1, AT_ONCE, *array.shape[1:]), pairs
    )


def mean_and_error(values: Any, digits: int = 3) -> str:
    """The mean over seeds and its standard error."""
    array = np.asarray(values, float)
    error = array.std(ddof=1) / np.sqrt(len(array))
    return f"{array.mean():.{digits}f} ± {error:.{digits}f}"


def markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
