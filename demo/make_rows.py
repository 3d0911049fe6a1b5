"""Makes the demo's rows: short stories, their rewrites in 22 styles, and the prompt behind each
rewrite.

    python demo/make_rows.py    # rows.csv, test.csv and test_truths.csv, the same bytes each time

A story is first drawn as a `Story` (who, where, when, what happened) and then written out, once
plainly (the original text) and once in a style (the rewritten text). Every style has several
wordings of its prompt; two of them are held out of rows.csv and used only in the test file. What
stories hold, and the wordings, lie in stories.json. Standard library only.
"""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 2024
ROWS, TEST_ROWS = 968, 120  # 968 = 44 rows for each of the 22 families

# -------------------------------------------------------------------------------- what stories hold
# Clauses are written "subject | verb | rest", or "verb rest" where the hero of the story is the
# subject.


def clauses(items: list[str]) -> list[tuple[str, str, str]]:
    return [(subject, verb, rest) for subject, verb, rest in (item.split(" | ") for item in items)]


def deeds(items: list[str]) -> list[tuple[str, str]]:
    return [(verb, rest) for verb, rest in (item.split(" ", 1) for item in items)]


TABLES = json.loads((HERE / "stories.json").read_text(encoding="utf-8"))
PEOPLE = [(name, "she") for name in TABLES["women"]] + [(name, "he") for name in TABLES["men"]]
FRIENDS, TOWNS, DAYS, LEADS = (TABLES[name] for name in ("friends", "towns", "days", "leads"))
SETTINGS, OTHERS = clauses(TABLES["settings"]), clauses(TABLES["others"])
ENDINGS = deeds(TABLES["endings"])
# role and place -> what somebody in that role may do there
TOPICS = {(topic["role"], topic["place"]): topic["deeds"] for topic in TABLES["topics"]}
PAST = TABLES["past"]
PLURALS = ("the bells", "the streets", "the neighbours", "two children", "the visitors")


def past(verb: str) -> str:
    """past("carry") -> "carried"."""
    if verb in PAST:
        return PAST[verb]
    if verb.endswith("e"):
        return verb + "d"
    if verb.endswith("y") and verb[-2] not in "aeou":
        return verb[:-1] + "ied"
    return verb + "ed"


def present(verb: str) -> str:
    """The third person singular: present("catch") -> "catches"."""
    if verb.endswith("y") and verb[-2] not in "aeou":
        return verb[:-1] + "ies"
    return verb + ("es" if verb.endswith(("ch", "sh", "o", "x", "s")) else "s")


def ing(verb: str) -> str:
    """ing("bake") -> "baking"."""
    if verb in ("cut", "win", "drop", "forget"):
        return verb + verb[-1] + "ing"
    return (verb[:-1] if verb.endswith("e") and verb != "see" else verb) + "ing"


@dataclass(frozen=True)
class Clause:
    """One thing that happened; an empty `subject` stands for the hero of the story."""

    subject: str
    verb: str
    rest: str
    lead: str = ""


@dataclass(frozen=True)
class Story:
    name: str
    pronoun: str
    role: str
    place: str
    town: str
    day: str
    friend: str
    clauses: tuple[Clause, ...]

    @property
    def his(self) -> str:
        return "her" if self.pronoun == "she" else "his"


def draw_story(rng: random.Random) -> Story:
    """Draws who did what, where and when."""
    name, pronoun = rng.choice(PEOPLE)
    role, place = rng.choice(list(TOPICS))
    friend = rng.choice(FRIENDS)
    parts = [
        Clause("", verb, rest)
        for verb, rest in rng.sample(deeds(TOPICS[role, place]), rng.choice([2, 2, 3, 3]))
    ]
    if rng.random() < 0.6:
        parts.insert(rng.randint(1, len(parts)), Clause(*rng.choice(OTHERS)))
    if rng.random() < 0.5:
        parts.insert(rng.randint(1, len(parts)), Clause(*rng.choice(SETTINGS)))
    parts.append(Clause("", *rng.choice(ENDINGS)))
    leads = rng.sample(LEADS, len(parts))
    parts = [
        Clause(
            c.subject.replace("{friend}", friend),
            c.verb,
            c.rest,
            leads[i] if i and rng.random() < 0.5 else "",
        )
        for i, c in enumerate(parts)
    ]
    return Story(
        name, pronoun, role, place, rng.choice(TOWNS), rng.choice(DAYS), friend, tuple(parts)
    )


