"""IFEval's 25 kinds of instruction as rules over text: was it followed?

Each rule is a function of the response and of the instruction's settings, named as in
the prompts' file (Zhou et al. 2023, arXiv:2311.07911), and decides as the authors' code
does, but for two: sentences and words are split by the regular expressions here rather
than by NLTK's models. The rules for languages need langdetect. This file knows neither
prompts nor policies.
"""

import json
import re
from collections.abc import Callable
from importlib import import_module

ANSWERS = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
# The end of a sentence: not after a title, an initial or a number's dot.
_SENTENCE_END = re.compile(
    r"(?<!\bMr\.)(?<!\bMrs\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\b[A-Z]\.)"
    r"(?<=[.!?])[\"')\]]*\s+|\n{2,}"
)


def compare(count: int, relation: str, wanted: int) -> bool:
    """Whether a count is as many as are wanted: ``at least`` or ``less than``."""
    if relation not in ("at least", "less than"):
        raise ValueError(
            f"The relation is {relation!r}; it must be 'at least' or 'less than'."
        )
    return count >= wanted if relation == "at least" else count < wanted


def existence(text: str, *, keywords: list[str]) -> bool:
    """All keywords, as expressions, in any case."""
    return all(re.search(word, text, re.IGNORECASE) for word in keywords)


def keyword_frequency(
    text: str, *, keyword: str, frequency: int, relation: str
) -> bool:
    """A keyword so often, within words too."""
    found = re.findall(keyword, text, re.IGNORECASE)
    return compare(len(found), relation, frequency)


def forbidden_words(text: str, *, forbidden_words: list[str]) -> bool:
    """None of the words, as whole words."""
    return not any(
        re.search(rf"\b{word}\b", text, re.IGNORECASE) for word in forbidden_words
    )


def letter_frequency(
    text: str, *, letter: str, let_frequency: int, let_relation: str
) -> bool:
    """A letter so often, in any case."""
    return compare(text.lower().count(letter.lower()), let_relation, let_frequency)


def response_language(text: str, *, language: str) -> bool:
    """Written in the language of this code; text that has none passes."""
    return _is_language(text, language)


def number_sentences(text: str, *, num_sentences: int, relation: str) -> bool:
    """So many sentences."""
    sentences = [part for part in _SENTENCE_END.split(text) if part.strip()]
    return compare(len(sentences), relation, num_sentences)


def number_paragraphs(text: str, *, num_paragraphs: int) -> bool:
    """So many paragraphs divided by ``***``, none inside empty."""
    return _num_parts(re.split(r"\s?\*\*\*\s?", text)) == num_paragraphs


def number_words(text: str, *, num_words: int, relation: str) -> bool:
    """So many words, which are runs of letters, digits and underscores."""
    return compare(len(re.findall(r"\w+", text)), relation, num_words)


def nth_paragraph_first_word(
    text: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str
) -> bool:
    """So many paragraphs divided by blank lines, and the first word of one."""
    paragraphs = text.split("\n\n")
    number = sum(bool(part.strip()) for part in paragraphs)
    if nth_paragraph > number:
        return False
    words = paragraphs[nth_paragraph - 1].split()
    if not words:
        return False
    begins = re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'))[0]
    return number == num_paragraphs and begins.lower() == first_word.lower()


def number_placeholders(text: str, *, num_placeholders: int) -> bool:
    """At least so many ``[placeholders]``."""
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, *, postscript_marker: str) -> bool:
    """A postscript that begins with the marker."""
    known = {"P.P.S": r"\s*p\.\s?p\.\s?s.*$", "P.S.": r"\s*p\.\s?s\..*$"}
    other = r"\s*" + postscript_marker.lower() + r".*$"
    pattern = known.get(postscript_marker, other)
    return re.search(pattern, text.lower(), re.MULTILINE) is not None


def number_bullet_lists(text: str, *, num_bullets: int) -> bool:
    """Exactly so many lines that begin with a star or a dash."""
    stars = re.findall(r"^\s*\*[^\*].*$", text, re.MULTILINE)
    dashes = re.findall(r"^\s*-.*$", text, re.MULTILINE)
    return len(stars) + len(dashes) == num_bullets


def constrained_response(text: str) -> bool:
    """One of the three answers."""
    return any(answer in text for answer in ANSWERS)


def number_highlighted_sections(text: str, *, num_highlights: int) -> bool:
    """At least so many highlights in ``*stars*`` or ``**two**``, none empty."""
    single = re.findall(r"\*[^\n\*]*\*", text)
    double = re.findall(r"\*\*[^\n\*]*\*\*", text)
    filled = sum(bool(found.strip("*").strip()) for found in (*single, *double))
    return filled >= num_highlights


def multiple_sections(text: str, *, section_spliter: str, num_sections: int) -> bool:
    """At least so many sections, each beginning with the word and a number."""
    parts = re.split(r"\s?" + section_spliter + r"\s?\d+\s?", text)
    return len(parts) - 1 >= num_sections


def json_format(text: str) -> bool:
    """JSON, which may be fenced."""
    bare = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(bare)
    except ValueError:
        return False
    return True


def title(text: str) -> bool:
    """A ``<<title>>``, not an empty one."""
    found = re.findall(r"<<[^\n]+>>", text)
    return any(name.lstrip("<").rstrip(">").strip() for name in found)


def two_responses(text: str) -> bool:
    """Two different answers divided by ``******``."""
    parts = text.split("******")
    if _num_parts(parts) != 2:
        return False
    one, other = (part.strip() for part in parts if part.strip())
    return one != other


def repeat_prompt(text: str, *, prompt_to_repeat: str) -> bool:
    """The request, word for word, before the answer."""
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def end_checker(text: str, *, end_phrase: str) -> bool:
    """The phrase, and nothing after it."""
    ending = text.strip().strip('"').lower()
    return ending.endswith(end_phrase.strip().lower())


def capital_word_frequency(
    text: str, *, capital_frequency: int, capital_relation: str
) -> bool:
    """So many words in capitals alone."""
    words = re.findall(r"\w+(?:[-.]\w+)*", text)
    capitals = sum(word.isupper() for word in words)
    return compare(capitals, capital_relation, capital_frequency)


def english_capital(text: str) -> bool:
    """English in capitals alone."""
    return text.isupper() and _is_language(text, "en")


def english_lowercase(text: str) -> bool:
    """English without capitals."""
    return text.islower() and _is_language(text, "en")


def no_comma(text: str) -> bool:
    """No comma anywhere."""
    return "," not in text


def quotation(text: str) -> bool:
    """All of it in double quotation marks."""
    bare = text.strip()
    return len(bare) > 1 and bare[0] == bare[-1] == '"'


RULES: dict[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}


def variants(text: str) -> list[str]:
    """What the loose accuracy forgives: a first or last line, and stars."""
    lines = text.split("\n")
    cut = (lines, lines[1:], lines[:-1], lines[1:-1])
    plain = ["\n".join(some).strip() for some in cut]
    return [text, *plain[1:], *(some.replace("*", "") for some in (text, *plain[1:]))]


def _num_parts(parts: list[str]) -> int | None:
    """How many parts are filled; None: one between others is empty."""
    if any(not part.strip() for part in parts[1:-1]):
        return None
    return sum(bool(part.strip()) for part in parts)


def _is_language(text: str, code: str) -> bool:
    langdetect = import_module("langdetect")
    langdetect.DetectorFactory.seed = 0  # it draws at random otherwise
    try:
        return langdetect.detect(text) == code
    except langdetect.LangDetectException:  # there is nothing to tell it by
        return True
