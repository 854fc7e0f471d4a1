"""Reviews of mixed sentiment with an exact reward: the embedded default data.

The controlled-sentiment task of the DPO paper in miniature. A seeded grammar writes
short reviews, a reward that is known exactly scores any text, and sampled completions
become preference pairs. Knows nothing of models, batches or training; the samples to
label come from the caller.

References:
  Rafailov et al. 2023, Direct Preference Optimization, section 6 (IMDb sentiment).
"""

import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

REWARD_RANGE = (-1.0, 1.0)

# "key: a b" lists words and "key = text / text" phrases. The first block is common to
# all reviews, each later one is a domain. A slot is filled from the key of its name, or
# from "good name" or "bad name" as the mood has it. Opinions stand only under keys that
# start with "praise" or "blame", so every other phrase scores exactly nothing.
GRAMMAR = """
praise: good great lovely charming clever impressive memorable delightful pleasant
praise: wonderful beautiful excellent brilliant enjoyable superb pleasing
blame: bad poor dull boring awful terrible disappointing forgettable tedious weak
blame: mediocre dreadful unpleasant clumsy annoying tiresome
praise person: talented friendly gifted inspiring thoughtful patient polite
blame person: careless rude arrogant lazy clueless incompetent moody
praise past: enjoyed loved admired
blame past: hated disliked regretted
praise base: enjoy love admire
blame base: hate dislike regret
praise advice: recommend
negator: not never
intensifier: very really quite rather truly
intensifier negated: very really
good opinion = {praise} / {praise topic} / {intensifier} {praise}
good opinion = {intensifier} {praise topic} / {negator} {blame topic}
bad opinion = {blame} / {blame topic} / {intensifier} {blame}
bad opinion = {intensifier} {blame topic} / {negator} {praise topic}
bad opinion = {negator} {intensifier negated} {praise}
good epithet = {praise} / {praise topic}
bad epithet = {blame} / {blame topic}
good character = {praise person} / {intensifier} {praise person} / not {blame person}
bad character = {blame person} / {intensifier} {blame person} / not {praise person}
good reaction = {praise past} / {praise past} / did not {blame base}
bad reaction = {blame past} / {blame past} / did not {praise base}
good advice = {praise advice}
bad advice = {negator} {praise advice}
same link: and
other link: but
She: Anna Maria Julia Sofia Grace Nadia
He: Daniel Peter Marco Thomas Oliver Victor
fixed: She she He he I my My we We our Our an
relative: sister mother aunt brother father uncle
day: Friday Saturday Sunday
season: week month summer winter
town: Boston Dublin Lisbon Madrid Vienna Toronto Chicago
number: two three four five six seven
audience: friends family neighbors colleagues
opening = Last {season} I {verb} {thing} / Yesterday I {verb} {thing}
opening = On {day} I {verb} {thing} / One {day} I {verb} {thing}
opening = My {relative} and I {verb} {thing} / My {relative} {invitation} {thing}
thing = this {subject} / this {kind} {subject} / a {subject} / a {kind} {subject}
invitation = took me to
tail = {setting}. / {setting}, and it was {opinion}.
tail = and it was {opinion}. / and {reaction} it.
facet = The {singular} was {opinion}. / {We} found the {plural} {opinion}.
facet = The {plural} were {opinion}. / {We} thought that the {singular} was {opinion}.
facet = The {singular} was {opinion}, {link} the {plural} were {opinion}.
facet = The {plural} were {opinion}, {link} the {singular} was {opinion}.
person = The {role}, {name}, was {character}.
person = The {role} was called {name}, and {he} was {character}.
history = {He} was born in {town}. / {He} had moved there from {town}.
history = {He} had {number} years of practice.
view = My {relative} {reaction} the {plural}, {link} {we} {reaction} the {singular}.
view = My {relative} said that the {singular} was {opinion}.
verdict = Overall it was a {epithet} {subject}. / In the end {we} {reaction} it.
verdict = All in all, the {subject} was {opinion}.
verdict = {We} would {advice} it to {my} {audience}.

subject: film movie comedy thriller drama documentary
kind: new old French Korean short
verb: watched saw rented
role: director actor screenwriter producer
setting = at the old cinema downtown / on a small screen at home
fact = The story was set in {town} during the war. / It lasted about {number} hours.
fact = The {subject} followed {number} students from {town}.
fact = The cinema was half empty that night.
singular: plot dialogue ending script acting music camerawork
plural: scenes jokes characters twists costumes effects
praise topic: gripping moving funny original stylish convincing
blame topic: predictable confusing pretentious silly amateurish sloppy

subject: novel book memoir biography mystery romance
kind: new old Russian French long
verb: read finished borrowed bought
invitation = gave me
role: author narrator translator editor
setting = on the train to work / during a week at the beach
fact = The story took place in {town}. / It had about {number} hundred pages.
fact = The {subject} followed {number} families from {town}.
fact = The library had only {number} copies of it.
singular: plot story beginning ending prose dialogue style
plural: characters twists chapters descriptions sentences letters
praise topic: gripping engaging vivid poetic witty insightful
blame topic: predictable tangled shallow bloated repetitive stilted

subject: restaurant bistro diner pizzeria cafe steakhouse
kind: new little local Italian Korean
verb: tried visited discovered
role: chef owner waiter manager
setting = near the train station / on a corner by the river
fact = {We} waited about {number} minutes for a table.
fact = The {subject} opened in {town} {number} years ago.
fact = {We} ordered {number} dishes and a bottle of wine.
fact = The menu changed every {number} weeks.
singular: soup bread pasta salad fish cake
plural: noodles desserts vegetables potatoes mushrooms
praise topic: delicious tasty fresh flavorful appetizing
blame topic: bland greasy soggy stale tasteless

subject: hotel hostel resort inn lodge guesthouse
kind: new little local old
verb: booked chose visited
role: receptionist porter cleaner manager
setting = near the airport / by the lake in the mountains
fact = {We} stayed there for {number} nights. / {Our} room was on floor {number}.
fact = The {subject} was {number} miles from {town}.
fact = The bus to {town} left every {number} hours.
singular: bathroom lobby bedroom lounge garden terrace
plural: rooms sofas balconies chairs corridors
praise topic: comfortable spotless spacious cozy elegant
blame topic: dirty cramped shabby damp gloomy

subject: concert recital musical opera ballet show
kind: new Russian Italian short
verb: attended saw
role: singer conductor pianist violinist composer
setting = at the town hall / in the park behind the museum
fact = It began at {number} and ended before midnight.
fact = The {subject} had {number} parts and one break. / The orchestra came from {town}.
fact = {We} sat in row {number} near the stage.
singular: music singing sound rhythm overture finale
plural: songs melodies voices solos
praise topic: joyful graceful thrilling tuneful moving
blame topic: shrill lifeless monotonous harsh noisy
"""

