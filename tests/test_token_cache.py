"""Prepared examples are kept by all that they depend on, whole, or made anew."""

import json
from pathlib import Path
from typing import Any

import pytest

from dpojax import examples, token_cache
from dpojax.config import TrainConfig
from dpojax.data.bad_records import Skipped
from dpojax.data.loader import fingerprint
from dpojax.data.packing import Example
from dpojax.data.synthetic import make_tokenizer
from dpojax.data.tokenize import Tokenizer
from dpojax.losses.make import make_loss
from dpojax.token_cache import make_key

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is; everything is large enough for it."""
    monkeypatch.setattr(token_cache, "SMALLEST", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches/dpojax/tokens"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    words = ["good", "bad", "fine", "poor"]
    rows = [
        {"prompt": f"The food was{' very' * (n % 5)}", "chosen": f" {words[n % 4]}",
         "rejected": f" {words[(n + 1) % 4]}", "chosen_score": n, "rejected_score": 0}
        for n in range(40)
    ]  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def load(data: Path, tokenizer: Tokenizer | None = None, **settings: Any):
    config = TrainConfig(model="none", data=(str(data),), test_size=10, **settings)
    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    return examples.load_split(config, make_loss("dpo"), tokenizer, "train")


def refuse(*arguments: Any, **settings: Any) -> None:
    raise AssertionError("Nothing is to be tokenised.")


def entry(root: Path) -> Path:
    (directory,) = root.iterdir()
    return directory


def test_a_second_start_gives_the_same_without_reading_a_record(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    first = load(data)
    said = capsys.readouterr().out
    monkeypatch.setattr(examples, "tokenize_records", refuse)
    monkeypatch.setattr("dpojax.data.files.JsonLines.read", refuse)
    second = load(data)
    assert said == capsys.readouterr().out and "30 examples" in said
    assert fingerprint(list(second)) == fingerprint(list(first)) == fingerprint(second)
    assert second[3].scores == first[3].scores


def test_a_copy_of_the_data_under_another_name_is_the_same_data(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    load(data)
    other = data.with_name("other.jsonl")
    other.write_bytes(data.read_bytes())
    monkeypatch.setattr(examples, "tokenize_records", refuse)
    assert len(load(other)) == 30


@pytest.mark.parametrize(
    "settings",
    [
        {"max_length": 1000},
        {"too_long": "drop"},
        {"columns": {"prompt": "prompt"}},
        {"max_examples": 30},
        {"data_weights": (2.0,)},
        {"train_split": "other"},
    ],
)
def test_any_setting_changes_the_key(data: Path, root: Path, settings: dict[str, Any]):
    load(data)
    names = {"data_weights": "weights", "train_split": "split"}
    keys = [
        make_key([[data]], make_tokenizer(), {"weights": None, "split": "train"} | some)
        for some in ({}, {names.get(n, n): v for n, v in settings.items()})
    ]
    assert None not in keys and keys[0] != keys[1]
    if "train_split" not in settings:
        load(data, **settings)
        assert len(list(root.iterdir())) == 2


def changed(**attributes: Any) -> Tokenizer:
    tokenizer = make_tokenizer()
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def with_token() -> Tokenizer:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<new>"])
    return tokenizer


def test_whatever_the_tokenizer_does_changes_the_key(data: Path):
    tokenizers = [
        make_tokenizer(),
        with_token(),
        changed(chat_template=TEMPLATE),
        changed(chat_template=TEMPLATE + "."),
        changed(eos_token="<unk>"),
        changed(split_special_tokens=True),
    ]
    keys = {make_key([[data]], tokenizer, {}) for tokenizer in tokenizers}
    assert len(keys) == len(tokenizers) and None not in keys
    # What it was last used for does not.
    used = make_tokenizer()
    used("good", truncation=True, max_length=3, padding="max_length")
    assert make_key([[data]], used, {}) in keys


def test_a_template_that_writes_the_date_is_kept_for_a_day(
    data: Path, monkeypatch: pytest.MonkeyPatch
):
    class Tomorrow:
        @staticmethod
        def today():
            return Tomorrow

        @staticmethod
        def isoformat():
            return "2100-01-01"

    dated = changed(chat_template="{{ strftime_now('%d') }}" + TEMPLATE)
    before = [make_key([[data]], t, {}) for t in (dated, make_tokenizer())]
    monkeypatch.setattr(token_cache, "date", Tomorrow)
    after = [make_key([[data]], t, {}) for t in (dated, make_tokenizer())]
    assert before[0] != after[0] and before[1] == after[1]


def test_the_contents_and_order_of_data_sets_change_the_key(data: Path):
    other = data.with_name("other.jsonl")
    other.write_bytes(data.read_bytes().replace(b"good", b"fine"))
    sources = [[[data]], [[other]], [[data], [other]], [[other], [data]]]
    keys = {make_key(files, make_tokenizer(), {}) for files in sources}
    assert len(keys) == 4 and None not in keys


def test_small_data_and_data_in_no_file_have_no_key(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    assert make_key([[data], []], make_tokenizer(), {}) is None
    monkeypatch.setattr(token_cache, "SMALLEST", data.stat().st_size + 1)
    assert make_key([[data]], make_tokenizer(), {}) is None
    assert len(load(data)) == 30 and not root.exists()


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


DAMAGES = {
    "flipped": flip,
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("name", ["tokens", "ends", "scores", "note", "*.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_is_said_and_prepared_again(
    data: Path, root: Path, name: str, damage: str, capsys: Any
):
    expected = fingerprint(list(load(data)))
    (path,) = entry(root).glob(name)
    DAMAGES[damage](path)
    capsys.readouterr()
    assert fingerprint(list(load(data))) == expected
    assert "is damaged and removed" in capsys.readouterr().out
    load(data)
    assert "damaged" not in capsys.readouterr().out


def test_preparing_that_fails_leaves_nothing(data: Path, root: Path):
    with data.open("a") as file:
        file.write("{\n")
    with pytest.raises(ValueError, match="pairs.jsonl, line 41 is not JSON"):
        load(data)
    assert not list(root.iterdir())


def test_a_cache_that_cannot_be_written_is_done_without(
    data: Path, root: Path, capsys: Any
):
    root.parent.mkdir(parents=True)
    root.write_text("no directory")
    assert len(load(data)) == 30
    assert "cannot be written" in capsys.readouterr().out


def test_two_that_prepare_the_same_at_one_time_both_have_it(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    tokenize, results = examples.tokenize_records, []

    def slowly(*arguments: Any, **settings: Any):
        monkeypatch.setattr(examples, "tokenize_records", tokenize)
        results.append(fingerprint(list(load(data))))
        return tokenize(*arguments, **settings)

    monkeypatch.setattr(examples, "tokenize_records", slowly)
    results.append(fingerprint(list(load(data))))
    assert results[0] == results[1] and entry(root)
    assert "cannot be written" not in capsys.readouterr().out


def test_what_a_killed_process_left_is_removed_after_a_day(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch
):
    left = root / "a.b.unfinished"
    left.mkdir(parents=True)
    (left / "tokens").write_bytes(b"1")
    load(data)
    assert left.exists()  # someone may still be writing
    monkeypatch.setattr(token_cache, "_ABANDONED", -1)
    load(data, max_length=100)
    assert not left.exists()


def test_batches_can_be_made_of_what_is_kept(data: Path):
    load(data)
    examples = load(data)
    assert all(isinstance(example, Example) for example in examples[:3])
    assert not examples[0].prompt.flags.writeable


def spoil(data: Path) -> None:
    """A few lines here and there can no longer be used."""
    lines = data.read_text().splitlines()
    lines[3::9] = ["{"] * len(lines[3::9])
    data.write_text("\n".join(lines) + "\n")


def load_and_skip(data: Path) -> list[Skipped]:
    config = TrainConfig(data=(str(data),), test_size=10, on_bad_record="skip")
    skipped: list[Skipped] = []
    examples.load_split(config, make_loss("dpo"), make_tokenizer(), "train", skipped)
    return skipped


def test_a_second_start_says_what_the_first_one_skipped(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    spoil(data)
    (first,) = load_and_skip(data)
    said = capsys.readouterr().out
    assert first.reasons and first.num_records == 30
    assert f"skipped {len(first.reasons)} bad of 30 records: {data}, line" in said
    with monkeypatch.context() as patched:
        patched.setattr(examples, "tokenize_records", refuse)
        assert load_and_skip(data) == [first]
    assert said == capsys.readouterr().out
    # Reasons name files.
    other = data.rename(data.with_name("other.jsonl"))
    (renamed,) = load_and_skip(other)
    assert renamed.reasons[0] == first.reasons[0].replace(str(data), str(other))


def test_what_was_prepared_without_bad_records_is_not_used_where_they_stop(
    data: Path, root: Path
):
    spoil(data)
    load_and_skip(data)
    for _ in range(2):
        with pytest.raises(ValueError, match=r"pairs.jsonl, line 4 is not JSON"):
            load(data)
    assert entry(root)


def test_what_is_prepared_twice_is_skipped_once(
    data: Path, root: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    spoil(data)

    def fill(*arguments: Any) -> None:
        raise OSError("No space left on device")

    (first,) = load_and_skip(data)
    token_cache.shutil.rmtree(root)
    monkeypatch.setattr(token_cache, "_write_note", fill)
    assert load_and_skip(data) == [first]
    assert "cannot be written" in capsys.readouterr().out
