"""Readers of preference data: what is read, how it is cut and mixed, what is refused.

Knows the public functions of `dpojax.data.records` only.
"""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest

from dpojax.data.conversions import ConversionCounts
from dpojax.data.fields import Kind
from dpojax.data.records import Record, load_records, read_records, weigh

Rows = list[dict[str, Any]]

CHAT = {
    "prompt": [{"role": "user", "content": "Why?"}],
    "chosen": [{"role": "assistant", "content": "Because."}],
    "rejected": [{"role": "assistant", "content": "No."}],
}


@pytest.fixture(autouse=True)
def cache_in_the_temporary_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def pairs(count: int, start: int = 0) -> Rows:
    return [
        {"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"}
        for n in range(start, start + count)
    ]


def as_lines(rows: Rows) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_lines(path: Path, rows: Rows) -> str:
    path.write_text(as_lines(rows), encoding="utf-8")
    return str(path)


def write_gzip(path: Path, rows: Rows) -> None:
    path.write_bytes(gzip.compress(as_lines(rows).encode()))


def write_parquet(path: Path, rows: Rows) -> None:
    datasets.Dataset.from_list(rows).to_parquet(path)


def write_arrow(path: Path, rows: Rows) -> None:
    directory = path.with_suffix(".saved")
    datasets.Dataset.from_list(rows).save_to_disk(directory)
    next(directory.glob("*.arrow")).rename(path)


def write_directory(path: Path, rows: Rows) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path)


def read(source: str | Path, split: str = "train", **settings: Any) -> list[Record]:
    options: dict[str, Any] = {"test_size": 0} | settings
    return read_records(str(source), split=split, **options)


def prompts(records: list[Record]) -> list[Any]:
    return [record.prompt for record in records]


def refusal(source: str | Path, split: str = "train", **settings: Any) -> str:
    """The one sentence with which reading is refused."""
    with pytest.raises(ValueError) as refused:
        read(source, split, **settings)
    message = str(refused.value)
    assert message and "\n" not in message and ". " not in message
    return message


