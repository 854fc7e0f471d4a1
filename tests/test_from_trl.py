"""Recipes of TRL as settings: what each key becomes, and what is refused.

The recipes are written for these tests, with the keys of public ones (named beside
each) and values in their manner; none is a copy.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from dpojax.cli import main
from dpojax.config import LossConfig, MovingConfig, TrainConfig
from dpojax.from_trl.convert import Converted, convert
from dpojax.from_trl.defaults import DEFAULTS, TRAINERS
from dpojax.from_trl.recipe import Recipe, read_recipe
from dpojax.from_trl.table import FIELDS, RENAMED
from dpojax.prepare import make_configured_loss

_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
_COMMON = """
model_name_or_path: org/model
bf16: true
gradient_checkpointing: true
learning_rate: 5.0e-7
num_train_epochs: 1
per_device_train_batch_size: 4
output_dir: data/run
seed: 42
log_level: info
logging_steps: 10
push_to_hub: true
hub_model_id: run
"""
_HANDBOOK = """
torch_dtype: null
do_eval: true
dataset_mixer: {org/pairs: 1.0}
dataset_splits: [train_prefs, test_prefs]
preprocessing_num_workers: 12
evaluation_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
gradient_checkpointing_kwargs: {use_reentrant: false}
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
per_device_eval_batch_size: 8
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
warmup_ratio: 0.1
"""
_MIXTURE = """
dataset_mixture:
  datasets:
    - {id: org/pairs, config: default, split: train_prefs, columns: [chosen], weight: 1}
    - {id: org/pairs, config: default, split: test_prefs, columns: [chosen], weight: 1}
  test_split_size: 2000
  seed: 0
dataset_num_proc: 12
lr_scheduler_type: cosine
optim: adamw_torch
warmup_ratio: 0.1
"""
_ORPO = f"""
chat_template: "{_TEMPLATE}"
model_revision: main
torch_dtype: bfloat16
beta: 0.05
gradient_accumulation_steps: 1
lr_scheduler_type: inverse_sqrt
max_length: 2048
max_prompt_length: 1792
optim: adamw_bnb_8bit
report_to: [tensorboard, wandb]
save_strategy: "no"
warmup_steps: 100
"""
_SIMPO = """
use_flash_attention_2: true
beta: 2.5
gamma_beta_ratio: 0.5
run_name: run
"""

# Public recipe: trainer, text, flags that settle what is refused, keys of the refusal.
RECIPES: dict[str, tuple[str, str, tuple[str, ...], tuple[str, ...]]] = {
    "alignment-handbook, zephyr-7b-beta/dpo/config_full, 2024": (
        "dpo",
        _COMMON + _HANDBOOK + "beta: 0.01\noptim: adamw_torch\n",
        (),
        (),
    ),
    "alignment-handbook, zephyr-7b-beta/dpo/config_full, 2025": (
        "dpo",
        _COMMON + _MIXTURE + "beta: 0.01\neval_strategy: steps\n",
        ("--data",),
        ("dataset_mixture",),
    ),
    "alignment-handbook, zephyr-7b-beta/dpo/config_qlora": (
        "dpo",
        _COMMON
        + _HANDBOOK.replace("null", "float16")
        + """
use_peft: true
load_in_4bit: true
lora_r: 16
lora_alpha: 16
lora_dropout: 0.05
lora_target_modules: [q_proj, k_proj]
beta: 0.01
optim: paged_adamw_32bit
""",
        (),
        (),
    ),
    "alignment-handbook, constitutional-ai/dpo/config_anthropic": (
        "dpo",
        _COMMON
        + _HANDBOOK.replace("{org/pairs: 1.0}", "{org/pairs: 1.0, org/more: 0.5}")
        + "do_train: true\nbeta: 0.1\noptim: rmsprop\n",
        (),
        (),
    ),
    "alignment-handbook, pref_align_scan/dpo/config_openhermes": (
        "dpo",
        _COMMON
        + _HANDBOOK
        + "loss_type: ipo\nhub_model_revision: v1.0\npush_to_hub_revision: true\n",
        (),
        (),
    ),
    "alignment-handbook, zephyr-7b-beta/sft/config_full": (
        "sft",
        _COMMON
        + _MIXTURE
        + f"""
