"""Settings of the commands beside train: frozen dataclasses, as in `dpojax.config`.

The flags of the command line are made from these; only the commands read them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from dpojax.config import DistributedConfig, LossConfig, MeshConfig, TrainConfig


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluate a policy on held-out preferences."""

    model: str
    """Policy: a model directory or a hub name."""
    reference: str | None = None
    """Reference model, likewise; for losses and a KL that need one. Default: none."""
    data: tuple[str, ...]
    """Preference data, as for train."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns and the data's, as in training."""
    split: str = "test"
    """Split evaluated on (as train); cut off the data as train does if it has none."""
    test_size: float = 0.05
    """Share or number of examples cut off (as train), or the split is another one."""
    max_examples: int | None = None
    """Examples that are used, chosen at random as in training. Default: all."""
    max_length: int = 1024
    """Most tokens of a prompt and one completion, with EOS (as train)."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Longer examples are cut or dropped (as train)."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used stops the command (as train), or is left out and
    listed."""
    loss: LossConfig = field(default_factory=LossConfig)
    pairs_from: Literal["best_worst", "all", "rso"] = "best_worst"
    """How ranked or scored completions become pairs (as train)."""
    turns: Literal["all", "assistant"] = "all"
    """What of a chat's completion is scored (as train)."""
    batch_size: int = 16
    """Examples evaluated at one time (paper's code: 16)."""
    kl_samples: int = 64
    """Prompts continued by the policy to estimate KL(policy || reference) (ours: the
    error is an eighth of the spread); 0: none."""
    sample_tokens: int = 64
    """Most tokens of such a completion (as train)."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations. Default: bfloat16, on a CPU float32."""
    seed: int = 0
    """Number that decides the samples (ours: any will do)."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig(TrainConfig):
    """Compute the reference's log-probabilities ahead of runs, with the flags of train.

    A run with the same flags and --reference precomputed finds all of them. Flags that
    do not change them (the optimiser, the length of the run, beta) may be given too.
    """


@dataclass(frozen=True, kw_only=True)
class SweepConfig(TrainConfig):
    """Train many runs at once: a grid of settings, and the flags of train for the rest.

    Runs that differ in their loss, its settings, the learning rate or the seed share a
    compiled program; others get their own. OUTPUT/0, OUTPUT/1, … are run directories.
    """

    over: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A setting and its values: loss.beta=0.1,0.5; given again, all combinations."""
    seeds: int = 1
    """Seeds of each combination, from `seed` on; 1: one run each."""
    parallel: int | None = None
    """The most runs trained at one time. Default: as many as fit the memory."""
    search: Literal["all", "halving"] = "all"
    """all: to the end; halving: the better half at rungs, until they fill a program."""


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    """Print the table of objectives."""

    markdown: bool = False
    """Print it as Markdown."""


