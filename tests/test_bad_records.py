"""Records that cannot be used: the first one stops, or all are left out and listed."""

import json
from pathlib import Path
from typing import Any

import pytest
from test_tokenize import TURNS, make_tokenizer

from dpojax.config import TrainConfig
from dpojax.data.bad_records import BadRecords, Skipped, describe_skipped, usable
from dpojax.data.fields import Kind
from dpojax.data.records import Record, load_records, read_records, select_records
from dpojax.data.tokenize import tokenize_records
from dpojax.examples import load_split
from dpojax.prepare import make_configured_loss
from dpojax.run_directory import write_skipped

CHAT = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}
# What a line of the file is, and the reason for which it is left out.
BAD: dict[str, tuple[str | bytes, str]] = {
    "cut short": ('{"prompt": "p", ', "is not JSON: Expecting property name"),
    "a list": ('["p", "c", "r"]', "is not a JSON object"),
    "no UTF-8": (b'{"prompt": "caf\xe9"}', "is not text in utf-8."),
    "half a character": ('{"prompt": "\\ud800"}', "is not text: 'utf-8'"),
    "a NUL": ('{"prompt": "\0"}', "is not JSON: Invalid control character"),
    "deep": ("[" * 200_000, "is nested too deeply"),
    "a long number": ('{"prompt": ' + "1" * 5000 + "}", "number of too many digits"),
    "no completions": ('{"prompt": "p"}', "has no"),
    "an empty one": ('{"prompt": "p", "chosen": "", "rejected": "r"}', "is empty"),
    "of another kind": ('{"prompt": "p", "completion": "c"}', "'pair' is needed"),
}


def good(number: int) -> str:
    return json.dumps({"prompt": f"p{number}", "chosen": "c", "rejected": "r"})