chat_template: "{_TEMPLATE}"
model_revision: main
attn_implementation: flash_attention_2
eval_strategy: epoch
hub_strategy: every_save
logging_strategy: steps
max_seq_length: 2048
max_steps: -1
overwrite_output_dir: true
remove_unused_columns: true
report_to: [wandb]
save_strategy: steps
save_steps: 100
""",
        ("--data", "--model"),
        ("chat_template", "dataset_mixture"),
    ),
    "alignment-handbook, mistral-capybara/orpo/config_full": (
        "orpo",
        _COMMON
        + _ORPO
        + "use_flash_attention_2: true\ndataset_mixer: {org/pairs: 1.0}\n"
        + "dataset_splits: [train]\npreprocessing_num_workers: 12\n",
        ("--model", "--optimizer.schedule"),
        ("chat_template", "lr_scheduler_type"),
    ),
    "alignment-handbook, zephyr-141b-A35b/orpo/config_full": (
        "orpo",
        _COMMON
        + _ORPO
        + "attn_implementation: flash_attention_2\ndataset_name: org/pairs\n"
        + "dataset_train_split: train\ndataset_num_proc: 8\n",
        ("--model", "--optimizer.schedule"),
        ("chat_template", "lr_scheduler_type"),
    ),
    "alignment-handbook, smollm3/dpo/apo": (
        "dpo",
        _COMMON
        + """
model_revision: it-SFT
trust_remote_code: true
attn_implementation: flash_attention_2
dataset_mixture:
  datasets:
    - {id: org/pairs, config: Preference, split: no_think, columns: [], weight: 0.5}
    - {id: org/pairs, config: Preference, split: think, columns: [], weight: 0.25}