# ----------------------------------------------------------------------------------- writing it out
def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def conjugate(verb: str, tense: str, plural: bool) -> str:
    if tense == "past":
        return past(verb)
    if tense == "future":
        return "will " + verb
    return verb if plural else present(verb)


def predicate(
    story: Story, clause: Clause, tense: str = "past", mine: str = "", plural: bool = False
) -> str:
    """The clause without its subject, "baked forty loaves"; `mine` replaces "his" or "her"."""
    plural = plural or clause.subject in PLURALS
    return (
        f"{conjugate(clause.verb, tense, plural)} {clause.rest.replace('{his}', mine or story.his)}"
    )


def introduction(story: Story) -> str:
    return f"{story.name}, the {story.role} from {story.town},"


def tell(
    story: Story, tense: str = "past", first_person: bool = False, leads: bool = True
) -> list[str]:
    """The story as sentences without their full stops, the first naming place and day."""
    sentences = []
    for i, clause in enumerate(story.clauses):
        hero = "I" if first_person else (story.pronoun if i % 3 else story.name)
        subject = clause.subject or hero
        if i == 0:
            who = f"I, the {story.role} from {story.town}," if first_person else introduction(story)
            body = f"{who} {predicate(story, clause, tense, 'my' * first_person, first_person)}"
            sentences.append(f"{body} at {story.place} on {story.day}")
            continue
        is_me = first_person and not clause.subject
        body = f"{subject} {predicate(story, clause, tense, 'my' * first_person, is_me)}"
        sentences.append(upper_first(f"{clause.lead}, {body}" if leads and clause.lead else body))
    return sentences


def original(story: Story, rng: random.Random) -> str:
    """The plain telling, in the past tense; some stories place the day first or join two
    sentences."""
    sentences = tell(story)
    if rng.random() < 0.4:
        first = story.clauses[0]
        sentences[0] = (
            f"On {story.day}, {introduction(story)} {predicate(story, first)} at {story.place}"
        )
    if len(sentences) > 3 and rng.random() < 0.4 and not story.clauses[2].lead:
        tail = sentences.pop(2)
        own_name = tail.startswith((story.name, story.friend))
        sentences[1] += " and " + (tail if own_name else tail[:1].lower() + tail[1:])
    return ". ".join(sentences) + "."


def swap(text: str, words: dict[str, str]) -> str:
    """Replaces whole words, keeping a capital at the front of a word and the punctuation behind
    it."""
    out = []
    for word in text.split(" "):
        bare = word.rstrip(".,!?")
        new = words.get(bare.lower())
        if new is not None:
            word = (upper_first(new) if bare[:1].isupper() else new) + word[len(bare) :]
        out.append(word)
    return " ".join(out)


PIRATE, OLD, FORMAL = (TABLES["words"][name] for name in ("pirate", "old_english", "formal"))


def pirate(s: Story, rng: random.Random) -> str:
    cries = ["Arrr!", "Yo ho ho!", "Shiver me timbers!", "Avast, me hearties!", "Aye, matey!"]
    body = [
        swap(x, PIRATE) + rng.choice([".", ", arrr!", ", me hearties!", ", by Davy Jones!"])
        for x in tell(s)
    ]
    return rng.choice(cries) + " " + " ".join(body) + " " + rng.choice(cries)


def formal(s: Story, rng: random.Random) -> str:
    links = [
        "Subsequently, ",
        "Furthermore, ",
        "In addition, ",
        "It should be noted that ",
        "Moreover, ",
    ]
    title = "Ms" if s.pronoun == "she" else "Mr"
    body = [swap(x, FORMAL) for x in tell(s, leads=False)]
    names = (s.name, s.friend)
    rest = [
        rng.choice(links) + (x if x.startswith(names) else x[:1].lower() + x[1:]) for x in body[1:]
    ]
    return ". ".join([f"We hereby report that {title} {body[0]}", *rest]) + "."


