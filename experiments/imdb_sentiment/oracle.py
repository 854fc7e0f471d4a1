"""The ground-truth reward: a classifier's log-odds that a text praises its film.

Logistic regression over the tf-idf of words and pairs of words, fitted to the labels
of IMDb's training split: whole reviews and short pieces of them, since it is to score
short texts. It knows no language model. Needs scikit-learn, which dpojax does not.
"""

import pickle
import random
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from reviews import Review

from dpojax.whole_files import write_bytes

PIECE = 30  # words


class Oracle:
    """Scores texts."""

    def __init__(self, pipeline: Any):
        self._pipeline = pipeline

    def log_odds(self, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """The log-odds of each: log p(positive) - log p(negative)."""
        return np.asarray(self._pipeline.decision_function(list(texts)), np.float64)

    def accuracy(self, reviews: Sequence[Review]) -> float:
        """The share of labels that the sign of the log-odds finds."""
        found = self.log_odds([review.text for review in reviews]) > 0
        return float(np.mean(found == [review.label == 1 for review in reviews]))

    def save(self, path: Path) -> None:
        """Writes it for `load_oracle`."""
        write_bytes(path, pickle.dumps(self._pipeline))


def load_oracle(path: Path) -> Oracle:
    """Reads what `Oracle.save` wrote; only files of one's own, since it is a pickle."""
    return Oracle(pickle.loads(path.read_bytes()))


def fit_oracle(reviews: Sequence[Review]) -> Oracle:
    """Fits the classifier to labelled reviews."""
    text = import_module("sklearn.feature_extraction.text")
    linear = import_module("sklearn.linear_model")
    pipeline = import_module("sklearn.pipeline").make_pipeline(
        text.TfidfVectorizer(ngram_range=(1, 2), min_df=5, sublinear_tf=True),
        linear.LogisticRegression(C=10.0, max_iter=200, solver="liblinear"),
    )
    seen = [*reviews, *cut(reviews, seed=0)]
    pipeline.fit([review.text for review in seen], [review.label for review in seen])
    return Oracle(pipeline)


def cut(reviews: Sequence[Review], seed: int) -> list[Review]:
    """A short piece of each review, with the review's label."""
    chooser = random.Random(seed)
    short = []
    for review in reviews:
        words = review.text.split(" ")
        start = chooser.randrange(max(1, len(words) - PIECE))
        short.append(Review(" ".join(words[start : start + PIECE]), review.label))
    return short
