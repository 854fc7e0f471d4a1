"""A tokenizer's files: whether they are whole before a library reads them, and writing.

The libraries answer a damaged one with errors that name neither the file nor what is
wrong. What the contents mean is not known here.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpojax.data.bad_records import shown

_SENTENCEPIECE = "tokenizer.model"
_MODELS = (None, "BPE", "Unigram", "WordLevel", "WordPiece")  # None: seen by its form


def check_files(directory: Path) -> None:
    """Refuses a directory whose tokenizer files cannot be what they are named.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    _check_links(directory)
    config, tokenizer = (
        directory / "tokenizer_config.json",
        directory / "tokenizer.json",
    )
    for path in (config, tokenizer):
        if path.exists() and not path.is_file():
            raise _damaged(path, "is no file")
    if config.is_file():
        _check_names(config, _read_object(config))
    if tokenizer.is_file():
        _check_tokenizer(tokenizer, _read_object(tokenizer))


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Writes a tokenizer with the SentencePiece model of the directory it came from.

    transformers, which needs `tokenizer.json` alone, leaves this out; llama.cpp's
    converter asks for it in Gemma's directories. Where it lay is not written down.
    """
    tokenizer.save_pretrained(directory)
    config = directory / "tokenizer_config.json"
    settings = json.loads(config.read_text("utf-8"))
    if settings.pop("vocab_file", None) is not None:
        text = json.dumps(settings, indent=2, ensure_ascii=False)
        config.write_text(f"{text}\n", "utf-8")
    source = Path(tokenizer.name_or_path, _SENTENCEPIECE)
    if tokenizer.name_or_path and source.is_file():
        shutil.copyfile(source, directory / _SENTENCEPIECE)


def check_templates(templates: object, source: str | Path) -> None:
    """Refuses chat templates that are no text, or whose names lead elsewhere.

    Each is written to a file of its name, wherever the tokenizer is saved.

    Raises:
      ValueError: naming the tokenizer.
    """
    by_name = {"default": templates} if isinstance(templates, str) else templates
    if by_name is None:
        return
    if not isinstance(by_name, dict) or not all(
        is_plain(name) and isinstance(text, str) for name, text in by_name.items()
    ):
        raise ValueError(
            f"The tokenizer {source} has chat templates that are not texts with plain "
            "names; set chat_template in its tokenizer_config.json to a text."
        )


def is_plain(name: object) -> bool:
    """Whether it is a name in a directory, which leads nowhere else."""
    return (
        isinstance(name, str)
        and name not in ("", ".", "..")
        and not any(character in name for character in "/\\\0")
    )


def _check_links(directory: Path) -> None:
    """Refuses links by which a file of somewhere else would be taken for a tokenizer's.

    What transformers reads it also writes beside the trained model. The hub's cache is
    made of links: there, files of a model's snapshots are links into its own blobs.
    """
    if not directory.is_dir():
        return
    inside = [directory.resolve()]
    if directory.resolve().parent.name == "snapshots":
        inside.append(directory.resolve().parents[1] / "blobs")
    # Weights are read as numbers or not at all, and often linked to save space.
    patterns = ("*.json", "*.jinja", "*.txt", "*.model", "*/*.jinja")
    for path in (path for pattern in patterns for path in directory.glob(pattern)):
        target = path.resolve()
        is_index = path.name.endswith(".safetensors.index.json")
        if not is_index and not any(map(target.is_relative_to, inside)):
            raise ValueError(
                f"{path} is a link to {target}, out of its directory; put the file "
                "itself there if it belongs to the model."
            )


def _check_names(path: Path, config: dict[str, Any]) -> None:
    files = config.get("fast_tokenizer_files", [])
    if not isinstance(files, list) or not all(map(is_plain, files)):
        raise ValueError(
            f"{path} has fast_tokenizer_files that are not names of files beside it; "
            "remove the entry."
        )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise _damaged(path, "is not a JSON object")
    return content


def _check_tokenizer(path: Path, content: dict[str, Any]) -> None:
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise _damaged(path, "holds no model with a vocabulary")
    if not isinstance(content.get("added_tokens"), list):
        raise _damaged(path, "holds no list of added tokens")
    if model.get("type") not in _MODELS:
        raise ValueError(
            f"{path} holds a model of the type {shown(model['type'])}; the tokenizers "
            f"library reads {', '.join(filter(None, _MODELS))}."
        )


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; it is damaged, fetch or write it again.")
