"""A conversation on the terminal: the generate command with --chat.

Each answer continues the whole conversation, as the tokenizer's chat template writes
it, and is printed while it is sampled. This file knows no cache and no logits.
"""

from collections.abc import Callable, Sequence

from dpojax.config import GenerateConfig
from dpojax.data.fields import Messages
from dpojax.data.tokenize import encode_prompt
from dpojax.evaluation import make_sampler
from dpojax.loading import Loaded, check_positions, load_model
from dpojax.progress import say, show_part
from dpojax.sampling import (
    UNFINISHED,
    as_truncation,
    check_sampling,
    cut_at,
    decode_completion,
)
from dpojax.sharding import make_mesh, make_placement

# What describes prompts and their completions as lists.
NO_EFFECT = ("prompt", "prompts_file", "output", "num_samples", "batch_size")


def chat(config: GenerateConfig) -> Messages:
    """Reads a line, answers it, and so on until the input ends or is interrupted.

    Returns:
      What both sides said.

    Raises:
      ValueError: for settings that cannot work or take effect, before anything is
        loaded; for a model without a chat template; once the conversation and an
        answer of `max_new_tokens` exceed the model's positions.
    """
    _check(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    loaded = load_model(config.model, mesh, compute_dtype=config.compute_dtype)
    if loaded.tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {config.model} has no chat template, so there is no "
            "telling how a conversation is written; use --prompt instead of --chat."
        )
    sampler = make_sampler(
        loaded,
        num_new=config.max_new_tokens,
        batch_size=1,
        placement=make_placement(mesh),
        temperature=config.temperature,
        truncation=as_truncation(config),
    )
    messages: Messages = []
    try:
        while True:
            said = input("> ")
            if said.strip():
                messages.append({"role": "user", "content": said})
                text = _answer(loaded, sampler, messages, config)
                messages.append({"role": "assistant", "content": text})
    except (EOFError, KeyboardInterrupt):
        say("")
    return messages


def certain_part(text: str, stops: Sequence[str]) -> str:
    """What of a growing text stays as it is, whatever follows.

    Its end may be an unfinished character or the beginning of a stop string.
    """
    text = cut_at(text, stops).rstrip(UNFINISHED)
    begun = [
        length
        for stop in stops
        for length in range(1, len(stop))
        if text.endswith(stop[:length])
    ]
    return text[: len(text) - max(begun, default=0)]


def _answer(
    loaded: Loaded,
    sampler: Callable[..., list[list[int]]],
    messages: Messages,
    config: GenerateConfig,
) -> str:
    """Samples and prints the next message; each turn has a seed of its own."""
    tokenizer, stops = loaded.tokenizer, config.stop
    ids = encode_prompt(messages, tokenizer)
    advice = "allow fewer --max-new-tokens, or begin a new conversation"
    check_positions(loaded, len(ids) + config.max_new_tokens, advice)
    shown: list[str] = []

    def show(text: str) -> None:
        part = text[len("".join(shown)) :]
        shown.append(part)
        show_part(part)

    def is_done(prompt: Sequence[int], completion: Sequence[int]) -> bool:
        text = decode_completion(tokenizer, prompt, completion).rstrip(UNFINISHED)
        show(certain_part(text, stops))
        return cut_at(text, stops) != text

    seed = config.seed + len(messages) // 2
    (completion,) = sampler(loaded.params, [ids], seed, is_done)
    text = cut_at(decode_completion(tokenizer, ids, completion), stops)
    show(text)
    say("")
    return text


def _check(config: GenerateConfig) -> None:
    default = GenerateConfig(model=config.model)
    for name in NO_EFFECT:
        if vars(config)[name] != vars(default)[name]:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} has no effect on a --chat; leave one out.")
    check_sampling(config)