WRITERS = {
    "data.jsonl": write_lines,
    "data.json": write_lines,
    "data.jsonl.gz": write_gzip,
    "data.parquet": write_parquet,
    "data.json.parquet": write_parquet,
    "data.arrow": write_arrow,
    "saved": write_directory,
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("rows", [pairs(3), [CHAT] * 3], ids=["strings", "messages"])
def test_every_format_gives_the_same_records(tmp_path: Path, name: str, rows: Rows):
    writer: Callable[[Path, Rows], object] = WRITERS[name]
    writer(tmp_path / name, rows)
    records = read(tmp_path / name)
    assert [(r.prompt, *r.completions) for r in records] == [
        (row["prompt"], row["chosen"], row["rejected"]) for row in rows
    ]
    assert all(name in record.origin for record in records)


def test_an_origin_names_the_line_of_the_file_and_blank_lines_are_passed_over(
    tmp_path: Path,
):
    path = tmp_path / "data.jsonl"
    first, second = pairs(2)
    path.write_text(f"\n{json.dumps(first)}\n  \n{json.dumps(second)}\n")
    assert [r.origin for r in read(path)] == [f"{path}, line 2", f"{path}, line 4"]


def test_further_columns_are_allowed(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", [pairs(1)[0] | {"source": 3}])
    assert len(read(path)) == 1


def test_an_empty_prompt_is_allowed(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", [pairs(1)[0] | {"prompt": ""}])
    assert read(path)[0].prompt == ""


@pytest.mark.parametrize(
    ("test_size", "expected"), [(0.1, 10), (0.05, 5), (7, 7), (1, 1), (99, 99)]
)
def test_train_and_test_are_disjoint_and_cover_everything(
    tmp_path: Path, test_size: float, expected: int
):
    path = write_lines(tmp_path / "data.jsonl", pairs(100))
    train = prompts(read(path, "train", test_size=test_size))
    test = prompts(read(path, "test", test_size=test_size))
    assert len(test) == expected
    assert len(train) == 100 - expected
    assert sorted(train + test) == sorted(row["prompt"] for row in pairs(100))


def test_the_cut_is_the_same_every_time_and_in_any_order_of_calls(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", pairs(50))
    first = read(path, "train", test_size=10), read(path, "test", test_size=10)
    second = read(path, "test", test_size=10), read(path, "train", test_size=10)
    assert first == second[::-1]


def test_the_cut_keeps_the_order_of_the_data_and_is_not_its_end(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", pairs(50))
    places = [int(str(p)[1:]) for p in prompts(read(path, "test", test_size=10))]
    assert places == sorted(places)
    assert places not in (list(range(10)), list(range(40, 50)))


def test_max_examples_keeps_a_subset_and_cuts_it(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", pairs(100))
    train = prompts(read(path, "train", test_size=0.25, max_examples=20))
    test = prompts(read(path, "test", test_size=0.25, max_examples=20))
    assert (len(train), len(test)) == (15, 5)
    assert len({*train, *test}) == 20
    assert {*train, *test} <= {row["prompt"] for row in pairs(100)}
    assert len(read(path, max_examples=1000)) == 100


def save_splits(path: Path, **splits: Rows) -> Path:
    parts = {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    datasets.DatasetDict(**parts).save_to_disk(path)
    return path


def test_splits_that_the_data_has_are_taken_whole(tmp_path: Path):
    path = save_splits(tmp_path / "saved", train=pairs(6), test=pairs(4, start=6))
    assert prompts(read(path, "train", test_size=2)) == [f"p{n}" for n in range(6)]
    assert prompts(read(path, "test", test_size=2)) == [f"p{n}" for n in range(6, 10)]


def test_a_lone_train_split_is_cut_so_that_nothing_is_trained_and_tested_on(
    tmp_path: Path,
):
    path = save_splits(tmp_path / "saved", train=pairs(20))
    train = prompts(read(path, "train", test_size=5))
    test = prompts(read(path, "test", test_size=5))
    assert (len(train), len(test)) == (15, 5)
    assert len({*train, *test}) == 20


def test_a_split_that_is_not_there_is_refused_with_those_that_are(tmp_path: Path):
    path = save_splits(tmp_path / "saved", train=pairs(2), validation=pairs(2))
    message = refusal(path, "test")
    assert "'test'" in message and "train, validation" in message


def test_only_train_and_test_are_cut_off(tmp_path: Path):
    message = refusal(write_lines(tmp_path / "data.jsonl", pairs(2)), "validation")
    assert "'validation'" in message and "'train' and 'test'" in message


@pytest.mark.parametrize(
    "name", ["none.jsonl", "none.json", "none.jsonl.gz", "none.parquet", "none.arrow"]
)
def test_a_file_that_does_not_exist_is_refused(tmp_path: Path, name: str):
    message = refusal(tmp_path / name)
    assert message == f"There is no file or directory {tmp_path / name}."


def test_a_name_that_is_neither_here_nor_on_the_hub_is_refused():
    message = refusal("no-such-user/no-such-data")
    assert "There is no file 'no-such-user/no-such-data'" in message
    assert "hub" in message


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"prompt": "p", ', "not JSON"),
        ("prompt,chosen", "not JSON"),
        ('["p", "c", "r"]', "not a JSON object"),
        ("3", "not a JSON object"),
        ('{"prompt": "\\ud83d", "chosen": "c", "rejected": "r"}', "not text"),
    ],
)
def test_a_bad_line_is_refused_with_its_file_and_number(
    tmp_path: Path, line: str, reason: str
):
    path = tmp_path / "data.jsonl"
    path.write_text(f"{as_lines(pairs(2))}\n{line}\n")
    message = refusal(path)
    assert message.startswith(f"{path}, line 4 is {reason}")


def test_an_emoji_written_as_a_surrogate_pair_is_text(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"prompt": "\\ud83d\\ude00", "chosen": "c", "rejected": "r"}\n')
    assert read(path)[0].prompt == "\N{GRINNING FACE}"


def test_a_misspelt_column_is_refused_with_those_there_are_and_the_nearest(
    tmp_path: Path,
):
    rows = [*pairs(1), {"prompt": "p", "chosen": "c", "rejectd": "r"}]
    path = write_lines(tmp_path / "data.jsonl", rows)
    assert refusal(path) == (
        f"{path}, line 2 has no 'rejected'; it has prompt, chosen, rejectd "
        "(is 'rejectd' meant?)."
    )


def test_a_missing_column_without_a_near_one_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", [{"xyz": 1}])
    assert refusal(path) == f"{path}, line 1 has no 'prompt'; it has xyz."
    path = write_lines(tmp_path / "data.jsonl", [{"prompt": "p", "completions": "x"}])
    assert refusal(path) == (
        f"{path}, line 1 has no 'scores'; it has prompt, completions, and the nearest "
        "format, scored completions, needs prompt, completions, scores."
    )


@pytest.mark.parametrize("empty", ["", " \n"])
@pytest.mark.parametrize("column", ["chosen", "rejected"])
def test_an_empty_completion_is_refused_with_its_line_and_column(
    tmp_path: Path, column: str, empty: str
):
    rows = [*pairs(2), pairs(1)[0] | {column: empty}]
    path = write_lines(tmp_path / "data.jsonl", rows)
    assert refusal(path).startswith(f"{path}, line 3: {column} is empty")


def test_a_completion_without_messages_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", [CHAT | {"rejected": []}])
    assert refusal(path).startswith(f"{path}, line 1: rejected is empty")


def test_strings_mixed_with_messages_are_refused(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", [CHAT | {"prompt": "Why?"}])
    assert refusal(path).startswith(f"{path}, line 1 mixes strings and chat messages")


@pytest.mark.parametrize(
    "value", [None, 3, {"role": "user"}, ["text"], [{"text": "x"}]]
)
def test_what_is_neither_a_string_nor_messages_is_refused(tmp_path: Path, value: Any):
    path = write_lines(tmp_path / "data.jsonl", [pairs(1)[0] | {"chosen": value}])
    assert refusal(path).startswith(f"{path}, line 1: chosen is neither a string nor")


def test_a_gzip_file_that_is_cut_short_is_refused_with_the_line_reached(tmp_path: Path):
    path = tmp_path / "data.jsonl.gz"
    write_gzip(path, pairs(5000))
    path.write_bytes(path.read_bytes()[:-2000])
    assert refusal(path).startswith(f"{path} cannot be read after line ")


def test_a_file_that_only_claims_to_be_gzip_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl.gz", pairs(2))
    assert refusal(path).startswith(f"{path} cannot be read after line 0: Not a gzip")


def test_a_file_that_is_not_utf_8_is_refused(tmp_path: Path):
    path = tmp_path / "data.jsonl"
    path.write_bytes('{"prompt": "café"}\n'.encode("latin-1"))
    assert "utf-8" in refusal(path)


@pytest.mark.parametrize("name", ["data.parquet", "data.arrow"])
def test_a_damaged_binary_file_is_refused(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"this is no table at all")
    assert refusal(tmp_path / name).startswith(f"{tmp_path / name} cannot be read: ")


def test_a_directory_that_is_not_a_saved_data_set_is_refused(tmp_path: Path):
    assert refusal(tmp_path).startswith(f"{tmp_path} cannot be read: ")


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl.zip", "data"])
def test_a_file_of_another_kind_is_refused_with_the_kinds_that_are_read(
    tmp_path: Path, name: str
):
    (tmp_path / name).write_text("prompt,chosen,rejected\n")
    message = refusal(tmp_path / name)
    assert str(tmp_path / name) in message and ".parquet" in message


@pytest.mark.parametrize("text", ["", "\n\n"])
def test_an_empty_file_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    assert refusal(path).startswith(f"{path} has no examples in its split 'train'")


def test_a_cut_that_leaves_nothing_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", pairs(3))
    assert "no examples in its split 'test'" in refusal(path, "test", test_size=0)
    assert "no examples in its split 'train'" in refusal(path, "train", test_size=3)


def test_a_negative_test_size_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", pairs(3))
    assert "test_size is -1" in refusal(path, test_size=-1)


# -- Columns, mixtures and kinds -----------------------------------------------------


def test_columns_of_other_names_are_read_by_a_mapping(tmp_path: Path):
    rows = [{"question": "q", "good": "c", "bad": "r"}]
    path = write_lines(tmp_path / "data.jsonl", rows)
    names = {"prompt": "question", "chosen": "good", "rejected": "bad"}
    (record,) = read(path, columns=names)
    assert (record.prompt, record.completions) == ("q", ("c", "r"))
    message = refusal(path, columns=names | {"margin": "gap"})
    assert message == f"{path}, line 1 has no 'gap'; it has question, good, bad."
    message = refusal(path, columns={"question_text": "question"})
    assert message.startswith("No format has a column 'question_text'")


def test_records_of_several_kinds_may_stand_in_one_file(tmp_path: Path):
    rows: Rows = [
        {"prompt": "p", "completion": "x"},
        {"prompt": "p", "completion": "x", "label": False},
        {"prompt": "p", "completion": "z", "label": True},
        {"prompt": "p", "chosen": "y", "rejected": "z"},
        {"prompt": "p", "completions": ["a", "b", "c"], "scores": [1, 3, 2]},
    ]
    path = write_lines(tmp_path / "data.jsonl", rows)
    kinds = ["single", "judged", "judged", "pair", "ranked"]
    assert [record.kind for record in read(path)] == kinds
    records, counts = load(path, kind="single")
    assert [record.completions for record in records] == [
        ("x",),
        ("z",),
        ("y",),
        ("b",),
    ]
    assert counts == ConversionCounts(5, 4, 0, 1, 0)


def test_what_parquet_keeps_of_a_chat_with_tools_is_what_was_written(tmp_path: Path):
    tools = [
        {"name": "look", "parameters": {"at": {"type": "string"}}},
        {"name": "wait", "parameters": {"for": {"type": "number"}}},
    ]
    path = tmp_path / "data.parquet"
    write_parquet(path, [CHAT | {"tools": tools}])
    assert read(path)[0].tools == tools


def load(
    *sources: str, kind: Kind = "pair", **settings: Any
) -> tuple[list[Record], ConversionCounts]:
    options = {"split": "train", "test_size": 0} | settings
    return load_records(sources, kind=kind, **options)


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (1, {1: 10}),
        (0.3, {1: 3}),
        (2, {2: 10}),
        (2.5, {2: 5, 3: 5}),
        (1.25, {1: 8, 2: 2}),
    ],
)
def test_a_weight_repeats_every_record_and_a_share_of_them_once_more(
    tmp_path: Path, weight: float, expected: dict[int, int]
):
    records = read(write_lines(tmp_path / "data.jsonl", pairs(10)))
    weighed = weigh(records, weight)
    assert weighed == weigh(records, weight)
    times = Counter(record.origin for record in weighed)
    assert Counter(times.values()) == expected


def test_the_share_that_a_weight_keeps_is_chosen_at_random_and_in_order(tmp_path: Path):
    records = read(write_lines(tmp_path / "data.jsonl", pairs(50)))
    places = [int(str(prompt)[1:]) for prompt in prompts(weigh(records, 0.2))]
    assert places == sorted(places)
    assert places not in (list(range(10)), list(range(40, 50)))


def test_data_sets_are_mixed_by_their_weights_and_origins_stay(tmp_path: Path):
    first = write_lines(tmp_path / "first.jsonl", pairs(10))
    second = write_lines(tmp_path / "second.jsonl", pairs(4, start=10))
    records, counts = load(first, second, weights=[0.5, 2])
    assert [record.origin.split(",")[0] for record in records] == (
        [first] * 5 + [second] * 8
    )
    assert counts == ConversionCounts(13, 13, 0, 0, 0)
    assert prompts(load(first, second)[0]) == [f"p{n}" for n in range(14)]


def test_each_data_set_of_a_mixture_is_cut_alone(tmp_path: Path):
    first = write_lines(tmp_path / "first.jsonl", pairs(20))
    second = write_lines(tmp_path / "second.jsonl", pairs(20, start=20))
    settings: Any = {"test_size": 5, "max_examples": 15}
    train, test = (
        prompts(load(first, second, split=split, **settings)[0])
        for split in ("train", "test")
    )
    assert (len(train), len(test), len({*train, *test})) == (20, 10, 30)


def test_rankings_and_pairs_mix_as_pairs(tmp_path: Path):
    ranked = [{"prompt": "q", "completions": ["a", "b", "c"], "scores": [1, 3, 2]}]
    first = write_lines(tmp_path / "first.jsonl", ranked)
    second = write_lines(tmp_path / "second.jsonl", pairs(1))
    records, _ = load(first, second, pairs_from="all")
    assert [record.prompt for record in records] == ["q"] * 3 + ["p0"]
    assert all(record.kind == "pair" for record in records)
    settings: Any = {"pairs_from": "rso", "beta": 1e-9, "num_accepted": 2}
    completions = load(first, second, **settings)[0][0].completions
    assert completions == ("b", "c")


def test_a_mixture_of_kinds_that_do_not_fit_is_refused(tmp_path: Path):
    first = write_lines(tmp_path / "first.jsonl", pairs(1))
    labelled = [{"prompt": "p", "completion": "c", "label": True}]
    second = write_lines(tmp_path / "second.jsonl", labelled)
    assert [r.kind for r in load(first, second, kind="judged")[0]] == ["judged"] * 3
    with pytest.raises(ValueError, match="line 1 is 'judged' and 'pair' is needed"):
        load(first, second)


@pytest.mark.parametrize("weight", [0, -1, float("inf"), float("nan")])
def test_a_weight_that_is_not_positive_is_refused(tmp_path: Path, weight: float):
    path = write_lines(tmp_path / "data.jsonl", pairs(3))
    with pytest.raises(ValueError, match=f"weight is {weight}; it must be positive"):
        load(path, weights=[weight])


def test_a_weight_that_leaves_nothing_is_refused(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", pairs(3))
    with pytest.raises(ValueError, match="A weight of 0.1 leaves none of 3 records"):
        load(path, weights=[0.1])


def test_as_many_weights_as_data_sets_are_needed(tmp_path: Path):
    path = write_lines(tmp_path / "data.jsonl", pairs(3))
    with pytest.raises(ValueError, match="2 data sets came with 1 weights"):
        load(path, path, weights=[1])
    with pytest.raises(ValueError, match="0 data sets came with 0 weights"):
        load()
