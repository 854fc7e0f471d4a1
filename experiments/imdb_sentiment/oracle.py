"""The ground-truth reward: a classifier's log-odds that a text praises its film.

Logistic regression over the tf-idf of words and pairs of words, fitted to the labels
of IMDb's training split: whole reviews and short pieces of them, since it is to score
short texts. It knows no language model. Needs scikit-learn, which dpojax does not.
"""

import io
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
    """Scores texts: a linear function of tf-idf."""

    def __init__(
        self,
        terms: Sequence[str],
        idf: Float[np.ndarray, " terms"],
        weights: Float[np.ndarray, " terms"],
        bias: float,
    ):
        """See `fit_oracle`.

        Args:
          terms: words and pairs of words.
          idf: how rare each is.
          weights: of each one's tf-idf.
          bias: the log-odds of a text without any.
        """
        self._terms, self._idf = terms, idf
        self._vectors = _vectorizer(vocabulary=list(terms))
        self._vectors.idf_ = idf
        self._weights, self._bias = weights, bias

    def log_odds(self, texts: Sequence[str]) -> Float[np.ndarray, " texts"]:
        """The log-odds of each: log p(positive) - log p(negative)."""
        return self._vectors.transform(texts) @ self._weights + self._bias

    def accuracy(self, reviews: Sequence[Review]) -> float:
        """The share of labels that the sign of the log-odds finds."""
        found = self.log_odds([review.text for review in reviews]) > 0
        return float(np.mean(found == [review.label == 1 for review in reviews]))

    def save(self, path: Path) -> None:
        """Writes it for `load_oracle`."""
        file = io.BytesIO()
        np.savez(
            file,
            terms=np.asarray("\n".join(self._terms)),  # which hold no line's end
            idf=self._idf,
            weights=self._weights,
            bias=np.asarray(self._bias),
        )
        write_bytes(path, file.getvalue())


def load_oracle(path: Path) -> Oracle:
    """Reads what `Oracle.save` wrote."""
    with np.load(path, allow_pickle=False) as saved:
        terms = saved["terms"].item().split("\n")
        return Oracle(terms, saved["idf"], saved["weights"], float(saved["bias"]))


def fit_oracle(reviews: Sequence[Review]) -> Oracle:
    """Fits the classifier to labelled reviews."""
    seen = [*reviews, *cut(reviews, seed=0)]
    vectors = _vectorizer(min_df=5)
    found = vectors.fit_transform([review.text for review in seen])
    linear = import_module("sklearn.linear_model")
    classifier = linear.LogisticRegression(C=10.0, max_iter=200, solver="liblinear")
    classifier.fit(found, [review.label for review in seen])
    terms, weights = vectors.get_feature_names_out(), classifier.coef_[0]
    return Oracle(list(terms), vectors.idf_, weights, float(classifier.intercept_[0]))


def _vectorizer(**settings: Any) -> Any:
    text = import_module("sklearn.feature_extraction.text")
    return text.TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, **settings)


def cut(reviews: Sequence[Review], seed: int) -> list[Review]:
    """A short piece of each review, with the review's label."""
    chooser = random.Random(seed)
    short = []
    for review in reviews:
        words = review.text.split(" ")
        start = chooser.randrange(max(1, len(words) - PIECE))
        short.append(Review(" ".join(words[start : start + PIECE]), review.label))
    return short
