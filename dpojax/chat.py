"""A conversation with a model on the terminal. Knows no cache and no logits.

The conversation is kept as messages, which the chat template renders anew for every
answer. What is sure of an answer is printed while the rest is still generated.
"""

import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any

import jax
import numpy as np

from dpojax.command_config import GenerateConfig
from dpojax.completions import cut_at, decode_completion, make_settle
from dpojax.data.chats import render_messages
from dpojax.data.fields import Messages, Record
from dpojax.data.packing import bucket_length
from dpojax.data.template_limits import limits
from dpojax.data.tokenize import Tokenizer, encode_prompt
from dpojax.generate import make_generate, pad_left
from dpojax.loading import Loaded, check_positions, load_model
from dpojax.placing import Keeping
from dpojax.progress import say, say_part
from dpojax.sampling import as_truncation, check_sampling
from dpojax.sharding import Placement, make_mesh, make_placement

Answer = Callable[[Sequence[int], int], str]  # (prompt, number of the answer) -> text


def chat(config: GenerateConfig) -> Messages:
    """Answers what is typed, a line at a time, until the input ends.

    Where a conversation exceeds the model's positions, its oldest messages are left
    out; a message that exceeds them alone is not taken.

    Returns:
      The conversation, without what was left out.

    Raises:
      ValueError: for settings that cannot work or take effect, or a model without a
        chat template, before anything is read.
    """
    _check(config)
    mesh = make_mesh(**vars(config.mesh))
    loaded = load_model(config.model, Keeping(mesh, config.compute_dtype))
    system = [] if config.system is None else [_message("system", config.system)]
    _check_model(config, loaded, system)
    answer = _make_answer(config, loaded, make_placement(mesh))
    turns: Messages = []
    number = 0
    try:
        while (line := _ask()) is not None:
            asked = [*turns, _message("user", line)]
            kept = _keep_newest(asked, system, loaded, config.max_new_tokens)
            if kept:
                prompt = encode_prompt([*system, *kept], loaded.tokenizer)
                said = answer(prompt, number)
                turns, number = [*kept, _message("assistant", said)], number + 1
    except KeyboardInterrupt:
        say("")
    return [*system, *turns]


def _check(config: GenerateConfig) -> None:
    plain = GenerateConfig(model=config.model)
    for name in ("prompt", "prompts_file", "output", "num_samples", "batch_size",
                 "distributed"):  # fmt: skip
        if vars(config)[name] != vars(plain)[name]:
            flag = name.replace("_", "-")
            raise ValueError(
                f"--{flag} has no effect with --chat, which answers what is typed; "
                "leave one of the two out."
            )
    check_sampling(config)


def _check_model(config: GenerateConfig, loaded: Loaded, system: Messages) -> None:
    """Refuses a model that could not answer the shortest question."""
    if loaded.tokenizer.chat_template is None:
        raise ValueError(
            f"The tokenizer of {config.model} has no chat template; give a model that "
            "has one, or continue texts by --prompt."
        )
    shortest = encode_prompt([*system, _message("user", "?")], loaded.tokenizer)
    length = len(shortest) + config.max_new_tokens
    check_positions(loaded, length, "lower --max-new-tokens")


def _ask() -> str | None:
    """The next line that is not blank; None at the end of the input."""
    is_terminal = sys.stdin.isatty()
    try:
        while not (line := input("> " if is_terminal else "")).strip():
            pass
    except EOFError:
        if is_terminal:
            say("")
        return None
    return line


def _keep_newest(
    asked: Messages, system: Messages, loaded: Loaded, num_new: int
) -> Messages:
    """The newest messages that leave room for an answer; says what is left out."""
    positions = loaded.model.config.max_length
    kept = asked
    while kept and (
        len(encode_prompt([*system, *kept], loaded.tokenizer)) + num_new > positions
    ):
        kept = kept[2:]  # a question and its answer
    limit = f"the {positions} positions of the model (max_position_embeddings)"
    if not kept:
        say(
            f"The message and an answer of {num_new} tokens exceed {limit}; it is not "
            "taken. Shorten it, or start with a lower --max-new-tokens."
        )
    elif len(kept) < len(asked):
        count = len(asked) - len(kept)
        say(f"The conversation exceeds {limit}; its {count} oldest messages are gone.")
    return kept


def _make_answer(
    config: GenerateConfig, loaded: Loaded, placement: Placement
) -> Answer:
    """Builds a function that prints an answer and returns it."""
    tokenizer = loaded.tokenizer
    generate = make_generate(
        loaded.model.extend,
        loaded.model.empty_cache,
        eos_token=loaded.eos_token,
        num_new=config.max_new_tokens,
        temperature=config.temperature,
        truncation=as_truncation(config),
    )
    settle = make_settle(tokenizer, config.stop)
    ends = {loaded.eos_token, _turn_end(tokenizer, loaded.eos_token)}

    def before_end(row: np.ndarray) -> list[int]:
        return list(takewhile(lambda token: token not in ends, row.tolist()))

    def answer(prompt: Sequence[int], number: int) -> str:
        printed = ""

        def watch(tokens: np.ndarray) -> np.ndarray:
            nonlocal printed
            said = before_end(tokens[0])
            text, is_whole = settle(prompt, said)
            say_part(text[len(printed) :])
            printed = max(printed, text, key=len)
            # The other rows only fill the devices.
            return np.full(len(tokens), is_whole or len(said) < tokens.shape[1])

        length = bucket_length(len(prompt))
        rows = placement.put(pad_left([prompt], length, placement.num_shards))
        key = jax.random.fold_in(jax.random.key(config.seed), number)
        tokens = jax.device_get(generate(loaded.params, *rows, key, watch))
        said = before_end(tokens[0])
        text = cut_at(decode_completion(tokenizer, prompt, said), config.stop)
        say_part(text[len(printed) :] + "\n")
        return text

    return answer


def _turn_end(tokenizer: Tokenizer, eos_token: int) -> int:
    """The special token by which the template ends an answer; EOS if there is none.

    Some models end their turns otherwise than their texts.
    """
    asked = Record([_message("user", "?")], (), "A conversation")
    with limits():
        text = render_messages(asked, tokenizer, [_message("assistant", "Yes")])
    tail = tokenizer(text.rpartition("Yes")[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    is_special = bool(tail) and tail[0] in added and added[tail[0]].special
    return tail[0] if is_special else eos_token


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