@dataclass(frozen=True, kw_only=True)
class ScoreConfig:
    """Score completions with a reward model."""

    model: str
    """Reward model: a model directory or a hub name."""
    data: str
    """Prompts with completions, as for train."""
    output: str
    """JSON Lines file to write, new: prompt, completions and their scores, in order."""
    split: str = "train"
    """Split scored (TRL: train); of data without splits, everything."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns and the data's, as in training."""
    max_examples: int | None = None
    """Records that are scored, chosen at random. Default: all."""
    max_length: int = 1024
    """Most tokens of a prompt and one completion, with EOS (as train); longer ones are
    cut."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used stops the command (as train), or is left out and
    listed."""
    batch_size: int = 16
    """Prompts scored at one time, with their completions (as eval)."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations. Default: bfloat16, on a CPU float32."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True, kw_only=True)
class InitConfig:
    """Write a new, randomly initialised model directory."""

    output: str
    """Directory to write; new."""
    tokenizer: str
    """Tokenizer: directory, hub name, tokenizer.json, or GPT-2 vocabulary file."""
    eos_token: str | None = None
    """End-of-sequence token, if the tokenizer names none. Default: its own."""
    chat_template: str | None = None
    """Jinja file of a chat template, if the tokenizer has none. Default: its own."""
    preset: Literal["tiny", "small", "base"] = "small"
    """Layers x width: tiny 2 x 64, small 4 x 128, base 8 x 512 (ours: small trains in
    minutes on a CPU)."""
    max_length: int = 2048
    """Positions that the model is meant for (ours: twice what train takes)."""
    seed: int = 0
    """Number that decides the weights (ours: any will do)."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue prompts, or chat."""

    model: str
    """Model directory or hub name."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts_file: str | None = None
    """Instead: JSON Lines with a prompt each, text or messages; or lines of text.
    Default: none."""
    output: str | None = None
    """JSON Lines file to write, new: prompt and completions. Default: print them."""
    chat: bool = False
    """Instead: talk with the model, a line at a time, until Ctrl-D."""
    system: str | None = None
    """With --chat: the message that the conversation begins with. Default: none."""
    num_samples: int = 1
    """Completions of each prompt; 1: one."""
    max_new_tokens: int = 128
    """Most tokens of a completion (ours: a long paragraph)."""
    temperature: float = 1.0
    """Temperature that divides the logits; 1: as the model says; 0: the most likely."""
    top_k: int | None = None
    """Tokens, the most likely ones, that are drawn from. Default: all."""
    top_p: float | None = None
    """Probability that the fewest most likely tokens, which are drawn from, add up to.
    Default: 1."""
    min_p: float | None = None
    """Share of the highest probability that a token must have. Default: 0."""
    stop: tuple[str, ...] = ()
    """Strings; a completion ends before the earliest of them, or at EOS."""
    seed: int = 0
    """Number that decides the samples (ours: any will do)."""
    batch_size: int = 16
    """Prompts continued at one time, each with all its samples (as eval)."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations. Default: bfloat16, on a CPU float32."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Write a checkpoint of a run as a Hugging Face model directory."""

    run: Annotated[str, tyro.conf.Positional]
    """Run directory; with --merge also a directory of adapters."""
    output: str
    """Directory to write; new: a model or, of a run that trained adapters, these."""
    merge: bool = False
    """Fold adapters into the weights of their base, and write a model."""
    step: int | None = None
    """Step of the checkpoint. Default: the last."""
    distributed: DistributedConfig = field(default_factory=DistributedConfig)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Write runs as one HTML page with plots, which needs no network."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="run")]
    """Run directories or those of sweeps, finished or not, laid side by side."""
    output: str | None = None
    """File to write, in place of an older one. Default: report.html in the first."""


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """Serve the page of report live, to this machine alone, until Ctrl-C."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(name="run")]
    """Run directories, finished or not."""
    port: int = 8000
    """Port at which 127.0.0.1 serves it (ours: as Python's http.server)."""


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a script by which a shell completes what is typed."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Whose script; the README says where to put it."""


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """A model with random weights, of a known shape or a changed one; None keeps it."""

    name: Annotated[
        Literal["4x256", "8x512", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3-8b"] | None,
        tyro.conf.arg(name=""),
    ] = None
    """Two small Llamas, layers x width, or models of the hub. Default: see --model."""
    layers: int | None = None
    """Layers, instead of the shape's."""
    width: int | None = None
    """Width of hidden states."""
    heads: int | None = None
    """Heads of queries; each is width / heads wide."""
    key_heads: int | None = None
    """Heads of keys and values. Default: where heads are given, as many."""
    mlp_width: int | None = None
    """Width of the MLP's inside."""
    vocabulary: int | None = None
    """Rows of the embedding and of the output matrix."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(TrainConfig):
    """Time train steps as train takes them: its settings, its data, its loop."""

    shape: ShapeConfig = field(default_factory=ShapeConfig)
    token_file: str | None = None
    """Instead of data: JSON Lines of prompt_ids, chosen_ids and rejected_ids. Default:
    none."""
    prompt_tokens: int = 64
    """Tokens of each prompt, without data (ours: as in the README's table); with a
    spread, their mean."""
    completion_tokens: int = 64
    """Tokens of each completion, with EOS, without data (ours: likewise); with a
    spread, their mean."""
    spread: float = 0.0
    """Sigma of lognormal lengths, without data, at most four times the mean; 0: all
    are equal."""
    steps: int | None = 20
    """Steps that are measured (ours: seconds on a CPU)."""
    unmeasured_steps: int = 3
    """Steps before these (ours: those that compile, and one more)."""
    batch_size: int = 8
    """Examples of an optimiser step, over all devices (ours: as the README's table)."""
    output: str | None = None
    """JSON file to write, new. Default: none."""
    trace: str | None = None
    """Directory for a profile of the measured steps, for TensorBoard or Perfetto.
    Default: none."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """What a run would need and take on machines that are not there.

    Takes the flags of train, or its experiment file; of a model only config.json is
    read, and nothing is downloaded, allocated or run. For TPUs the very step is
    compiled; figures of GPUs are estimates, and say so. Flags that change nothing of a
    step (where things are written, how often) may be given too.
    """

    topology: str | None = None
    """Chip and shape of the slice: v5e:4x8, v5p:4x4x4, v6e:16x16, h100:8. Default:
    none; it must be given."""
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    prompt_tokens: int | None = None
    """Tokens of each prompt, instead of reading data; with a spread, their mean.
    Default: those of the data."""
    completion_tokens: int | None = None
    """Tokens of each completion, with EOS; likewise. Default: those of the data."""
    spread: float = 0.0
    """Sigma of lognormal lengths, at most four times the mean; 0: all are equal."""
    num_examples: int | None = None
    """Examples of the data set, where it is not read. Default: none, so that no hours
    are told."""
    efficiency: tuple[float, ...] = (1.0, 0.6, 0.4)
    """Shares of the roofline's speed for which times are told (ours: the bound, and two
    that are reached)."""
    search: bool = False
    """Try meshes, what is recomputed, and microbatches; recommend the fastest."""
    json: bool = False
    """Print one JSON object instead of tables."""

    @property
    def reads_data(self) -> bool:
        """Whether rows come from the data, not from stated lengths."""
        stated = self.prompt_tokens is not None or self.completion_tokens is not None
        return bool(self.data) and not stated
