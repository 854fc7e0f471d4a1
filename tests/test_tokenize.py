"""Records to token ids: ends, boundaries, chat templates, truncation, counts.

Most tests use a byte-level tokenizer made here, in which one character is one token
(but for one merge). Knows no rows and no models.
"""

import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dpojax.data.conversions import ConversionCounts
from dpojax.data.packing import Example
from dpojax.data.records import Record, read_records
from dpojax.data.tokenize import (
    Counts,
    Tokenizer,
    check_vocabulary,
    describe,
    encode_prompt,
    load_tokenizer,
    tokenize_records,
)
from dpojax.data.tokenizer_files import write_tokenizer

BOS, EOS = 0, 1
TURNS = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{END}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
SWAPPED = "{% for m in messages[:-1] %}{{ m['content'] }}{% endfor %}END"
REFUSING = "{{ raise_exception('Roles must\nalternate.') }}"


def make_tokenizer(
    post_processor: str = "<s> $A", template: str | None = None, **special: str | None
) -> PreTrainedTokenizerFast:
    """Bytes, and "ob" as one token; `post_processor` is what it adds to a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "</s>", *alphabet, "ob"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    raw = RawTokenizer(models.BPE(vocabulary, [("o", "b")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(
        single=post_processor, special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    names = {"bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, chat_template=template, **names
    )


BYTES = make_tokenizer()


def as_record(prompt: Any, *completions: Any) -> Record:
    return Record(prompt, completions, "data.jsonl, line 7")


def as_chat(user: str, *answers: str) -> Record:
    return as_record(
        [{"role": "user", "content": user}],
        *([{"role": "assistant", "content": answer}] for answer in answers),
    )


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def as_lists(example: Example) -> tuple[list[int], ...]:
    return example.prompt.tolist(), *(ids.tolist() for ids in example.completions)


def tokenized(
    tokenizer: Tokenizer, *records: Record, **settings: Any
) -> tuple[list[tuple[list[int], ...]], Counts]:
    examples, counts = tokenize_records(records, tokenizer, **settings)
    return [as_lists(example) for example in examples], counts


def one(tokenizer: Tokenizer, record: Record, **settings: Any) -> tuple[list[int], ...]:
    (lists,), _ = tokenized(tokenizer, record, **settings)
    return lists


def refusal(call: Any, *arguments: Any, **settings: Any) -> str:
    with pytest.raises(ValueError) as refused:
        call(*arguments, **settings)
    message = str(refused.value)
    assert message and "\n" not in message
    return message


ADDING = ["<s> $A", "$A", "<s> $A </s>", "$A </s>"]


@pytest.mark.parametrize("post_processor", ADDING)
@pytest.mark.parametrize("end", ["", "</s>", "</s></s>"])
def test_every_completion_ends_in_eos_exactly_once(post_processor: str, end: str):
    tokenizer = make_tokenizer(post_processor)
    _, chosen, rejected = one(tokenizer, as_record("p", f"good{end}", f"bad{end}"))
    assert chosen == [*ids(tokenizer, "good"), EOS]
    assert rejected == [*ids(tokenizer, "bad"), EOS]


@pytest.mark.parametrize("post_processor", ADDING)
def test_a_prompt_begins_with_bos_once_where_the_tokenizer_adds_one(
    post_processor: str,
):
    tokenizer = make_tokenizer(post_processor)
    added = [BOS] * post_processor.startswith("<s>")
    plain = one(tokenizer, as_record("abc", "x", "y"))[0]
    written = one(tokenizer, as_record("<s>abc", "x", "y"))[0]
    assert plain == [*added, *ids(tokenizer, "abc")]
    assert written == [BOS, *ids(tokenizer, "abc")]


def test_only_the_prompt_begins_with_bos():
    _, chosen, rejected = one(make_tokenizer(), as_record("abc", "x", "y"))
    assert BOS not in chosen + rejected


@pytest.mark.parametrize("post_processor", ADDING)
def test_an_empty_prompt_becomes_bos(post_processor: str):
    tokenizer = make_tokenizer(post_processor)
    assert one(tokenizer, as_record("", "x", "y"))[0] == [BOS]


def test_an_empty_prompt_becomes_eos_where_there_is_no_bos():
    tokenizer = make_tokenizer("$A", bos_token=None)
    assert one(tokenizer, as_record("", "x", "y"))[0] == [EOS]
    assert one(tokenizer, as_record("a", "x", "y"))[0] == ids(tokenizer, "a")


def test_prompt_and_completion_never_share_a_token():
    tokenizer = make_tokenizer()
    prompt, chosen, _ = one(tokenizer, as_record("foo", "bar", "x"))
    assert prompt == [BOS, *ids(tokenizer, "foo")]
    assert chosen == [*ids(tokenizer, "bar"), EOS]
    assert len(ids(tokenizer, "foobar")) == 5  # "ob" is one token there


@pytest.mark.parametrize("prompt", ["", "abc", "<s>abc"])
@pytest.mark.parametrize("post_processor", ADDING)
def test_a_prompt_to_be_continued_is_encoded_as_in_training(
    post_processor: str, prompt: str
):
    tokenizer = make_tokenizer(post_processor)
    trained = one(tokenizer, as_record(prompt, "x", "y"))[0]
    assert encode_prompt(prompt, tokenizer) == trained


@given(prompt=st.text(max_size=20), completion=st.text(min_size=1, max_size=20))
def test_any_text_is_kept_apart_and_ended_once(prompt: str, completion: str):
    start, chosen, _ = one(BYTES, as_record(prompt, completion, completion + "."))
    assert start == [BOS, *ids(BYTES, prompt)]
    assert chosen == [*ids(BYTES, completion), EOS]
    assert chosen.count(EOS) == 1
    assert BYTES.decode(start[1:]) == prompt
    assert BYTES.decode(chosen[:-1]) == completion
    assert BYTES.decode(start[1:] + chosen[:-1]) == prompt + completion


# -- Chat templates ----------------------------------------------------------------


@pytest.mark.parametrize("end", ["", "</s>", "</s>\n", "</s> \n\n"])
def test_a_chat_is_rendered_and_its_completion_ends_in_eos_once(end: str):
    """Trailing white space is never generated after EOS; a missing EOS is added."""
    tokenizer = make_tokenizer(template=TURNS.replace("{END}", end))
    prompt, chosen, rejected = one(tokenizer, as_chat("Hi", "yes", "no"))
    assert prompt == ids(tokenizer, f"[user]Hi{end}[assistant]")
    assert chosen == [*ids(tokenizer, "yes"), EOS]
    assert rejected == [*ids(tokenizer, "no"), EOS]


def test_a_chat_template_writes_its_own_bos_or_none():
    turns = TURNS.replace("{END}", "")
    for template, start in ((turns, []), ("{{ bos_token }}" + turns, [BOS])):
        tokenizer = make_tokenizer(template=template)
        record = as_chat("Hi", "yes", "no")
        prompt = one(tokenizer, record)[0]
        assert prompt == [*start, *ids(tokenizer, "[user]Hi[assistant]")]
        assert encode_prompt(record.prompt, tokenizer) == prompt


def test_strings_and_chats_may_stand_side_by_side():
    tokenizer = make_tokenizer(template=TURNS.replace("{END}", ""))
    records = as_record("abc", "x", "y"), as_chat("Hi", "yes", "no")
    lists, _ = tokenized(tokenizer, *records)
    assert lists == [one(tokenizer, record) for record in records]


def test_a_template_that_changes_the_prompt_under_a_completion_is_refused():
    tokenizer = make_tokenizer(template=SWAPPED)
    message = refusal(tokenize_records, [as_chat("Hi", "yes", "no")], tokenizer)
    assert message.startswith("data.jsonl, line 7: the chat template renders")


@pytest.mark.parametrize("template", [REFUSING, "{{ nothing.at.all }}", None])
def test_a_template_that_fails_is_refused_with_the_record(template: str | None):
    tokenizer = make_tokenizer(template=template)
    message = refusal(tokenize_records, [as_chat("Hi", "yes", "no")], tokenizer)
    assert message.startswith("data.jsonl, line 7: the tokenizer's chat template fails")


@pytest.mark.parametrize("turns", ["all", "assistant"])
def test_a_template_is_shown_the_tools(turns: Any):
    template = "{% for t in tools or [] %}<{{ t['name'] }}>{% endfor %}" + TURNS
    tokenizer = make_tokenizer(template=template.replace("{END}", "</s>"))
    record = as_chat("Hi", "yes", "no")._replace(tools=[{"name": "look"}])
    prompt, chosen, _ = one(tokenizer, record, turns=turns)
    assert prompt == ids(tokenizer, "<look>[user]Hi</s>[assistant]")
    assert chosen == ids(tokenizer, "yes</s>")


# -- Turns of several speakers -------------------------------------------------------

# The turns of a completion: a speaker's first letter and what is said.
ROLES = {"a": "assistant", "u": "user", "t": "tool"}
CHATML = TURNS.replace("{END}", "</s>\n")


def as_turns(*completions: str) -> Record:
    """A prompt and completions like ``"a:yes u:and? a:no"``."""
    messages = (
        [
            {"role": ROLES[turn[0]], "content": turn[2:]}
            for turn in completion.split(" ")
        ]
        for completion in completions
    )
    return as_record([{"role": "user", "content": "Hi"}], *messages)


def scored(tokenizer: Tokenizer, record: Record, **settings: Any) -> list[str]:
    """Each completion as text, in which what is not scored stands in brackets."""
    (example,), _ = tokenize_records([record], tokenizer, **settings)
    masks = example.masks or [np.full(len(c), True) for c in example.completions]
    texts = []
    for tokens, mask in zip(example.completions, masks, strict=True):
        assert mask.dtype == np.bool_ and mask.shape == tokens.shape
        spans = groupby(zip(tokens, mask, strict=True), key=lambda pair: bool(pair[1]))
        decoded = (
            (is_scored, str(tokenizer.decode([int(token) for token, _ in span])))
            for is_scored, span in spans
        )
        texts.append("".join(text if yes else f"({text})" for yes, text in decoded))
    return texts


@pytest.mark.parametrize("end", ["</s>", "</s>\n"])
def test_only_the_assistants_turns_are_scored_each_with_its_end(end: str):
    tokenizer = make_tokenizer(template=TURNS.replace("{END}", end))
    record = as_turns("a:yes u:and? a:so", "a:no")
    after = end.removeprefix("</s>")
    assert scored(tokenizer, record, turns="assistant") == [
        f"yes</s>({after}[user]and?{end}[assistant])so</s>",
        "no</s>",
    ]


def test_turns_without_an_end_of_their_own_are_ended_once_after_the_last():
    tokenizer = make_tokenizer(template=TURNS.replace("{END}", "\n"))
    record = as_turns("a:yes t:4 t:5 a:so", "a:no u:why? a:x")
    assert scored(tokenizer, record, turns="assistant") == [
        "yes\n([tool]4\n[tool]5\n[assistant])so\n</s>",
        "no\n([user]why?\n[assistant])x\n</s>",
    ]


def test_what_follows_the_assistants_last_turn_is_left_out():
    tokenizer = make_tokenizer(template=CHATML)
    record = as_turns("a:yes u:and?", "a:no")
    assert scored(tokenizer, record, turns="assistant") == ["yes</s>", "no</s>"]


def test_turns_of_the_assistant_one_after_another_are_all_scored():
    tokenizer = make_tokenizer(template=CHATML)
    record = as_turns("a:yes a:so", "a:no")
    assert scored(tokenizer, record, turns="assistant") == [
        "yes</s>(\n[assistant])so</s>",
        "no</s>",
    ]


def test_no_merge_crosses_the_border_of_what_is_scored():
    """ "ob" is one token, and would be "[o" and "b" here."""
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    record = as_turns("a:oo u:bo a:b", "a:no")
    assert scored(tokenizer, record, turns="assistant") == ["oo(bo)b</s>", "no</s>"]
    assert one(tokenizer, record)[1] == ids(tokenizer, "oobob</s>")


def test_one_turn_of_the_assistant_gives_the_same_example_either_way():
    tokenizer = make_tokenizer(template=CHATML)
    records = [as_chat("Hi", "yes", "no"), as_record("abc", "x", "y")]
    (chat, text), counts = tokenize_records(records, tokenizer, turns="assistant")
    assert [as_lists(chat), as_lists(text)] == tokenized(tokenizer, *records)[0]
    assert chat.masks is None and text.masks is None
    assert counts.examples == 2


def test_all_turns_are_scored_by_default():
    tokenizer = make_tokenizer(template=CHATML)
    (example,), _ = tokenize_records([as_turns("a:yes u:and? a:so", "a:no")], tokenizer)
    assert example.masks is None
    assert len(example.completions[0]) == len(
        ids(tokenizer, "yes</s>\n[user]and?</s>\n[assistant]so</s>")
    )


def test_a_completion_without_a_turn_of_the_assistant_is_dropped_and_counted():
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer = make_tokenizer(template=template)
    records = [
        as_turns("u:yes", "a:no"),
        as_turns("u:yes", "u:no"),
        as_turns("t:0123456789 a:yes", "a:no"),  # cut before the assistant's turn
        as_turns("a:yes", "a:no"),
    ]
    (example,), counts = tokenize_records(
        records, tokenizer, turns="assistant", max_length=10
    )
    assert as_lists(example) == one(tokenizer, records[-1])
    assert counts == Counts(4, 1, 0, 1, 0, 0, dropped_unscored=3)
    message = refusal(tokenize_records, records[:1], tokenizer, turns="assistant")
    assert "and of 1 nothing is scored" in message


def test_a_mask_is_cut_with_its_completion():
    tokenizer = make_tokenizer(template=TURNS.replace("{END}", ""))
    record = as_turns("a:yes t:4 a:so", "a:no")
    # The prompt keeps 12 of its tokens, so that 12 are left to the completion.
    assert scored(tokenizer, record, turns="assistant", max_length=24) == [
        "yes([tool]4[a)",
        "no</s>",
    ]


# A template that shortens all but the last turn, as those that drop old thoughts do.
FORGETFUL = (
    "{% for m in messages %}[{{ m['role'] }}]"
    "{{ m['content'] if loop.last or m['role'] == 'user' else '' }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_a_template_that_renders_earlier_turns_differently_is_refused():
    tokenizer = make_tokenizer(template=FORGETFUL)
    record = as_turns("a:yes u:and? a:so", "a:no")
    message = refusal(tokenize_records, [record], tokenizer, turns="assistant")
    assert message.startswith("data.jsonl, line 7: the chat template renders a turn")
    assert len(one(tokenizer, record)) == 3


@pytest.mark.parametrize("turns", ["all", "assistant"])
def test_a_completion_that_does_not_follow_the_prompt_is_refused(turns: Any):
    """The prompt ends where the assistant begins, and here a user goes on."""
    tokenizer = make_tokenizer(template=CHATML)
    record = as_turns("u:and? a:yes", "a:no")
    message = refusal(tokenize_records, [record], tokenizer, turns=turns)
    assert message.startswith("data.jsonl, line 7: the chat template renders the prom")


def test_the_turns_of_strings_cannot_be_told_apart():
    record = as_record("p", "x", "y")
    message = refusal(tokenize_records, [record], BYTES, turns="assistant")
    assert "no record is a chat" in message


# -- What was said of an example -----------------------------------------------------


def test_scores_and_weights_go_to_the_example():
    judged = Record("p", ("x",), "line 1", (1.0,), weight=0.5)
    ranked = Record("p", ("x", "", "x"), "line 2", (3.0, 1.0, 2.0))
    plain = Record("p", ("x", "y"), "line 3")
    examples, _ = tokenize_records([judged, ranked, plain], BYTES)
    assert [example.scores for example in examples] == [(1.0,), (3.0, 1.0, 2.0), None]
    assert [example.weight for example in examples] == [0.5, 1.0, 1.0]
    assert as_lists(examples[1])[2] == [EOS]  # a sample that ended at once


def test_a_ranking_is_dropped_only_if_all_its_completions_are_identical():
    ranked = Record("p", ("x", "x", "x"), "line 1", (3.0, 1.0, 2.0))
    partly = ranked._replace(completions=("x", "x", "y"))
    examples, counts = tokenize_records([ranked, partly], BYTES)
    assert (len(examples), counts.dropped_identical) == (1, 1)
    assert len(examples[0].completions) == 3


def test_counts_are_described_in_words():
    assert describe(ConversionCounts(5, 4, 1, 0, 0)).startswith(
        "5 read, 4 records, 1 dropped ties, "
    )
    assert describe(Counts(4, 1, 0, 1, 0, 0, 2)).endswith("2 dropped unscored")


# -- Too long, identical -----------------------------------------------------------

LETTERS = "ABCDEFGHIJKLMNOPQRST"


@pytest.mark.parametrize(
    ("prompt", "chosen", "kept_prompt", "kept_chosen", "counts"),
    [
        # Fits exactly: 1 + 4 and 6 + 1.
        ("abcd", "ABCDEF", "<s>abcd", "ABCDEF</s>", (0, 0)),
        # The longest completion takes 4 of 12; BOS and 7 of the prompt are left.
        ("abcdefghij", "ABC", "<s>defghij", "ABC</s>", (1, 0)),
        # One token too many.
        ("abcdefgh", "ABC", "<s>bcdefgh", "ABC</s>", (1, 0)),
        # The prompt keeps at least half of 12; the completion the other half.
        ("abcdefghij", LETTERS, "<s>fghij", "ABCDEF", (1, 1)),
        # A prompt shorter than half is whole, and leaves more to the completion.
        ("ab", LETTERS, "<s>ab", "ABCDEFGHI", (0, 1)),
        # Without its EOS the completion would fit; it is the EOS that is lost.
        ("ab", "ABCDEFGHI", "<s>ab", "ABCDEFGHI", (0, 1)),
    ],
)
def test_what_is_too_long_is_cut_by_the_rule(
    prompt: str, chosen: str, kept_prompt: str, kept_chosen: str, counts: tuple
):
    """At most 12 tokens; the prompt counts its BOS, a completion its EOS."""
    lists, counted = tokenized(BYTES, as_record(prompt, chosen, "xy"), max_length=12)
    kept = ids(BYTES, kept_prompt), ids(BYTES, kept_chosen), ids(BYTES, "xy</s>")
    assert lists == [kept]
    assert (counted.truncated_prompts, counted.truncated_completions) == counts
    assert (counted.records, counted.examples) == (1, 1)


def test_the_longest_completion_decides_and_every_one_that_is_cut_is_counted():
    record = as_record("ab", LETTERS, LETTERS[::-1])
    lists, counts = tokenized(BYTES, record, max_length=12)
    kept = "<s>ab", LETTERS[:9], LETTERS[::-1][:9]
    assert lists == [tuple(ids(BYTES, text) for text in kept)]
    assert counts.truncated_completions == 2


def test_a_prompt_without_bos_keeps_its_last_tokens_alone():
    tokenizer = make_tokenizer("$A")
    prompt = one(tokenizer, as_record("abcdefghij", "ABC", "x"), max_length=12)[0]
    assert prompt == ids(tokenizer, "cdefghij")


@given(
    prompt=st.text("ab", max_size=30),
    chosen=st.text("AB", min_size=1, max_size=30),
    rejected=st.text("XY", min_size=1, max_size=30),
    max_length=st.integers(4, 40),
)
def test_nothing_is_longer_than_allowed_or_cut_without_need(
    prompt: str, chosen: str, rejected: str, max_length: int
):
    record = as_record(prompt, chosen, rejected)
    whole = one(BYTES, record, max_length=1000)
    cut, *completions = one(BYTES, record, max_length=max_length)
    longest = max(map(len, completions))
    assert len(cut) + longest <= max_length
    assert cut[0] == BOS
    assert len(cut) == 1 or cut[1:] == whole[0][1 - len(cut) :]
    for short, long in zip(completions, whole[1:], strict=True):
        assert short == long[: len(short)]
        assert len(short) in (len(long), max_length - len(cut))
    if len(cut) < len(whole[0]):
        assert len(cut) >= max_length // 2
        assert len(cut) + longest == max_length


def test_what_is_too_long_can_be_dropped():
    records = [as_record("ab", "ABC", "x"), as_record("ab", LETTERS, "x")]
    lists, counts = tokenized(BYTES, *records, max_length=12, too_long="drop")
    assert lists == [one(BYTES, records[0])]
    assert counts == Counts(2, 1, 0, 0, dropped_too_long=1, dropped_identical=0)


def test_identical_completions_are_dropped_and_counted():
    records = [
        as_record("p", "same", "same"),
        as_record("p", "same", "same</s>"),
        as_record("p", LETTERS + "1", LETTERS + "2"),  # identical once cut
        as_record("p", "same", "other"),
    ]
    lists, counts = tokenized(BYTES, *records, max_length=12)
    assert lists == [one(BYTES, records[-1])]
    assert (counts.examples, counts.dropped_identical) == (1, 3)


def test_of_three_completions_two_may_be_identical():
    assert len(one(BYTES, as_record("p", "same", "same", "other"))) == 4


def test_a_single_completion_is_not_identical_to_anything():
    assert one(BYTES, as_record("p", "x")) == (ids(BYTES, "<s>p"), ids(BYTES, "x</s>"))


def test_nothing_left_is_refused_with_the_counts():
    records = [as_record("p", "same", "same"), as_record("p", LETTERS, "x")]
    settings = {"max_length": 8, "too_long": "drop"}
    message = refusal(tokenize_records, records, BYTES, **settings)
    assert "Of 2 records none is left: 1 exceed max_length 8 and 1 have" in message
    assert "Of 0 records none" in refusal(tokenize_records, [], BYTES)


def test_a_max_length_below_four_is_refused():
    record = as_record("p", "x", "y")
    assert "max_length is 3" in refusal(tokenize_records, [record], BYTES, max_length=3)


# -- Loading -----------------------------------------------------------------------


def test_a_vocabulary_must_fit_into_the_embedding():
    size = len(BYTES)
    check_vocabulary(BYTES, size, "models/small")
    message = refusal(check_vocabulary, BYTES, size - 1, "models/small")
    assert f"ids up to {size - 1}" in message and "models/small" in message


def test_added_tokens_count_as_vocabulary():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<extra>"])
    assert "ids up to" in refusal(check_vocabulary, tokenizer, len(BYTES), "small")


def test_a_saved_tokenizer_is_loaded_from_its_directory(tmp_path: Path):
    make_tokenizer().save_pretrained(tmp_path)
    record = as_record("abc", "x", "y")
    assert one(load_tokenizer(tmp_path), record) == one(BYTES, record)


def test_a_sentencepiece_model_is_handed_on_without_its_place(tmp_path: Path):
    """As a directory of Gemma's has it; twice, since a run's frame is read again."""
    make_tokenizer().save_pretrained(tmp_path / "hub")
    (tmp_path / "hub/tokenizer.model").write_bytes(b"pieces")
    config = tmp_path / "hub/tokenizer_config.json"
    named = {"vocab_file": str(tmp_path / "hub/tokenizer.model")}
    config.write_text(json.dumps(json.loads(config.read_text()) | named))
    write_tokenizer(load_tokenizer(tmp_path / "hub"), tmp_path / "frame")
    write_tokenizer(load_tokenizer(tmp_path / "frame"), tmp_path / "final")
    assert (tmp_path / "final/tokenizer.model").read_bytes() == b"pieces"
    for path in (tmp_path / "final").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path


def test_a_bare_file_is_loaded_with_the_eos_token_given(tmp_path: Path):
    path = tmp_path / "tokenizer.json"
    path.write_text(BYTES.backend_tokenizer.to_str(), encoding="utf-8")
    assert load_tokenizer(path, "</s>").eos_token_id == EOS
    assert "names no EOS token" in refusal(load_tokenizer, path)
    assert "has no token '<end>'" in refusal(load_tokenizer, path, "<end>")


def test_a_tokenizer_without_eos_is_refused(tmp_path: Path):
    make_tokenizer(eos_token=None).save_pretrained(tmp_path)
    message = refusal(load_tokenizer, tmp_path)
    assert f"The tokenizer {tmp_path} names no EOS token" in message
    assert load_tokenizer(tmp_path, "</s>").eos_token_id == EOS


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'["a"]'),
        ("vocabulary.json", b'{"a": 0}'),
        ("tokenizer.json.gz", b"{}"),
        ("tokenizer.json.gz", b"\x1f\x8b\x08\x00"),
        ("tokenizer.json", b"\xff\xff"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused(
    tmp_path: Path, name: str, content: bytes
):
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(load_tokenizer, path)
    assert message.startswith(f"No tokenizer can be read from {path}: ")


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path):
    message = refusal(load_tokenizer, tmp_path)
    assert message.startswith(f"No tokenizer can be read from {tmp_path}: ")


# -- Against recorded runs and real tokenizers --------------------------------------


@pytest.fixture(scope="module")
def gpt2(shared: Path) -> Tokenizer:
    return load_tokenizer(shared / "tokenizers" / "gpt2_encoder.json")


def test_gpt2_is_loaded_from_its_vocabulary_and_merges(gpt2: Tokenizer):
    assert len(gpt2) == 50257
    assert gpt2.eos_token == "<|endoftext|>"
    text = "Hello wörld, 你好 \N{GRINNING FACE}"
    assert gpt2.decode(ids(gpt2, text)) == text


@pytest.mark.parametrize(
    ("prompt", "completion"), [("The sky is ", "blue"), ("foo", "bar")]
)
def test_gpt2_does_not_merge_across_the_boundary(
    gpt2: Tokenizer, prompt: str, completion: str
):
    start, chosen, _ = one(gpt2, as_record(prompt, completion, "x"))
    assert start == ids(gpt2, prompt)
    assert chosen == [*ids(gpt2, completion), gpt2.eos_token_id]
    assert start + chosen[:-1] != ids(gpt2, prompt + completion)
    assert gpt2.decode(start + chosen[:-1]) == prompt + completion


def test_gpt2_begins_an_empty_prompt_with_the_end_of_text(gpt2: Tokenizer):
    assert one(gpt2, as_record("", "x", "y"))[0] == [gpt2.eos_token_id]


def test_a_compressed_tokenizer_file_is_loaded_with_its_eos_token(shared: Path):
    path = shared / "tokenizers" / "deepseek_tokenizer.json.gz"
    end = "<\uff5cend\u2581of\u2581sentence\uff5c>"
    tokenizer = load_tokenizer(path, end)
    _, chosen, _ = one(tokenizer, as_record("The sky is ", f"blue{end}", "red"))
    assert chosen == [*ids(tokenizer, "blue"), tokenizer.eos_token_id]
    assert tokenizer.decode(chosen) == f"blue{end}"
    assert "--eos-token" in refusal(load_tokenizer, path)


def recorded(shared: Path, run: str) -> list[tuple[list[int], ...]]:
    path = shared / "peers" / "trajectories" / f"{run}.json"
    examples = json.loads(path.read_text(encoding="utf-8"))["examples"]
    names: Sequence[str] = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [tuple(example[name] for name in names) for example in examples]


def tokenized_fixture(
    shared: Path, data: str, count: int
) -> tuple[Tokenizer, list[tuple[list[int], ...]]]:
    fixture = shared / "peers" / "fixture"
    records = read_records(str(fixture / data), split="train", test_size=0)
    tokenizer = load_tokenizer(fixture / "tokenizer")
    return tokenizer, tokenized(tokenizer, *records[:count])[0]


def test_the_tokens_are_those_of_trl_where_no_merge_crosses_the_boundary(shared: Path):
    """Every eighth prompt ends in a space, which TRL gives to the completion.

    It tokenises prompt and completion together and keeps their common beginning, so
    " Here" is one token there; here the prompt keeps its space. The text is the same.
    """
    expected = recorded(shared, "sigmoid")
    tokenizer, found = tokenized_fixture(shared, "prefs.jsonl", len(expected))
    differing = [row for row, other in enumerate(expected) if found[row] != other]
    assert differing == [7, 15, 23]
    for row in differing:
        (ours, *completions), (theirs, *others) = found[row], expected[row]
        assert ours == [*theirs, *ids(tokenizer, " ")]
        for completion, other in zip(completions, others, strict=True):
            assert tokenizer.decode(ours + completion) == tokenizer.decode(
                theirs + other
            )


def test_the_tokens_of_a_chat_are_those_of_trl_but_for_what_follows_eos(shared: Path):
    """TRL scores the newline that the template writes after EOS."""
    eos, newline = 2, 205
    expected = recorded(shared, "sigmoid_chat")
    assert all(ids[-2:] == [eos, newline] for row in expected for ids in row[1:])
    cut = [(row[0], *(ids[:-1] for ids in row[1:])) for row in expected]
    assert tokenized_fixture(shared, "chat.jsonl", len(cut))[1] == cut
