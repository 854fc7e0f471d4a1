"""The commands init, eval and losses. Each reads its settings."""

from functools import partial
from pathlib import Path
from typing import TypedDict

import jax

from dpojax.command_config import EvalConfig, InitConfig, LossesConfig
from dpojax.connecting import connect
from dpojax.data.packing import with_mismatched
from dpojax.data.tokenize import Tokenizer, load_tokenizer
from dpojax.data.tokenizer_files import write_tokenizer
from dpojax.evaluation import evaluate, make_sampler, sampled_kl
from dpojax.examples import load_examples
from dpojax.loading import (
    as_reward_examples,
    check_positions,
    load_model,
    load_reference,
    load_reward_model,
    new_directory,
)
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.families import as_settings
from dpojax.models.huggingface import write_model
from dpojax.objective_table import as_lines, as_markdown
from dpojax.placing import Keeping
from dpojax.prepare import make_configured_loss
from dpojax.progress import say, show_table
from dpojax.reference_setting import named_reference
from dpojax.sharding import Placement, make_mesh, make_placement
from dpojax.spread import Spread
from dpojax.train_step import make_eval_step

# Layers, width, heads, MLP width.
_PRESETS = {
    "tiny": (2, 64, 2, 256),
    "small": (4, 128, 4, 512),
    "base": (8, 512, 8, 2048),
}


class _Batching(TypedDict):
    batch_size: int
    placement: Placement


def init(config: InitConfig) -> Path:
    """Writes a Llama with random weights and the given tokenizer.

    The vocabulary is rounded up to a multiple of 128, which meshes divide; the rows
    that no token uses are never scored as labels.
    """
    directory = new_directory(config.output)
    tokenizer = load_tokenizer(config.tokenizer, config.eos_token)
    if config.chat_template is not None:
        tokenizer.chat_template = _read_template(Path(config.chat_template), tokenizer)
    layers, width, heads, mlp_width = _PRESETS[config.preset]
    shape = DecoderConfig(
        vocabulary_size=-(-(max(tokenizer.get_vocab().values()) + 1) // 128) * 128,
        width=width,
        num_layers=layers,
        num_heads=heads,
        num_key_heads=heads,
        head_dimension=width // heads,
        mlp_width=mlp_width,
        tied_output=True,
        max_length=config.max_length,
    )
    params = jax.jit(make_model(shape).init)(jax.random.key(config.seed))
    tokens = {
        name: value
        for name, value in (
            ("bos_token_id", tokenizer.bos_token_id),
            ("eos_token_id", tokenizer.eos_token_id),
            ("pad_token_id", tokenizer.pad_token_id),
        )
        if value is not None
    }
    settings = as_settings(shape) | tokens
    write_model(directory, params, settings, partial(write_tokenizer, tokenizer))
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    say(f"{directory}: {count:,} parameters, vocabulary {shape.vocabulary_size:,}")
    return directory


def evaluate_policy(config: EvalConfig) -> dict[str, float]:
    """Loss, accuracy, margins and KL of a policy, each with its standard error."""
    connect(config.distributed)
    loss = make_configured_loss(config.loss)
    mesh = make_mesh(**vars(config.mesh))
    if config.batch_size < 1 or config.kl_samples < 0:
        raise ValueError(
            f"batch_size is {config.batch_size} and kl_samples {config.kl_samples}; "
            "the first must be positive and the second not negative."
        )
    if config.reference is None and "reference" in loss.needs:
        raise ValueError(f"The loss {loss.name!r} needs a --reference.")
    if named_reference(config.reference).is_precomputed:
        raise ValueError(
            f"--reference {config.reference} is for training, which sees its examples "
            "more than once; give the directory of the reference."
        )
    load = load_reward_model if "reward_head" in loss.needs else load_model
    loaded = load(config.model, Keeping(mesh, config.compute_dtype))
    reference = None
    if config.reference is not None:
        reference = load_reference(config.reference, loaded, mesh)
    check_positions(loaded, config.max_length)
    examples = load_examples(
        config.data,
        loss,
        loaded.tokenizer,
        split=config.split,
        columns=config.columns,
        test_size=config.test_size,
        max_examples=config.max_examples,
        pairs_from=config.pairs_from,
        max_length=config.max_length,
        too_long=config.too_long,
        turns=config.turns,
        on_bad_record=config.on_bad_record,
    )
    if "reward_head" in loss.needs:
        examples = as_reward_examples(examples, loaded)
    if "mismatched" in loss.needs:
        examples = with_mismatched(examples, config.max_length)
    how: _Batching = {
        "batch_size": config.batch_size,
        "placement": make_placement(mesh),
    }
    step = make_eval_step(loaded.model.apply, loss, spread=Spread(mesh))
    values = evaluate(step, loaded.params, reference, examples, **how).values
    if config.kl_samples and reference is not None:
        prompts = [example.prompt.tolist() for example in examples[: config.kl_samples]]
        sampler = make_sampler(loaded, num_new=config.sample_tokens, **how)
        completions = sampler(loaded.params, prompts, config.seed)
        values |= sampled_kl(
            loaded, loaded.params, reference, prompts, completions, **how
        )
    title = (
        f"{loss.name} of {config.model} on {len(examples):,} examples of "
        f"{', '.join(config.data)}"
    )
    rows = [
        (name, f"{value:.4f}", f"{values[name + '_se']:.4f}")
        if name + "_se" in values
        else (name, f"{value:.4f}", "")
        for name, value in values.items()
        if not name.endswith("_se")
    ]
    show_table(title, ("", "mean", "standard error"), rows)
    return values


def losses(config: LossesConfig) -> None:
    """Prints the table of objectives."""
    say(as_markdown() if config.markdown else as_lines())


def _read_template(path: Path, tokenizer: Tokenizer) -> str:
    if tokenizer.chat_template is not None:
        raise ValueError(
            "The tokenizer has a chat template of its own; leave --chat-template out."
        )
    if not path.is_file():
        raise ValueError(f"There is no chat template file {path}.")
    return path.read_text("utf-8")
