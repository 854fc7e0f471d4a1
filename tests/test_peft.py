"""Adapter files: PEFT reads ours, we read PEFT's; what cannot be read is refused."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_models import make_pair

from dpojax.data.packing import Example, as_batch
from dpojax.log_probs import logits_of
from dpojax.models.adapter_config import read_base_name, shape_by_targets
from dpojax.models.adapter_modules import choose_modules
from dpojax.models.decoder import Model, make_model
from dpojax.models.families import as_decoder_config
from dpojax.models.functional import Params
from dpojax.models.huggingface import read_settings
from dpojax.models.lora import LoraShape, graft, start_adapters
from dpojax.models.peft import read_adapters, read_shape, write_adapters

# PEFT asks transformers for it by a name that is to go; another warning is an error.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)
SIZES = {"hidden_size": 48, "num_hidden_layers": 2}
# Of each family what its classes begin with, and how `make_theirs` is to change SIZES.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "phi3": ("Phi3", {}),
    "gpt2": (
        "GPT2",
        {
            "model": "GPT2LMHeadModel",
            "without": ("num_key_value_heads", "intermediate_size"),
        },
    ),
    "gpt_neox": ("GPTNeoX", {"without": ("num_key_value_heads",)}),
}
CASES = [
    ("llama", "lora", "standard", ("all-linear",)),
    ("llama", "dora", "rslora", ("q_proj", "down_proj")),
    ("phi3", "lora", "standard", ("qkv_proj", "o_proj")),
    ("phi3", "dora", "standard", ("all-linear",)),
    ("gpt2", "lora", "rslora", ("c_attn", "attn.c_proj")),
    ("gpt_neox", "lora", "standard", ("all-linear",)),
]
# Those in the last of the two layers alone.
UPPER_CASES = [
    ("llama", "dora", "standard", ("q_proj", "down_proj")),
    ("gpt2", "lora", "standard", ("c_attn", "attn.c_proj")),
]
EVERY_CASE = [(*case, None) for case in CASES] + [(*case, 1) for case in UPPER_CASES]
TOKENS = np.random.default_rng(0).integers(3, 97, 11).astype(np.int32)


class Base(NamedTuple):
    """A random model of transformers, and the same here."""

    directory: Path
    params: Params
    settings: dict[str, Any]

    def model(self, shape: LoraShape | None) -> Model:
        return make_model(as_decoder_config(self.settings), lora=shape)

    def theirs(self) -> Any:
        import transformers

        return transformers.AutoModelForCausalLM.from_pretrained(
            self.directory, attn_implementation="eager"
        ).eval()


@pytest.fixture(scope="module")
def get_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Base]:
    pytest.importorskip("peft")

    @cache
    def get(family: str) -> Base:
        name, changes = FAMILIES[family]
        pair = make_pair(tmp_path_factory.mktemp(family), name, SIZES | changes)
        return Base(pair.directory, pair.params, read_settings(pair.directory))

    return get


def random_adapters(base: Base, shape: LoraShape) -> Params:
    made = base.model(shape).init_adapters(jax.random.key(0))
    started = start_adapters(base.params, made)
    return jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape), started
    )


def our_logits(base: Base, shape: LoraShape, adapters: Params) -> np.ndarray:
    batch = as_batch(
        [[Example(TOKENS[:1], (TOKENS[1:],))]], length=16, num_completions=1
    )
    apply = base.model(shape).apply
    logits = jax.jit(lambda params: logits_of(*apply(params, batch)))(
        graft(base.params, adapters)
    )
    inputs = int(np.count_nonzero(batch.example))  # the last token is never one
    return np.asarray(logits)[0, :inputs]


def their_logits(model: Any) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS[None].astype(np.int64))).logits[0, :-1].numpy()


def read(base: Base, directory: Path) -> tuple[LoraShape, Params]:
    shape = read_shape(directory, base.params, base.settings)
    like = jax.eval_shape(base.model(shape).init_adapters, jax.random.key(0))
    return shape, read_adapters(directory, shape, like, base.params, base.settings)


def write(base: Base, directory: Path, shape: LoraShape, adapters: Params) -> None:
    name = str(base.directory)
    write_adapters(
        directory, adapters, shape, base.params, base.settings, name, lambda path: None
    )


@pytest.mark.parametrize(("family", "kind", "scaling", "targets", "layers"), EVERY_CASE)
def test_peft_computes_with_our_file_what_we_do(
    family: str,
    kind: Any,
    scaling: Any,
    targets: tuple,
    layers: int | None,
    get_base: Any,
    tmp_path: Path,
):
    base: Base = get_base(family)
    import peft

    modules = choose_modules(targets, base.params, base.settings)
    how: dict[str, Any] = {"kind": kind, "scaling": scaling, "layers": layers}
    shape = LoraShape(modules=modules, rank=3, alpha=5.0, **how)
    adapters = random_adapters(base, shape)
    write(base, tmp_path / "adapter", shape, adapters)
    theirs = peft.PeftModel.from_pretrained(base.theirs(), tmp_path / "adapter")
    found = our_logits(base, shape, adapters)
    np.testing.assert_allclose(found, their_logits(theirs.eval()), rtol=1e-4, atol=1e-4)
    difference = found - their_logits(base.theirs())
    assert np.abs(difference).max() > 0.1
    # And comes back as it was, here and by the config alone.
    again, values = read(base, tmp_path / "adapter")
    assert again == shape
    assert shape == shape_by_targets(tmp_path / "adapter", base.params, base.settings)
    jax.tree.map(np.testing.assert_array_equal, values, adapters)
    write(base, tmp_path / "second", again, values)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        first, second = tmp_path / "adapter" / name, tmp_path / "second" / name
        assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize(("family", "kind", "scaling", "targets", "layers"), EVERY_CASE)
def test_we_compute_with_pefts_file_what_it_does(
    family: str,
    kind: str,
    scaling: str,
    targets: tuple,
    layers: int | None,
    get_base: Any,
    tmp_path: Path,
):
    base: Base = get_base(family)
    import peft
    import torch

    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules="all-linear" if targets == ("all-linear",) else list(targets),
        use_dora=kind == "dora",
        use_rslora=scaling == "rslora",
        layers_to_transform=None if layers is None else [1],
        fan_in_fan_out=family == "gpt2",
        task_type="CAUSAL_LM",
    )
    theirs = peft.get_peft_model(base.theirs(), config).eval()
    torch.manual_seed(0)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(str(tmp_path))
    assert read_base_name(tmp_path) == str(base.directory)
    shape, adapters = read(base, tmp_path)
    assert shape.layers == layers
    found = our_logits(base, shape, adapters)
    np.testing.assert_allclose(found, their_logits(theirs), rtol=1e-4, atol=1e-4)
    assert np.abs(found - their_logits(base.theirs())).max() > 0.1


# -- What is refused ------------------------------------------------------------------


@pytest.fixture
def adapter(get_base: Any, tmp_path: Path) -> Path:
    base = get_base("llama")
    modules = frozenset({"attention/query", "mlp/down"})
    shape = LoraShape(modules=modules, rank=3, alpha=5.0)
    write(base, tmp_path / "adapter", shape, random_adapters(base, shape))
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type = 'IA3'; dpojax reads 'LORA'"),
        ({"bias": "all"}, "bias = 'all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa'"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, r"= \[0\]; .* all layers or of the last ones"),
        ({"layers_to_transform": [1, 1]}, r"= \[1, 1\]; .*the last of this base is 1"),
        ({"layers_to_transform": [1]}, "layers.0.mlp.* has no place there"),
        ({"r": 0}, "r = 0 and lora_alpha = 5"),
        ({"r": None}, "r = None"),
        ({"r": 5}, "rank 3 and scale 1.66667; dpojax reads adapters of one rank"),
        ({"alpha_pattern": {"q_proj": 9}}, "q_proj rank 3 and scale 3"),
        ({"base_model_name_or_path": None}, "names no base model"),
    ],
)
def test_a_config_that_says_what_we_do_not_compute_is_refused(
    changes: dict, message: str, adapter: Path, get_base: Any
):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message):
        read_base_name(adapter)
        read(get_base("llama"), adapter)


def with_tensors(adapter: Path, change: Callable[[dict], Any]) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


QUERY = "base_model.model.model.layers.1.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(QUERY + "B.weight"), "lacks the tensor.*q_proj.lora_B"),
        (
            lambda t: (t.pop(QUERY + "A.weight"), t.pop(QUERY + "B.weight")),
            "not of every layer.*layers.1.self_attn.q_proj",
        ),
        (
            lambda t: t.update({QUERY + "A.weight": np.zeros((3, 4), np.float32)}),
            "same shape|another base",
        ),
        (
            lambda t: t.update({QUERY + "E.weight": np.zeros((3, 4), np.float32)}),
            "lora_E.weight, which has no place",
        ),
        (
            lambda t: t.update({"x.lora_A.weight": np.zeros((3, 4), np.float32)}),
            "x is missing or has no place",
        ),
        (
            lambda t: t.update(
                {QUERY + "A.weight": np.full((3, 48), np.nan, np.float32)}
            ),
            "lora_A.weight holds numbers that are not finite",
        ),
    ],
)
def test_tensors_that_are_not_one_adapter_for_each_layer_are_refused(
    change: Callable, message: str, adapter: Path, get_base: Any
):
    with_tensors(adapter, change)
    with pytest.raises(ValueError, match=message):
        read(get_base("llama"), adapter)


def test_adapters_of_another_base_are_refused(adapter: Path, get_base: Any):
    def widen(tensors: dict) -> None:
        for name, values in tensors.items():
            if name.endswith("lora_A.weight"):
                tensors[name] = np.zeros((3, values.shape[1] + 1), np.float32)

    with_tensors(adapter, widen)
    with pytest.raises(ValueError, match="another base.*query/lora/a has shape"):
        read(get_base("llama"), adapter)
    with pytest.raises(ValueError, match="no adapters of this base model"):
        read(get_base("gpt2"), adapter)


def test_damaged_files_are_refused(adapter: Path, get_base: Any):
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="adapter_model.safetensors cannot be read"):
        read(get_base("llama"), adapter)
    path.rename(adapter / "adapter_model.bin")
    with pytest.raises(ValueError, match="has no adapter_model.safetensors; other"):
        read(get_base("llama"), adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
        read_base_name(adapter)
