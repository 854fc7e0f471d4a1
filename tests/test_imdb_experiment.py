"""What can be wrong silently in the IMDb experiment: who is chosen, and best-of-N."""

import math
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from dpojax.loading import load_model
from dpojax.placing import Keeping
from dpojax.sharding import make_mesh

FOLDER = Path(__file__).parent.parent / "experiments" / "imdb_sentiment"


@pytest.fixture(scope="module", autouse=True)
def modules() -> Iterator[None]:
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def preferences() -> Any:
    return import_module("preferences")


def test_four_completions_make_six_pairs_and_the_higher_score_is_chosen() -> None:
    pairs = list(preferences().make_pairs("p", list("abcd"), [0.5, -1.0, 2.0, 1.0]))
    assert len(pairs) == 6
    assert {(pair["chosen"], pair["rejected"]) for pair in pairs} == {
        ("a", "b"),
        ("c", "a"),
        ("d", "a"),
        ("c", "b"),
        ("d", "b"),
        ("c", "d"),
    }
    assert all(pair["chosen_score"] > pair["rejected_score"] for pair in pairs)


def test_ties_and_equal_texts_make_no_pair() -> None:
    make_pairs = preferences().make_pairs
    assert list(make_pairs("p", ["a", "b"], [1.0, 1.0])) == []
    assert list(make_pairs("p", ["a", "a"], [1.0, 2.0])) == []


def test_best_of_takes_the_first_samples_alone() -> None:
    scores = np.array([[1.0, 3.0, 9.0], [2.0, -1.0, 0.0]])
    best_of = preferences().best_of
    assert best_of(scores, 1).tolist() == [1.0, 2.0]
    assert best_of(scores, 2).tolist() == [3.0, 2.0]


def test_the_bound_on_best_of_is_that_of_a_uniform_rank() -> None:
    """The best of two has density 2u over ranks u: KL is the mean of 2u log 2u."""
    assert preferences().best_of_kl(1) == 0
    u = (np.arange(100_000) + 0.5) / 100_000
    kl = np.mean(2 * u * np.log(2 * u))
    assert math.isclose(preferences().best_of_kl(2), kl, abs_tol=1e-6)


def test_openings_have_two_to_eight_tokens_and_differ() -> None:
    reviews = import_module("reviews")
    tokenizer = import_module("language").train_tokenizer(
        ["the film was good and the end was bad"] * 3, 300
    )
    texts = ["the film was good and the end", "the film was good", "the end was bad"]
    some = [reviews.Review(text, None) for text in texts * 4]
    found = reviews.openings(some, tokenizer, 5, seed=0)
    assert len(found) == len(set(found)) == 5
    for text in found:
        assert any(whole.startswith(text) for whole in texts)
        assert 2 <= len(tokenizer.encode(text, add_special_tokens=False)) <= 8


def test_a_piece_is_longer_than_its_window_where_the_review_is() -> None:
    reviews = import_module("reviews")
    words = " ".join(str(index) for index in range(1_000))
    for seed in range(20):
        [piece] = reviews.pieces([reviews.Review(words, None)], 64, seed)
        assert piece.strip() in words
        ends = piece.endswith(" 999")
        assert ends or len(piece.split()) == 80


class Lengths:
    """An oracle to which the longer text is the better one."""

    def log_odds(self, texts: list[str]) -> np.ndarray:
        return np.array([float(len(text)) for text in texts])


def test_the_sft_model_has_kl_0_and_a_changed_one_has_not(tmp_path: Path) -> None:
    """What is measured is cut at the length, and what is trained on goes beyond it."""
    policies, size = import_module("policies"), import_module("sizes").TINY
    texts = ["the film was good and the end was bad"]
    import_module("language").write_new_model(tmp_path / "m", texts, size)
    sft = load_model(str(tmp_path / "m"), Keeping(make_mesh()))
    writer = policies.Writer(sft, 12)
    openings = ["the film", "the end was"]
    written = writer.write(sft.params, openings, 0)
    ids = zip(written.prompts, written.tokens, strict=True)
    assert max(len(prompt) + len(tokens) for prompt, tokens in ids) <= 12
    for opening, whole, text in zip(
        openings, written.whole, written.texts, strict=True
    ):
        # The last character that counts may be a part of one.
        assert (opening + text).startswith(whole.rstrip("\ufffd"))
    found = policies.measure(writer, sft.params, openings, Lengths(), 0)
    assert found["kl"] == found["reverse_per_token"] == 0
    assert found["reward"] == np.mean([len(text) for text in written.whole])
    changed = jax.tree.map(lambda array: 1.5 * array, sft.params)
    found = policies.measure(writer, changed, openings, Lengths(), 0)
    assert found["kl"] > 0
    assert found["kl_per_token"] * found["length"] == pytest.approx(found["kl"])