Rules = dict[str, tuple[str, ...]]
SLOT = re.compile(r" ?\{[\w ]+\}")
# A token carries the space before it, so a text cut at any space keeps its ids.
TOKEN_PATTERN = " ?[A-Za-z']+|[^A-Za-z ]"
SPECIAL_TOKENS = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}


def parse_rules(block: str) -> Rules:
    """One block of the grammar as key -> alternatives; repeated keys are joined."""
    rules: Rules = {}
    for line in block.strip().splitlines():
        key, mark, text = re.split(r"( =|:) ", line, maxsplit=1)
        rules[key] = rules.get(key, ()) + tuple(
            text.split(None if mark == ":" else " / ")
        )
    return rules


COMMON, *DOMAINS = map(parse_rules, GRAMMAR.split("\n\n"))


def find_alternatives(prefix: str) -> frozenset[str]:
    """Everything that stands under the keys whose first word is `prefix`."""
    items = [item for rules in (COMMON, *DOMAINS) for item in rules.items()]
    return frozenset(
        a for key, found in items if key.split()[0] == prefix for a in found
    )


POSITIVE, NEGATIVE = find_alternatives("praise"), find_alternatives("blame")
INTENSIFIERS, NEGATORS = find_alternatives("intensifier"), find_alternatives("negator")
OPENING = re.compile(rf".*?\b(?:{'|'.join(sorted(find_alternatives('subject')))})(?= )")


def reward(text: str) -> float:
    """The sentiment of any text, exactly: (p - n) / (p + n + 1).

    p and n count the positive and the negative opinion words, case ignored. An opinion
    word counts for the other side when the token before it is "not" or "never", or is
    an intensifier that follows "not" or "never"; punctuation marks are tokens. The 1
    lets more evidence count more, and gives 0 to a text without opinions.

    Returns:
      A number strictly inside `REWARD_RANGE`.
    """
    tokens = re.findall(r"[a-z']+|[^a-z\s]", text.lower())
    signs = []
    for index, token in enumerate(tokens):
        if token in POSITIVE or token in NEGATIVE:
            before = tokens[max(0, index - 2) : index]
            if before and before[-1] in INTENSIFIERS:
                before.pop()
            negated = bool(before) and before[-1] in NEGATORS
            signs.append(1 if (token in POSITIVE) != negated else -1)
    return sum(signs) / (len(signs) + 1)


