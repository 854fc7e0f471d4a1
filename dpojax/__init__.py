"""dpojax: preference optimisation of causal language models in JAX.

Two ideas carry the package. A loss is a function of numbers: `dpojax.losses`
knows log-probabilities and nothing of models. And an example is one prompt and its
completions: `dpojax.batch` lays them out so that the prompt is computed once.
"""

__version__ = "0.1.0"
