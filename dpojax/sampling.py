"""The generate command: prompts continued, printed or written as JSON Lines.

This file knows no cache and no logits.
"""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from dpojax.command_config import GenerateConfig
from dpojax.completions import cut_at, decode_completion, make_settle
from dpojax.connecting import connect
from dpojax.data.fields import Text
from dpojax.data.prompt_files import read_prompts
from dpojax.data.tokenize import encode_prompt
from dpojax.evaluation import Sampler, make_sampler
from dpojax.generate import check_counts
from dpojax.loading import Loaded, check_positions, load_model
from dpojax.placing import Keeping
from dpojax.progress import say
from dpojax.sharding import make_mesh, make_placement
from dpojax.truncation import Truncation, make_choose
from dpojax.whole_files import new_file, write_json_lines


class Continued(NamedTuple):
    """A prompt, as it was given, and its completions as text."""

    prompt: Text
    completions: tuple[str, ...]


def generate(config: GenerateConfig) -> list[Continued]:
    """Continues each prompt; writes what comes, or prints it.

    Returns:
      Every prompt with its completions, in the order given.

    Raises:
      ValueError: for settings that cannot work or take effect, before anything is
        loaded; for prompts that cannot be read or exceed the model's positions.
    """
    _check(config)
    connect(config.distributed)
    output = None if config.output is None else new_file(config.output)
    prompts = _prompts(config)
    mesh = make_mesh(**vars(config.mesh))
    loaded = load_model(config.model, Keeping(mesh, config.compute_dtype))
    ids = [encode_prompt(prompt, loaded.tokenizer) for prompt in prompts]
    remedy = "lower --max-new-tokens, or give shorter prompts"
    check_positions(loaded, max(map(len, ids)) + config.max_new_tokens, remedy)
    settle = make_settle(loaded.tokenizer, config.stop) if config.stop else None
    sampler = make_sampler(
        loaded,
        num_new=config.max_new_tokens,
        batch_size=min(config.batch_size, len(ids)),
        placement=make_placement(mesh),
        temperature=config.temperature,
        truncation=as_truncation(config),
        num_samples=config.num_samples,
        settle=settle,
    )
    texts = iter(_complete(loaded, sampler, ids, config))
    continued = [
        Continued(prompt, tuple(islice(texts, config.num_samples)))
        for prompt in prompts
    ]
    if output is None:
        _print(continued)
    else:
        _write(output, continued)
    return continued


def check_sampling(config: GenerateConfig) -> None:
    """Refuses numbers and stop strings that cannot work or take effect.

    Raises:
      ValueError: naming the first of them.
    """
    for name in ("max_new_tokens", "num_samples", "batch_size"):
        if vars(config)[name] < 1:
            raise ValueError(f"{name} is {vars(config)[name]}; it must be positive.")
    if config.seed < 0:
        raise ValueError(f"seed is {config.seed}; it must not be negative.")
    if "" in config.stop:
        raise ValueError("A stop string is empty; it would end every completion.")
    check_counts(config.max_new_tokens, config.num_samples, config.temperature)
    make_choose(config.temperature, as_truncation(config))  # refuses what it cannot do


def as_truncation(config: GenerateConfig) -> Truncation:
    """Which unlikely tokens the settings leave out."""
    return Truncation(top_k=config.top_k, top_p=config.top_p, min_p=config.min_p)


def _complete(
    loaded: Loaded,
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    config: GenerateConfig,
) -> Iterator[str]:
    repeated = (prompt for prompt in prompts for _ in range(config.num_samples))
    rows = sampler(loaded.params, prompts, config.seed)
    for prompt, row in zip(repeated, rows, strict=True):
        yield cut_at(decode_completion(loaded.tokenizer, prompt, row), config.stop)


def _check(config: GenerateConfig) -> None:
    if bool(config.prompt) == (config.prompts_file is not None):
        raise ValueError(
            "Give the prompts to continue either by --prompt or by --prompts-file; or "
            "talk with the model by --chat."
        )
    if config.system is not None:
        raise ValueError(
            "--system has no effect without --chat; in a --prompts-file, put the "
            "system message first of a prompt's messages."
        )
    check_sampling(config)


def _prompts(config: GenerateConfig) -> list[Text]:
    if config.prompts_file is None:
        return list(config.prompt)
    return read_prompts(config.prompts_file)


def _print(continued: Sequence[Continued]) -> None:
    """Strings with what follows them; chats as their last message and the answers."""
    for prompt, completions in continued:
        if not isinstance(prompt, str):
            say(f"{prompt[-1]['role']}: {prompt[-1].get('content')}")
        for text in completions:
            say(prompt + text if isinstance(prompt, str) else text)


def _write(output: Path, continued: Sequence[Continued]) -> None:
    rows: Iterator[dict[str, Any]] = (one._asdict() for one in continued)
    write_json_lines(output, rows)
    count = sum(len(one.completions) for one in continued)
    say(f"{output}: {count:,} completions of {len(continued):,} prompts")
