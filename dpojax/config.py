"""Settings of training: frozen dataclasses, each field with its meaning and unit.

The flags of the command line are made from these. Only `run` and its neighbours read
them: functions elsewhere take plain arguments.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """How the weights move."""

    name: Literal["adamw", "rmsprop", "adafactor"] = "adamw"
    """AdamW (TRL, Zephyr), the DPO paper's RMSprop, or Adafactor, the leanest."""
    moments: Literal["float32", "bfloat16", "int8"] = "float32"
    """How AdamW keeps its moments (TRL: float32); bfloat16: the first, int8: both in
    eight bits."""
    learning_rate: float | None = None
    """Rate at its peak. Default: that of `dpojax losses`; for adapters ten times it."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """What follows the warm-up: linear (TRL) or cosine to 0, or constant (paper)."""
    warmup_steps: float = 0.1
    """Steps of linear warm-up; below 1, a share of the run (0.1: Zephyr, Tulu 3)."""
    max_grad_norm: float = 1.0
    """Global gradient norm clipped to (TRL: 1; the paper's code: 10); 0: none."""
    weight_decay: float = 0.0
    """Decoupled decay of matrices (TRL: 0)."""
    beta1: float = 0.9
    """AdamW's decay of the mean gradient (TRL: 0.9)."""
    beta2: float = 0.999
    """AdamW's decay of the mean square (TRL: 0.999)."""
    epsilon: float = 1e-8
    """Number added to the root of the mean square (TRL: 1e-8)."""


@dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How devices share the work; the product is their number, slices divide data."""

    data: int = -1
    """Copies of the model, each with its own rows; -1: all devices that are left."""
    fsdp: int = 1
    """Devices that share one copy's parameters, each with its own rows; 1: none do."""
    tensor: int = 1
    """Devices that share each matrix product; 1: none do."""
    expert: int = 1
    """Devices that divide a copy's experts, each with its own rows; 1: none do."""
    context: int = 1
    """Devices that share long rows, each a part of their positions; 1: none do."""


@dataclass(frozen=True, kw_only=True)
class DistributedConfig:
    """The processes of a run: the same command on every host."""

    method: Annotated[str, tyro.conf.arg(name="")] = "none"
    """none: one process; auto: as JAX finds them; mpi4py; or HOST:PORT of process 0."""
    num_processes: Annotated[
        int | None, tyro.conf.arg(aliases=("--num-processes",))
    ] = None
    """Processes that there are, with HOST:PORT. Default: JAX_NUM_PROCESSES."""
    process: Annotated[int | None, tyro.conf.arg(aliases=("--process",))] = None
    """Number of this process, from 0, with HOST:PORT. Default: JAX_PROCESS_ID."""


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The objective and its settings; None keeps the objective's own default.

    `dpojax losses` prints all objectives, what each takes, and these defaults.
    """

    name: Annotated[str, tyro.conf.arg(name="")] = "dpo"
    """Objective (paper: dpo), a weighted sum such as 0.8*dpo+0.2*sft, or
    my_file.py:my_loss."""
    beta: Annotated[float | None, tyro.conf.arg(aliases=("--beta",))] = None
    """KL constraint's strength, per nat; or reward's scale."""
    label_smoothing: float | None = None
    """Probability that a label is flipped."""
    average: bool | None = None
    """Average log-ratios over tokens (ipo)."""
    alpha: float | None = None
    """Weight or temperature, the paper's alpha or lambda."""
    gamma: float | None = None
    """Margin of rewards (simnpo)."""
    gamma_beta_ratio: float | None = None
    """Margin over beta, nats (simpo, cpo_simpo, alphapo)."""
    tau: float | None = None
    """Temperature of the modulation (discopop)."""
    delta: float | None = None
    """Margin of likelihoods, nats (slic_hf)."""
    penalty: float | None = None
    """Weight of what the chosen completion lost (dpop)."""
    rho: float | None = None
    """Share of a batch that is left out (beta_dpo)."""
    desirable_weight: float | None = None
    """Weight of desirable completions (kto)."""
    undesirable_weight: float | None = None
    """Weight of undesirable completions (kto)."""
    center: float | None = None
    """Weight of the rewards' squared sum (bradley_terry)."""
    margin_scale: float | None = None
    """Margin per difference of scores (bradley_terry)."""
    divergence: str | None = None
    """reverse_kl, forward_kl, js_divergence or alpha_divergence (f_dpo and others)."""
    divergence_alpha: float | None = None
    """Order of the alpha divergence."""
    ld_alpha: float | None = None
    """Weight of tokens past the shorter one's end (ld_dpo, pairs)."""
    weighting: str | None = None
    """WPO's weights: aligned or likelihood (wpo, pairs)."""


@dataclass(frozen=True, kw_only=True)
class MovingConfig:
    """A reference that follows the policy."""

    kind: Annotated[Literal["none", "tr_dpo", "bema"], tyro.conf.arg(name="")] = "none"
    """none: it rests; tr_dpo: mixing (Trust Region DPO); bema: a corrected average."""
    every: int | None = None
    """Steps between its moves. Default: 512 for tr_dpo, 400 for bema (both TRL's)."""
    alpha: float | None = None
    """Weight of the policy (tr_dpo); 1 replaces the reference. Default: 0.6 (paper)."""
    ema_power: float | None = None
    """Power of time by which the average slows (bema). Default: 0.5 (TRL)."""
    bias_power: float | None = None
    """Power of time by which the correction fades (bema). Default: 0.2 (TRL)."""
    lag: float | None = None
    """Steps of virtual age that the average starts with (bema). Default: 10 (TRL)."""


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Adapters that are trained instead of all weights; the base is the reference."""

    rank: int | None = None
    """Rank of new adapters (TRL: 16). Default: none; of given adapters, theirs."""
    alpha: float | None = None
    """Scale, over the rank, of what adapters add. Default: 32 (TRL)."""
    targets: tuple[str, ...] = ()
    """all-linear, names such as q_proj, or a regular expression. Default: the first."""
    layers: int | None = None
    """Layers that have adapters: so many, the last ones. Default: all (TRL)."""
    kind: Literal["lora", "dora"] | None = None
    """LoRA, or DoRA with magnitudes of outputs. Default: lora (TRL)."""
    scaling: Literal["standard", "rslora"] | None = None
    """Alpha over the rank, or over its square root. Default: standard (TRL)."""
    dropout: float = 0.0
    """Share of what enters adapters that is dropped in training (TRL's DPO: none)."""
    base: Literal["float32", "bfloat16", "int8", "nf4"] | None = None
    """How the frozen base is kept. Default: as it computes, see `compute_dtype`."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train a policy. Without a model and data: the embedded sentiment task.

    First may stand my_experiment.py, or --from-trl recipe.yaml with --trl-trainer (dpo,
    kto, cpo, simpo, orpo, sft, reward) and --trl-processes (of TRL's run); flags
    override it. --print-config prints the configuration as such a file, and ends.
    """

    model: str | None = None
    """Policy to start from: a directory of a model or of adapters, or a hub name.
    Default: the embedded task's."""
    data: tuple[str, ...] = ()
    """JSON Lines (.gz too), Parquet or Arrow files, saved directories, or hub names."""
    data_weights: tuple[float, ...] = ()
    """Shares of several data that are used, one for each, above 1 repeating it."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our names of columns and the data's, as: prompt question chosen answer."""
    output: str | None = None
    """Run directory, new. Default: runs/ with the loss and the time."""
    resume: bool = False
    """Continue the run in `output` from its last checkpoint."""
    checkpoints: str | None = None
    """Where checkpoints are: a directory or gs://bucket/path. Default: in `output`."""

    loss: LossConfig = field(default_factory=LossConfig)
    reference: str | None = None
    """Reference model, precomputed, or precomputed:MODEL. Default: policy at step 0."""
    reference_cache: str | None = None
    """Where precomputed numbers are kept. Default: in XDG_CACHE_HOME, or ~/.cache."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    moving: MovingConfig = field(default_factory=MovingConfig)
    pairs_from: Literal["best_worst", "all", "rso"] = "best_worst"
    """How a loss of pairs takes ranked or scored completions (ours: the surest pair);
    rso: by rejection."""
    rejection_beta: float = 0.5
    """Temperature of rso's rejection sampling, in the scores' unit (paper: 0.5)."""
    turns: Literal["all", "assistant"] = "all"
    """What of a chat's completion is scored (TRL: all): everything, or the assistant's
    turns."""

    train_split: str = "train"
    """Split trained on (TRL: train); cut off the data if it has none of that name."""
    test_split: str = "test"
    """Split evaluated on (TRL: test), likewise."""
    test_size: float = 0.05
    """Share below 1, else number, of the examples cut off as the test split (ours:
    95 % are trained on)."""
    max_examples: int | None = None
    """Examples of the data that are used, chosen at random. Default: all."""
    max_length: int = 1024
    """Most tokens of a prompt and one completion, with EOS (TRL: 1024)."""
    too_long: Literal["truncate", "drop"] = "truncate"
    """Longer examples (TRL: truncate): cut the prompt's beginning, then completions'
    ends; or drop."""
    on_bad_record: Literal["stop", "skip"] = "stop"
    """A record that cannot be used stops the command (ours: what is wrong is seen), or
    is left out and listed."""

    batch_size: int = 64
    """Examples of an optimiser step, over all devices (paper: 64)."""
    microbatches: int = 1
    """Parts into which a batch's rows are split to save memory, with the same result;
    1: none."""
    row_length: int | None = None
    """Positions of a row, which examples share. Default: what wastes least."""
    epochs: float | None = None
    """Times that each example is seen. Default: 1 (the paper's code), or `steps`."""
    steps: int | None = None
    """Steps of the optimiser, instead of `epochs`. Default: what `epochs` takes."""
    stop_after: int | None = None
    """Step after which the run ends, its schedule unchanged, to be resumed later.
    Default: the last."""
    seed: int = 0
    """Number that decides the order of the data and the samples (ours: any will do)."""

    compute_dtype: Literal["float32", "bfloat16"] | None = None
    """Dtype of activations. Default: bfloat16, on a CPU float32."""
    attention: Literal["auto", "xla", "flash", "cudnn"] = "auto"
    """Kernel over whole rows: flash (TPU), cudnn (GPU), xla. Auto: flash on TPUs."""
    remat: (
        Literal["none", "dots", "dots_except_up", "save_attention", "full", "offload"]
        | None
    ) = None
    """What of a layer is recomputed. Default: full; on CPUs dots_except_up."""
    offload: tuple[Literal["optimizer", "reference"], ...] = ()
    """What is kept in the host's memory: optimizer (its moments), reference or both."""
    fit: bool = False
    """Find the fastest `remat`, and as many `microbatches` as it takes, that fit."""
    memory_limit: float | None = None
    """GiB of a device that --fit may use. Default: what the device has."""
    chunk_size: int = 512
    """Positions of each device's rows whose logits exist at one time (ours: with a tile
    of the vocabulary, 16 MiB)."""

    token_metrics: tuple[Literal["entropy", "mean_token_accuracy"], ...] = ()
    """Measured over all tokens of completions too, in the loss's pass (TRL: both)."""
    track: tuple[TrackerName, ...] = ()
    """Where metrics go besides metrics.jsonl; each is an extra: 'dpojax[wandb]'."""
    log_every: int = 10
    """Steps between lines of metrics (TRL: 10)."""
    evaluate_every: int = 100
    """Steps between evaluations, beside those before the first step and at the end
    (ours: ten in 1,000 steps)."""
    save_every: int = 100
    """Steps between checkpoints, beside that at the end (ours: at evaluations)."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a loss or gradient that is no number: stop (ours: the weights are suspect), or
    drop that step's update."""
    keep_last: int = 2
    """Checkpoints kept (ours: one may be damaged), beside that of the lowest evaluation
    loss."""
    sample_prompts: int = 5
    """Held-out prompts that are continued at each evaluation (ours: as many as are
    read); 0: none."""
    sample_tokens: int = 64
    """Most tokens of such a sample (ours: a paragraph)."""

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
