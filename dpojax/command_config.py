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
    """Reference model, likewise; for losses and a KL that need one."""
    data: tuple[str, ...]
    """Preference data, as for train."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns and the data's, as in training."""
    split: str = "test"
    """Split evaluated on; cut off the data as train does if it has none."""
    test_size: float = 0.05
    """What is cut off: as in training, or the split is another one."""
    max_examples: int | None = None
    """Use this many examples, chosen at random as in training."""
    max_length: int = 1024
    """Most tokens of a prompt and one completion, with EOS."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Longer examples are cut or dropped, as in training."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used stops the command, or is left out and listed."""
    loss: LossConfig = field(default_factory=LossConfig)
    pairs_from: Literal["best_worst", "all", "rso"] = "best_worst"
    """How ranked or scored completions become pairs, as in training."""
    turns: Literal["all", "assistant"] = "all"
    """What of a chat's completion is scored, as in training."""
    batch_size: int = 16
    """Examples evaluated at one time."""
    kl_samples: int = 64
    """Prompts continued by the policy to estimate KL(policy || reference); 0: none."""
    sample_tokens: int = 64
    """Most tokens of such a completion."""
    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations. Default: bfloat16, on a CPU float32."""
    seed: int = 0
    """Decides the samples."""
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
    """Seeds of each combination, from `seed` on."""
    parallel: int | None = None
    """The most runs trained at one time. Default: as many as fit the memory."""
    search: Literal["all", "halving"] = "all"
    """Train all to the end; or keep the better half at rungs, until one program's."""


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
    """Split scored; of data without splits, everything."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns and the data's, as in training."""
    max_examples: int | None = None
    """Score this many records, chosen at random."""
    max_length: int = 1024
    """Most tokens of a prompt and one completion, with EOS; longer ones are cut."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used stops the command, or is left out and listed."""
    batch_size: int = 16
    """Prompts scored at one time, with their completions."""
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
    """End-of-sequence token, if the tokenizer does not name one."""
    chat_template: str | None = None
    """Jinja file of a chat template, if the tokenizer has none."""
    preset: Literal["tiny", "small", "base"] = "small"
    """Layers x width: tiny 2 x 64, small 4 x 128, base 8 x 512."""
    max_length: int = 2048
    """Positions that the model is meant for."""
    seed: int = 0
    """Decides the weights."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue prompts, or chat."""

    model: str
    """Model directory or hub name."""
    prompt: tuple[str, ...] = ()
    """One or more prompts."""
    prompts_file: str | None = None
    """Instead: JSON Lines with a prompt each, text or messages; or lines of text."""
    output: str | None = None
    """JSON Lines file to write, new: prompt and completions. Default: print them."""
    chat: bool = False
    """Instead: talk with the model, a line at a time, until Ctrl-D."""
    system: str | None = None
    """With --chat: the message that the conversation begins with."""
    num_samples: int = 1
    """Completions of each prompt."""
    max_new_tokens: int = 128
    """Most tokens of a completion."""
    temperature: float = 1.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int | None = None
    """Draw from this many of the most likely tokens."""
    top_p: float | None = None
    """Draw from the fewest most likely tokens whose probabilities add up to this."""
    min_p: float | None = None
    """Draw from tokens that have at least this share of the highest probability."""
    stop: tuple[str, ...] = ()
    """Strings; a completion ends before the earliest of them, or at EOS."""
    seed: int = 0
    """Decides the samples."""
    batch_size: int = 16
    """Prompts continued at one time, each with all its samples."""
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
    """Port at which 127.0.0.1 serves it."""


@dataclass(frozen=True, kw_only=True)
class CompletionConfig:
    """Print a script by which a shell completes what is typed."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Whose script; the README says where to put it."""


@dataclass(frozen=True, kw_only=True)
class ShapeConfig:
    """A model with random weights, of a known shape or a changed one."""

    name: Annotated[
        Literal["4x256", "8x512", "qwen2.5-0.5b", "llama-3.2-1b", "llama-3-8b"] | None,
        tyro.conf.arg(name=""),
    ] = None
    """Two small Llamas, layers x width, or models of the hub."""
    layers: int | None = None
    """Number of layers, instead of the shape's."""
    width: int | None = None
    """Of hidden states."""
    heads: int | None = None
    """Of queries; each is width / heads wide."""
    key_heads: int | None = None
    """Of keys and values. Default: where heads are given, as many."""
    mlp_width: int | None = None
    """Of the MLP's inside."""
    vocabulary: int | None = None
    """Rows of the embedding and of the output matrix."""


@dataclass(frozen=True, kw_only=True)
class BenchConfig(TrainConfig):
    """Time train steps as train takes them: its settings, its data, its loop."""

    shape: ShapeConfig = field(default_factory=ShapeConfig)
    token_file: str | None = None
    """Instead of data: JSON Lines of prompt_ids, chosen_ids and rejected_ids."""
    prompt_tokens: int = 64
    """Without data: tokens of each prompt; with a spread, their mean."""
    completion_tokens: int = 64
    """Without data: tokens of each completion, with EOS; likewise."""
    spread: float = 0.0
    """Without data: sigma of lognormal lengths, at most four times the mean."""
    steps: int | None = 20
    """Steps that are measured."""
    unmeasured_steps: int = 3
    """Steps before these."""
    batch_size: int = 8
    """Examples of an optimiser step, over all devices."""
    output: str | None = None
    """JSON file to write, new."""
    trace: str | None = None
    """Directory for a profile of the measured steps, for TensorBoard or Perfetto."""


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """What a run would need and take on machines that are not there.

    Takes the flags of train, or its experiment file; of a model only config.json is
    read, and nothing is downloaded, allocated or run. For TPUs the very step is
    compiled; figures of GPUs are estimates, and say so. Flags that change nothing of a
    step (where things are written, how often) may be given too.
    """

    topology: str | None = None
    """Chip and shape of the slice: v5e:4x8, v5p:4x4x4, v6e:16x16, h100:8."""
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    prompt_tokens: int | None = None
    """Instead of reading data: tokens of each prompt; with a spread, their mean."""
    completion_tokens: int | None = None
    """Tokens of each completion, with EOS; likewise."""
    spread: float = 0.0
    """Sigma of lognormal lengths, at most four times the mean."""
    num_examples: int | None = None
    """Size of the data set, where it is not read; without it no hours are told."""
    efficiency: tuple[float, ...] = (1.0, 0.6, 0.4)
    """Shares of the roofline's speed for which times are told."""
    search: bool = False
    """Try meshes, what is recomputed, and microbatches; recommend the fastest."""
    json: bool = False
    """Print one JSON object instead of tables."""

    @property
    def reads_data(self) -> bool:
        """Whether rows come from the data, not from stated lengths."""
        stated = self.prompt_tokens is not None or self.completion_tokens is not None
        return bool(self.data) and not stated