def write(path: Path, *lines: str | bytes) -> str:
    encoded = [line.encode() if isinstance(line, str) else line for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return str(path)


def load(
    *sources: str, bad: BadRecords | None = None, kind: Kind = "pair", **settings: Any
) -> list[Record]:
    options: dict[str, Any] = {"split": "train", "test_size": 0} | settings
    return load_records(sources, kind=kind, bad=bad, **options)[0]


@pytest.mark.parametrize("case", BAD)
def test_a_bad_record_stops_or_is_left_out_with_its_line_and_reason(
    tmp_path: Path, case: str
):
    line, reason = BAD[case]
    path = write(tmp_path / "data.jsonl", good(1), line, good(3))
    with pytest.raises(ValueError) as refused:
        load(path)
    bad = BadRecords()
    records = load(path, bad=bad)
    assert [record.origin for record in records] == [
        f"{path}, line 1",
        f"{path}, line 3",
    ]
    skipped = bad.of_split("train")
    assert skipped == Skipped("train", (str(refused.value),), 3)
    assert skipped.reasons[0].startswith(f"{path}, line 2") and reason in str(skipped)
    assert len(skipped.reasons[0]) < 500


def test_if_every_record_is_bad_they_are_refused(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", "{", "[]", '{"prompt": 3}')
    with pytest.raises(ValueError, match=f"Every record is bad.*{path}, line 1 is not"):
        load(path, bad=BadRecords())


def test_the_others_and_their_splits_do_not_depend_on_what_is_left_out(tmp_path: Path):
    lines = [good(number) for number in range(20)]
    spoilt = [*lines[:4], "{", *lines[5:11], '{"prompt": ""}', *lines[12:]]
    whole = write(tmp_path / "whole.jsonl", *lines)
    partly = write(tmp_path / "partly.jsonl", *spoilt)
    found, reasons = [], []
    for split in ("train", "test"):
        bad = BadRecords()
        settings: Any = {"split": split, "test_size": 0.5, "max_examples": 16}
        after = load(partly, bad=bad, **settings)
        before = load(whole, **settings)
        kept = [record.prompt for record in after]
        assert kept == [r.prompt for r in before if r.prompt not in ("p4", "p11")]
        assert bad.of_split(split).num_records == 8
        found += kept
        reasons += bad.of_split(split).reasons
    assert len(found) + len(reasons) == 16 and len({*found, *reasons}) == 16


def test_a_record_that_is_repeated_is_listed_once(tmp_path: Path):
    lines = [good(1), '{"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1}']
    path = write(tmp_path / "data.jsonl", *lines)
    bad = BadRecords()
    records = load(path, bad=bad, weights=[3], needs_scores=True)
    assert len(records) == 3
    (reason,) = bad.of_split("train").reasons
    assert reason.startswith(f"{path}, line 1 is a pair without scores")


def test_of_records_that_stand_once_more_all_may_be_bad(tmp_path: Path):
    lines = [good(number) for number in range(8)]
    path = write(tmp_path / "data.jsonl", *lines)
    prompts = [record.prompt for record in load(path, weights=[1.25])]
    more = [int(str(prompt)[1:]) for prompt in prompts[8:]]
    spoilt = ["{" if number in more else line for number, line in enumerate(lines)]
    write(Path(path), *spoilt)
    bad = BadRecords()
    records = load(path, bad=bad, weights=[1.25])
    assert len(more) == 2 == len(bad.of_split("train").reasons)
    assert [r.prompt for r in records] == [
        p for p in prompts[:8] if p not in prompts[8:]
    ]
    assert bad.of_split("train").num_records == 8


def test_bad_records_are_noted_when_they_come_by(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", good(1), "{", good(3), "[]")
    bad = BadRecords()
    (selection,) = select_records([path], split="train", test_size=0, bad=bad)
    noted = [(one.prompt, len(bad.of_split("train").reasons)) for one in selection]
    assert noted == [("p1", 0), ("p3", 1)]
    assert len(bad.of_split("train").reasons) == 2


def test_no_item_is_taken_before_its_turn():
    items = iter(range(3))
    assert next(usable(str, items, BadRecords())) == "0"
    assert list(items) == [1, 2]


def test_a_wrong_setting_is_no_bad_record(tmp_path: Path):
    path = write(tmp_path / "data.jsonl", good(1))
    with pytest.raises(ValueError, match="No format has a column 'promt'"):
        read_records(path, split="train", columns={"promt": "prompt"}, bad=BadRecords())


def test_a_record_whose_template_fails_is_left_out(tmp_path: Path):
    refuses = "{{ raise_exception('No.') if messages[0].content == 'Hm' else '' }}"
    tokenizer = make_tokenizer("$A", refuses + TURNS.replace("{END}", "</s>"))
    other = CHAT | {"prompt": [{"role": "user", "content": "Hm"}]}
    lines = [json.dumps(row) for row in (CHAT, other, CHAT)]
    path = write(tmp_path / "data.jsonl", *lines)
    bad = BadRecords()
    examples, counts = tokenize_records(load(path), tokenizer, bad=bad)
    assert len(examples) == 2 == counts.records
    (reason,) = bad.of_split("train").reasons
    assert reason == f"{path}, line 2: the tokenizer's chat template fails: No."


def test_a_run_says_how_many_it_skips_and_lists_them_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    lines = [good(number) if number % 3 else "{" for number in range(30)]
    path = write(tmp_path / "data.jsonl", *lines)
    config = TrainConfig(data=(path,), on_bad_record="skip", test_size=10)
    loss = make_configured_loss(config.loss)
    skipped: list[Skipped] = []
    examples = [
        load_split(config, loss, make_tokenizer(), split, skipped)
        for split in ("train", "test")
    ]
    assert sum(map(len, examples)) == 20
    printed = capsys.readouterr().out
    train, test = skipped
    assert f"train: skipped {len(train.reasons)} bad of 20 records: {path}" in printed
    assert f"test: skipped {len(test.reasons)} bad of 10 records: {path}" in printed
    write_skipped(tmp_path, skipped)
    text = (tmp_path / "skipped.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert len(rows) == 10 == len({row["reason"] for row in rows})
    assert {row["split"] for row in rows} == {"train", "test"}


def test_only_the_first_few_are_said():
    reasons = tuple(f"line {number}." for number in range(5))
    said = describe_skipped(Skipped("train", reasons, 9))
    assert said == "train: skipped 5 bad of 9 records: line 0. line 1. line 2. ..."