def child(s: Story, rng: random.Random) -> str:
    wow = ["Wow!", "Yay!", "So cool!", "Hee hee!", "Uh oh!"]
    body = [f"{c.subject or s.pronoun} {predicate(s, c)}" for c in s.clauses]
    lines = [f"{s.name} is a {s.role}!"] + [
        f"And then {x}. {rng.choice(wow)}" if i else f"{upper_first(x)}."
        for i, x in enumerate(body)
    ]
    return " ".join(lines) + " The end."


def first_person(s: Story, rng: random.Random) -> str:
    return ". ".join(tell(s, first_person=True)) + "."


def questions(s: Story, rng: random.Random) -> str:
    out = [f"Who was at {s.place} on {s.day}? Was it {s.name}, the {s.role} from {s.town}?"]
    for c in s.clauses:
        who = c.subject or rng.choice([s.name, s.pronoun])
        out.append(
            f"{rng.choice(['Did', 'Why did', 'How did'])} {who} {c.verb} "
            f"{c.rest.replace('{his}', s.his)}?"
        )
    return " ".join(out)


def headline(s: Story, rng: random.Random) -> str:
    deed = rng.choice([c for c in s.clauses[:-1] if not c.subject])
    short = " ".join(
        x if x in ("of", "the", "a", "in", "to", "for", "by", "with", "and") else upper_first(x)
        for x in predicate(s, deed, "present").split()
    )
    return rng.choice(
        [
            f"{s.town} {upper_first(s.role)} {short}",
            f"{s.town}: {upper_first(s.role)} {s.name} {short}",
        ]
    )


def bullets(s: Story, rng: random.Random) -> str:
    mark = rng.choice(["- ", "* ", "• "])
    facts = [f"{upper_first(c.subject or s.name)}: {predicate(s, c)}" for c in s.clauses]
    return "\n".join(
        mark + x
        for x in [
            f"Who: {s.name}, {s.role}",
            f"Where: {s.place}, {s.town}",
            f"When: {s.day}",
            *facts,
        ]
    )


def shouting(s: Story, rng: random.Random) -> str:
    return " ".join(x.upper() + rng.choice(["!", "!!", "!!!"]) for x in tell(s))


def letter(s: Story, rng: random.Random) -> str:
    to = rng.choice(["Dear aunt", "Dear friend", "Dear cousin", "My dear sister"])
    start = rng.choice(["I hope you are well.", "Thank you for your last letter.", "How are you?"])
    end = rng.choice(
        ["Write back soon.", "I hope to see you in spring.", "Please greet the family."]
    )
    body = ". ".join(tell(s, first_person=True, leads=False))
    return f"{to},\n\n{start} {body}. {end}\n\nYours sincerely,\n{s.name}"


def poem(s: Story, rng: random.Random) -> str:
    rhymes = rng.choice(
        [
            ("so bright", "all night"),
            ("one day", "hooray"),
            ("by the sea", "glad and free"),
            ("so high", "to the sky"),
            ("with a song", "all day long"),
        ]
    )
    lines = [
        f"{upper_first(c.subject or s.name)} {predicate(s, c)}, {rhymes[i % 2]}"
        for i, c in enumerate(s.clauses)
    ]
    first = f"O {s.role} of {s.town}, {rhymes[1]}"
    return ",\n".join([first, *lines]) + "."


def gossip(s: Story, rng: random.Random) -> str:
    starts = [
        "Psst, have you heard about {}?",
        "You will never guess what {} did!",
        "Okay, do not tell anyone, but listen: {}!",
    ]
    asides = [
        " Can you imagine?",
        " Between you and me, I was shocked.",
        " My cousin saw it all!",
        " The nerve!",
        " I swear.",
    ]
    body = [
        f"Apparently {c.subject or s.pronoun} {predicate(s, c)}.{rng.choice(asides)}"
        for c in s.clauses[:4]
    ]
    return " ".join([rng.choice(starts).format(f"{s.name} from {s.place}"), *body])


