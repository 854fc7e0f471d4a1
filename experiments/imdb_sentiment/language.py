"""The SFT model: a tokenizer and a small decoder, from the reviews alone.

Pre-trained on pieces of all reviews, then fine-tuned on the beginnings of the training
split's, which is what it will be asked to write. Both are ordinary runs of dpojax. It
knows no reward.
"""

from collections.abc import Iterable
from pathlib import Path

import jax
from reviews import Review, pieces
from sizes import Size
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dpojax.config import LossConfig, OptimizerConfig, TrainConfig
from dpojax.models.decoder import DecoderConfig, make_model
from dpojax.models.families import as_settings
from dpojax.models.huggingface import write_model
from dpojax.whole_files import whole_directory, write_json_lines

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}


def train_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` entries; it adds only a BOS."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", raw.token_to_id("<bos>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)


def write_new_model(directory: Path, texts: Iterable[str], size: Size) -> None:
    """An untrained decoder with its tokenizer."""
    tokenizer = train_tokenizer(texts, size.vocabulary)
    shape = DecoderConfig(
        vocabulary_size=-(-len(tokenizer) // 128) * 128,
        width=size.width,
        num_layers=size.num_layers,
        num_heads=size.num_heads,
        num_key_heads=size.num_heads,
        head_dimension=size.width // size.num_heads,
        mlp_width=3 * size.width,
        tied_output=True,
        max_length=2 * max(size.window, size.length),
    )
    params = jax.jit(make_model(shape).init)(jax.random.key(0))
    with whole_directory(directory) as place:
        write_model(place, params, as_settings(shape), tokenizer.save_pretrained)


def write_pieces(path: Path, reviews: list[Review], num_tokens: int) -> None:
    """What pre-training reads."""
    texts = pieces(reviews, num_tokens, seed=0)
    rows = ({"prompt": "", "completion": text} for text in texts if text.strip())
    write_json_lines(path, rows)


def write_beginnings(path: Path, reviews: list[Review], num_tokens: int) -> None:
    """What SFT reads: reviews from their first word on, longer than what is kept."""
    texts = (" ".join(review.text.split(" ")[: 2 * num_tokens]) for review in reviews)
    write_json_lines(path, ({"prompt": "", "completion": text} for text in texts))


def language_run(
    model: Path, data: Path, output: Path, size: Size, *, steps: int, rate: float
) -> TrainConfig:
    """Imitation of texts; pieces are cut at the window of the stage."""
    is_sft = data.stem == "beginnings"
    return TrainConfig(
        loss=LossConfig(name="sft"),
        model=str(model),
        data=(str(data),),
        output=str(output),
        test_size=256 if size.num_reviews is None else 16,
        max_length=size.length if is_sft else size.window,
        batch_size=size.batch_size,
        steps=steps,
        sample_prompts=0,
        log_every=100,
        evaluate_every=1_000,
        save_every=200,
        optimizer=OptimizerConfig(learning_rate=rate, schedule="cosine", beta2=0.98),
    )