do_eval: false
eval_strategy: 'no'
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
max_grad_norm: 0.2
beta: 0.05
loss_type: apo_zero
max_length: 24576
padding_free: true
save_strategy: steps
save_steps: 0.5
use_liger_kernel: true
warmup_ratio: 0.1
""",
        ("--data", "--model", "--optimizer.schedule"),
        ("model_revision", "dataset_mixture", "lr_scheduler_type"),
    ),
    "SimPO, training_configs/llama-3-8b-instruct-simpo": (
        "simpo",
        _COMMON + _HANDBOOK + _SIMPO,
        (),
        (),
    ),
    "SimPO, training_configs/gemma-2-9b-it-simpo": (
        "simpo",
        _COMMON
        + _HANDBOOK
        + _SIMPO.replace("use_flash_attention_2: true", "attn_implementation: eager")
        + f'chat_template: "{_TEMPLATE}"\n',
        ("--model",),
        ("chat_template",),
    ),
    "alignment-handbook, smollm2/dpo/config": (
        "dpo",
        _COMMON
        + _MIXTURE
        + "eval_strategy: steps\neval_steps: 100\nhub_private_repo: true\nbeta: 0.5\n",
        ("--data",),
        ("dataset_mixture",),
    ),
}


def converted(trainer: str, processes: int = 1, **values: Any) -> Converted:
    return convert(Recipe(Path("r.yaml"), values), trainer=trainer, processes=processes)


def read(text: str, tmp_path: Path) -> Recipe:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return read_recipe(path)


@pytest.mark.parametrize("name", RECIPES)
def test_every_key_of_a_public_recipe_has_an_outcome(name: str, tmp_path: Path):
    trainer, text, settled, refused = RECIPES[name]
    recipe = read(text, tmp_path)
    made = convert(recipe, trainer=trainer, processes=8, settled=settled)
    keys = {RENAMED.get(key, key) for key in recipe.values}
    assert set(made.outcomes) == keys and all(made.outcomes.values())
    make_configured_loss(made.config.loss)
    parts = recipe.values.get("gradient_accumulation_steps", 1)
    assert (made.config.batch_size, made.config.microbatches) == (32 * parts, parts)
    if refused:
        with pytest.raises(ValueError) as error:
            convert(recipe, trainer=trainer, processes=8)
        assert all(f"{key}: " in str(error.value) for key in refused)


def test_zephyr_is_the_configuration_that_it_says(tmp_path: Path):
    text = RECIPES["alignment-handbook, zephyr-7b-beta/dpo/config_full, 2024"][1]
    config = convert(read(text, tmp_path), trainer="dpo", processes=8).config
    assert config.loss == LossConfig(name="dpo", beta=0.01)
    assert (config.model, config.data) == ("org/model", ("org/pairs",))
    assert (config.train_split, config.test_split) == ("train_prefs", "test_prefs")
    assert (config.epochs, config.steps, config.batch_size) == (1, None, 64)
    assert (config.optimizer.schedule, config.optimizer.warmup_steps) == ("cosine", 0.1)
    assert config.optimizer.learning_rate == 5e-7
    assert (config.evaluate_every, config.save_every, config.keep_last) == (100, 100, 1)


@pytest.mark.parametrize(
    ("trainer", "values", "loss"),
    [
        ("dpo", {}, {"name": "dpo", "beta": 0.1}),
        ("dpo", {"rpo_alpha": 0.5}, {"name": "dpo+0.5*sft", "beta": 0.1}),
        (
            "dpo",
            {
                "loss_type": ["sigmoid", "bco_pair", "sft"],
                "loss_weights": [0.8, 0.2, 1.0],
            },
            {"name": "0.8*dpo+0.2*bco_pair+sft", "beta": 0.1},
        ),
        (
            "dpo",
            {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
            {
                "name": "dpo",
                "beta": 0.1,
                "divergence": "alpha_divergence",
                "divergence_alpha": 0.3,
            },
        ),
        (
            "dpo",
            {"loss_type": "discopop", "discopop_tau": 0.1, "beta": 0.05},
            {"name": "discopop", "beta": 0.05, "tau": 0.1},
        ),
        (
            "dpo",
            {"loss_type": "robust", "label_smoothing": 0.2},
            {"name": "robust_dpo", "beta": 0.1, "label_smoothing": 0.2},
        ),
        ("dpo", {"use_weighting": True}, {"beta": 0.1, "weighting": "aligned"}),
        (
            "kto",
            {"undesirable_weight": 1.3},
            {
                "name": "kto",
                "beta": 0.1,
                "desirable_weight": 1.0,
                "undesirable_weight": 1.3,
            },
        ),
        (
            "kto",
            {"loss_type": "apo_zero_unpaired"},
            {"name": "apo_zero_unpaired", "beta": 0.1},
        ),
        ("cpo", {}, {"name": "cpo", "beta": 0.1, "alpha": 1.0, "label_smoothing": 0.0}),
        (
            "cpo",
            {"loss_type": "simpo", "cpo_alpha": 0, "beta": 2.0, "simpo_gamma": 1.0},
            dict(name="simpo", beta=2.0, gamma_beta_ratio=0.5, label_smoothing=0.0),
        ),
        (
            "cpo",
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 1.0},
            {"name": "cpo_simpo", "beta": 2.0, "gamma_beta_ratio": 0.5, "alpha": 1.0},
        ),
        ("orpo", {"beta": 0.05}, {"name": "orpo", "beta": 0.05}),
        ("sft", {}, {"name": "sft"}),
        ("reward", {}, {"name": "bradley_terry"}),
        (
            "reward",
            {"center_rewards_coefficient": 0.01},
            {"name": "bradley_terry", "center": 0.01},
        ),
    ],
)  # fmt: skip
def test_losses(trainer: str, values: dict[str, Any], loss: dict[str, Any]):
    found = converted(trainer, **values).config.loss
    assert found == LossConfig(**loss)
    make_configured_loss(found)


def test_every_pair_loss_of_trl_is_one_of_ours():
    from dpojax.from_trl.objective import _PAIRS

    for name in _PAIRS:
        values: dict[str, Any] = {"loss_type": name}
        if name in ("exo_pair", "robust"):
            values["label_smoothing"] = 0.1
        make_configured_loss(converted("dpo", **values).config.loss)


def test_a_reference_that_follows_and_one_that_is_precomputed():
    config = converted("dpo", sync_ref_model=True, ref_model_sync_steps=64).config
    assert config.moving == MovingConfig(kind="tr_dpo", every=64, alpha=0.6)
    ahead = converted("dpo", precompute_ref_log_probs=True).config
    assert ahead.reference == "precomputed"


def test_numbers_that_yaml_reads_as_text(tmp_path: Path):
    recipe = read("learning_rate: 1e-6\nbeta: 0.1\n", tmp_path)
    assert recipe.values["learning_rate"] == "1e-6"
    config = convert(recipe, trainer="dpo", processes=1).config
    assert config.optimizer.learning_rate == 1e-6


@pytest.mark.parametrize(
    ("trainer", "values", "words"),
    [
        ("dpo", {"loss_type": "kto_pair"}, "'kto_pair' is no loss that has a"),
        ("dpo", {"fp16": True}, "fp16: dpojax computes in bfloat16 or float32"),
        ("dpo", {"max_length": None}, "max_length: without a limit"),
        ("dpo", {"optim": "sgd"}, "optim: sgd"),
        ("dpo", {"use_peft": True}, "lora_target_modules: PEFT chooses"),
        ("dpo", {"neftune_noise_alpha": 5}, "the embeddings get no noise"),
        ("dpo", {"model_revision": "v2"}, "--model after the recipe settles it"),
        ("dpo", {"disable_dropout": False}, "the model's own dropout is not there"),
        ("dpo", {"dataset_name": "a", "dataset_config": "en"}, "dataset_config: en"),
        ("dpo", {"learning_rate": "fast"}, "learning_rate is 'fast'; it must be a"),
        ("dpo", {"loss_weights": [1, 2]}, "loss_weights has 2 numbers for 1 loss"),
        ("dpo", {"bta": 0.1}, "TRL has no field 'bta'; did you mean beta?"),
        ("dpo", {"desirable_weight": 2}, "desirable_weight is of kto, not of dpo"),
        ("cpo", {"loss_type": "hinge"}, "'hinge' is no loss"),
        ("cpo", {"alpha": 0.1}, "alpha 0.1 together with loss_type sigmoid"),
        ("sft", {"completion_only_loss": False}, "prompts are never scored"),
        ("ppo", {}, "--trl-trainer is 'ppo'; it must be one of dpo"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(
    trainer: str, values: dict[str, Any], words: str
):
    with pytest.raises(ValueError) as error:
        converted(trainer, **values)
    assert words in str(error.value)


def test_the_number_of_processes_is_asked_for_unless_the_batch_is_given():
    recipe = Recipe(Path("r.yaml"), {"beta": 0.1})
    with pytest.raises(ValueError, match="give --trl-processes, or --batch-size"):
        convert(recipe, trainer="dpo")
    config = convert(recipe, trainer="dpo", settled=("--batch-size", "--steps")).config
    assert (config.batch_size, config.epochs) == (TrainConfig().batch_size, None)


def test_the_trainer_is_asked_for_unless_a_key_tells_it():
    with pytest.raises(ValueError, match="give --trl-trainer, one of dpo, kto"):
        convert(Recipe(Path("r.yaml"), {"beta": 0.1}), processes=1)
    told = convert(Recipe(Path("r.yaml"), {"gamma_beta_ratio": 0.3}), processes=1)
    assert (told.trainer, told.config.loss.name) == ("simpo", "simpo")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("beta: 0.1\nbeta: 0.2\n", "line 2: the key 'beta' stands twice"),
        ("beta: [0.1\n", "line 2: "),
        ("1: 2\n", "line 1: the key 1 is not a name"),
        ("- beta\n", "holds no keys with values"),
        ("beta: !!python/object/apply:os.getcwd []\n", "line 1: "),
    ],
)
def test_bad_yaml_is_answered_with_its_file_and_line(
    text: str, words: str, tmp_path: Path
):
    with pytest.raises(ValueError) as error:
        read(text, tmp_path)
    assert words in str(error.value) and "recipe.yaml" in str(error.value)


def test_what_is_printed_is_an_experiment_file_that_flags_still_override(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "model_name_or_path: org/model\ndataset_name: org/pairs\nbeta: 0.3\n"
    )
    flags = ["--trl-trainer", "dpo", "--trl-processes", "2", "--print-config"]
    main(
        ["train", "--from-trl", str(path), *flags, "--optimizer.learning-rate", "1e-5"]
    )
    first = capsys.readouterr()
    assert "beta: loss.beta" in first.err and "num_train_epochs=3.0" in first.err
    experiment = tmp_path / "experiment.py"
    experiment.write_text(first.out)
    main(["train", str(experiment), "--print-config"])
    assert capsys.readouterr().out == first.out
    names: dict[str, Any] = {}
    exec(first.out, names)
    config = names["config"]()
    assert (config.loss.beta, config.batch_size) == (0.3, 16)
    assert (config.optimizer.learning_rate, config.epochs) == (1e-5, 3)


def test_a_refusal_of_the_command_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        main(["train", "--from-trl", str(tmp_path / "none.yaml"), "--print-config"])
    assert "There is no recipe" in capsys.readouterr().err


def test_starting_does_not_import_yaml():
    code = "import sys, dpojax.cli; assert 'yaml' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_recipes_here_are_yaml_of_trls_fields():
    for trainer, text, _, _ in RECIPES.values():
        assert trainer in TRAINERS
        assert {RENAMED.get(k, k) for k in yaml.safe_load(text)} <= FIELDS.keys()


def test_each_default_belongs_to_a_field_that_is_mapped():
    found = {key for own in DEFAULTS.values() for key in own} - {"disable_dropout"}
    assert found == {key for key, row in FIELDS.items() if row.outcome == "mapped"}