def news(s: Story, rng: random.Random) -> str:
    said = ["witnesses said", "officials confirmed", "sources told our reporter", "police reported"]
    body = [
        f"{x}, {rng.choice(said)}" if i % 2 == 0 else x for i, x in enumerate(tell(s, leads=False))
    ]
    return f"{s.town.upper()}, {s.day} - " + ". ".join(body) + ". More news at six."


def future(s: Story, rng: random.Random) -> str:
    return ". ".join(tell(s, "future")) + "."


def old_english(s: Story, rng: random.Random) -> str:
    cries = ["Hark!", "Lo!", "Forsooth,", "Verily,", "Prithee, hear me:"]
    ends = [
        "Thus it was, my lord.",
        "So doth the tale end.",
        "Fare thee well!",
        "What sayest thou?",
    ]
    body = [
        f"{rng.choice(cries)} {swap(x, OLD)}." if i % 2 == 0 else f"{swap(x, OLD)}."
        for i, x in enumerate(tell(s))
    ]
    return " ".join(body) + " " + rng.choice(ends)


def robot(s: Story, rng: random.Random) -> str:
    ends = ["BEEP.", "BZZT. Process complete.", "End of transmission.", "BEEP BOOP."]
    body = [
        f"Action {i}: {c.subject or 'unit ' + s.name} {predicate(s, c)}."
        for i, c in enumerate(s.clauses, 1)
    ]
    return (
        f"BEEP. Unit {s.name}, model {s.role}, location {s.town}. "
        + " ".join(body)
        + " "
        + rng.choice(ends)
    )


def one_sentence(s: Story, rng: random.Random) -> str:
    deeds = [predicate(s, c) for c in s.clauses if not c.subject]
    return (
        rng.choice(["In short, ", "In a word, ", "Briefly, "])
        + f"{s.name} {', '.join(deeds[:-1])} and {deeds[-1]}."
    )


def steps(s: Story, rng: random.Random) -> str:
    lines = [
        f"Step {i}: {upper_first(c.verb)} {c.rest.replace('{his}', 'your')}."
        for i, c in enumerate((c for c in s.clauses if not c.subject), 1)
    ]
    return f"How to be a {s.role}:\nFirst go to {s.place} in {s.town}.\n" + "\n".join(lines)


def advert(s: Story, rng: random.Random) -> str:
    starts = ["Amazing offer!", "Do not miss this!", "Only today!", "Special deal!"]
    ends = ["Order now!", "Buy one, get one free!", "Call today!", "Limited places, so hurry!"]
    body = [
        f"The incredible {s.name} {predicate(s, c, 'present')}!" for c in s.clauses if not c.subject
    ]
    return (
        f"{rng.choice(starts)} Visit {s.place} in {s.town} this {s.day}! "
        + " ".join(body)
        + " "
        + rng.choice(ends)
    )


def sad(s: Story, rng: random.Random) -> str:
    sighs = ["Alas,", "Sadly,", "With tears,", "With a heavy heart,"]
    ends = [
        "Nobody cared.",
        "Everything was in vain.",
        "The tears did not stop.",
        "How lonely it was.",
    ]
    body = [
        f"{rng.choice(sighs)} {c.subject or 'poor ' + s.name} {predicate(s, c)}." for c in s.clauses
    ]
    return f"It was a grey, lonely {s.day} at {s.place}. " + " ".join(body) + " " + rng.choice(ends)


def dialogue(s: Story, rng: random.Random) -> str:
    asks = ["And then?", "Really?", "What else?", "Tell me more.", "No way!"]
    lines = [f'{s.friend}: "What happened at {s.place} on {s.day}?"']
    for i, c in enumerate(s.clauses):
        if i and i % 2 == 0:
            lines.append(f'{s.friend}: "{rng.choice(asks)}"')
        who = (
            "I"
            if not c.subject
            else upper_first("my friend " + c.subject if c.subject == s.friend else c.subject)
        )
        lines.append(f'{s.name}: "{who} {predicate(s, c, mine="my")}."')
    return "\n".join(lines)


