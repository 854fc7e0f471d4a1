"""Whether a tokenizer's files are whole, before a library reads them.

The libraries answer a damaged one with errors that name neither the file nor what is
wrong. What the contents mean is not known here.
"""

import json
from pathlib import Path
from typing import Any

_MODELS = (None, "BPE", "Unigram", "WordLevel", "WordPiece")  # None: seen by its form


def check_files(directory: Path) -> None:
    """Refuses a directory whose tokenizer files cannot be what they are named.

    Raises:
      ValueError: naming the file and what is wrong with it.
    """
    config, tokenizer = (
        directory / "tokenizer_config.json",
        directory / "tokenizer.json",
    )
    if config.is_file():
        _read_object(config)
    if tokenizer.is_file():
        _check_tokenizer(tokenizer, _read_object(tokenizer))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except ValueError as error:
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
            f"{path} holds a model of the type {model['type']!r}; the tokenizers "
            f"library reads {', '.join(filter(None, _MODELS))}."
        )


def _damaged(path: Path, what: str) -> ValueError:
    return ValueError(f"{path} {what}; it is damaged, fetch or write it again.")