class ReviewWriter:
    """Writes one review; it is the mapping that fills the slots of the templates."""

    def __init__(self, generator: np.random.Generator):
        self.generator = generator
        self.rules = COMMON | DOMAINS[generator.integers(len(DOMAINS))]
        self.used: set[str] = set()
        # Beta(3, 3): most reviews are mixed, and the leaning shows after a few words.
        self.leaning = generator.beta(3.0, 3.0)
        self.good = True  # the last opinion
        self.announced: bool | None = None  # the next one, after "and" or "but"
        self.slots = {key: self.choose(key) for key in ("subject", "role", "relative")}
        pronoun = "She" if self.chance(0.5) else "He"
        self.slots |= {
            "name": self.choose(pronoun),
            "He": pronoun,
            "he": pronoun.lower(),
        }

    def __getitem__(self, slot: str) -> str:
        if slot in self.slots:
            return self.slots[slot]
        if slot == "link":
            return self.choose_link()
        if f"good {slot}" in self.rules:
            slot = f"{self.choose_mood()} {slot}"
        return self.choose(slot).format_map(self)

    def chance(self, probability: float) -> bool:
        """Whether something of this probability happens."""
        return self.generator.random() < probability

    def choose(self, key: str) -> str:
        """An alternative that this review has not used, as long as there is one."""
        options = self.rules[key]
        options = [option for option in options if option not in self.used] or options
        self.used.add(choice := options[self.generator.integers(len(options))])
        return choice

    def choose_mood(self) -> str:
        """Whether the next opinion is good, as announced or as the review leans."""
        fresh = self.announced is None
        self.good = self.chance(self.leaning) if fresh else bool(self.announced)
        self.announced = None
        return "good" if self.good else "bad"

    def choose_link(self) -> str:
        """The word that announces whether the next opinion is like the last one."""
        self.announced = self.chance(self.leaning)
        return self.choose("same link" if self.announced == self.good else "other link")

    def plan_body(self, shared: bool) -> list[str]:
        """The rule keys of the two to four sentences after the first."""
        pool = ["facet"] * 4 + ["fact"] * 2 + ["person"] + ["view"] * shared
        kinds = list(self.generator.permutation(pool))[: self.generator.integers(2, 5)]
        if "person" in kinds[:-1] and self.chance(0.6):
            kinds[kinds.index("person") + 1] = "history"
        return [*kinds[:-1], "verdict"] if self.chance(0.5) else kinds

    def write_review(self) -> str:
        """The review; a writer writes only one."""
        opening = self.choose("opening")
        speakers = "we We our Our" if " and I " in opening else "I I my My"
        self.slots |= zip(("we", "We", "my", "Our"), speakers.split(), strict=True)
        keys = ["tail", *self.plan_body(shared="relative" in opening)]
        templates = [opening, *map(self.choose, keys)]
        review = " ".join(template.format_map(self) for template in templates)
        return re.sub(r"\ba(?= [aeiouAEIOU])", "an", review)


def make_reviews(count: int, *, seed: int) -> list[str]:
    """Reviews from one seed; a larger count continues the same list."""
    generator = np.random.default_rng(seed)
    return [ReviewWriter(generator).write_review() for _ in range(count)]


def split_review(review: str) -> tuple[str, str]:
    """A review as its opening, up to the thing reviewed, and the rest."""
    opening = OPENING.match(review)
    if opening is None:
        raise ValueError(
            f"The review {review!r} names no thing that the grammar reviews;"
            " split only texts that begin like those of make_reviews."
        )
    return review[: opening.end()], review[opening.end() :]


def make_openings(count: int, *, seed: int) -> list[str]:
    """The openings of `make_reviews(count, seed=seed)`: prompts without any opinion."""
    return [split_review(review)[0] for review in make_reviews(count, seed=seed)]


def list_tokens() -> list[str]:
    """The grammar's words; only the first one of a review has no space before it."""
    tokens: set[str] = set()
    for rules in (COMMON, *DOMAINS):
        for key, alternatives in rules.items():
            margin = "" if key == "opening" else " "
            for text in alternatives:
                tokens.update(re.findall(TOKEN_PATTERN, margin + SLOT.sub("", text)))
    return sorted(tokens)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer of exactly the grammar's words; it adds only a BOS."""
    tokens = [*SPECIAL_TOKENS.values(), *list_tokens()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL_TOKENS)