def fairy_tale(s: Story, rng: random.Random) -> str:
    once = rng.choice(["Once upon a time", "Long, long ago", "In a faraway kingdom"])
    magic = rng.choice(["a kind fairy", "a wise dragon", "a talking owl"])
    body = [f"{c.subject or ('the brave ' + s.role)} {predicate(s, c)}" for c in s.clauses]
    return (
        f"{once} there lived a {s.role} named {s.name} in the kingdom of {s.town}. "
        + ". ".join(map(upper_first, body))
        + f". And thanks to {magic}, they all lived happily ever after."
    )


def text_message(s: Story, rng: random.Random) -> str:
    faces = ["😂", "🙈", "🔥", "😱", "🎉", "💪"]
    body = [
        swap(
            f"{c.subject or s.pronoun} {predicate(s, c)}",
            {"and": "&", "to": "2", "for": "4", "everyone": "every1", "the": "da"},
        )
        for c in s.clauses
    ]
    return (
        f"omg guess what {s.name} did lol {rng.choice(faces)} "
        + " ".join(f"{x} {rng.choice(faces)}" for x in body)
        + " ttyl"
    )


Rewrite = Callable[[Story, random.Random], str]
REWRITES: dict[str, Rewrite] = {
    "pirate": pirate,
    "formal": formal,
    "child": child,
    "first_person": first_person,
    "questions": questions,
    "headline": headline,
    "bullets": bullets,
    "shouting": shouting,
    "letter": letter,
    "poem": poem,
    "gossip": gossip,
    "news": news,
    "future": future,
    "old_english": old_english,
    "robot": robot,
    "one_sentence": one_sentence,
    "steps": steps,
    "advert": advert,
    "sad": sad,
    "dialogue": dialogue,
    "fairy_tale": fairy_tale,
    "text_message": text_message,
}

# ------------------------------------------------------------------------------------------ prompts
# family -> (six wordings for training, two held out for the test file)
FAMILIES: dict[str, tuple[list[str], list[str]]] = {
    family: (wordings["train"], wordings["test"]) for family, wordings in TABLES["prompts"].items()
}


def normalise(prompt: str) -> str:
    """Lower case, words only: "Make it sad !" -> "make it sad"."""
    return " ".join("".join(c if c.isalnum() else " " for c in prompt.lower()).split())


def family_of(prompt: str) -> str | None:
    """The family that has `prompt` among its wordings (case and punctuation aside), or None."""
    wanted = normalise(prompt)
    for family, (train, held_out) in FAMILIES.items():
        if any(normalise(wording) == wanted for wording in train + held_out):
            return family
    return None


def draw_pair(family: str, rng: random.Random) -> tuple[str, str]:
    """A new original text of 20 to 80 words, and its rewrite in the style of `family`."""
    while True:
        story = draw_story(rng)
        text = original(story, rng)
        if 20 <= len(text.split()) <= 80:
            return text, REWRITES[family](story, rng)


def write_csv(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def main(folder: Path = HERE) -> None:
    """Writes rows.csv, test.csv and test_truths.csv into `folder`."""
    rng = random.Random(SEED)
    seen: set[str] = set()

    def new_pair(family: str) -> tuple[str, str]:
        pair = draw_pair(family, rng)
        while pair[0] in seen:
            pair = draw_pair(family, rng)
        seen.add(pair[0])
        return pair

    names = list(FAMILIES)
    families = [names[i % len(names)] for i in range(ROWS)]
    rng.shuffle(families)
    rows = []
    for i, family in enumerate(families):
        text, rewrite = new_pair(family)
        rows.append(
            {
                "id": f"r{i:04d}",
                "original_text": text,
                "rewritten_text": rewrite,
                "rewrite_prompt": rng.choice(FAMILIES[family][0]),
            }
        )
    write_csv(folder / "rows.csv", rows)

    families = [names[i % len(names)] for i in range(TEST_ROWS)]
    rng.shuffle(families)
    tests, truths = [], []
    for i, family in enumerate(families):
        text, rewrite = new_pair(family)
        tests.append({"id": f"t{i:04d}", "original_text": text, "rewritten_text": rewrite})
        truths.append(
            {"id": f"t{i:04d}", "rewrite_prompt": rng.choice(FAMILIES[family][1]), "family": family}
        )
    write_csv(folder / "test.csv", tests)
    write_csv(folder / "test_truths.csv", truths)


if __name__ == "__main__":
    main()
