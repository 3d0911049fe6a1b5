"""Makes the demo's rows: short stories, their rewrites in 22 styles, and the prompt behind each rewrite.

    python demo/make_rows.py        # writes rows.csv, test.csv and test_truths.csv, the same bytes each time

A story is first drawn as a `Story` (who, where, when, what happened) and then written out, once plainly (the
original text) and once in a style (the rewritten text). Every style has several wordings of its prompt; two
of them are held out of rows.csv and used only in the test file. Standard library only.
"""

from __future__ import annotations

import csv
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SEED = 2024
ROWS, TEST_ROWS = 968, 120  # 968 = 44 rows for each of the 22 families

# ----------------------------------------------------------------------------------- what stories hold
# Clauses are written "subject | verb | rest", or "verb rest" where the hero of the story is the subject.


def clauses(text: str) -> list[tuple[str, str, str]]:
    subject_verb_rest = [item.split(" | ") for item in text.split("; ")]
    return [(subject, verb, rest) for subject, verb, rest in subject_verb_rest]


def deeds(text: str) -> list[tuple[str, str]]:
    verb_and_rest = [item.split(" ", 1) for item in text.split("; ")]
    return [(verb, rest) for verb, rest in verb_and_rest]


WOMEN = "Maria Anna Julia Sofia Emma Nora Clara Lucy Hannah Ivy Rosa Elena Grace Mina"
MEN = "Tom Peter David Omar Felix Hugo Leo Martin Paul Victor Samir Oscar Jack Ben"
PEOPLE = [(name, "she") for name in WOMEN.split()] + [(name, "he") for name in MEN.split()]
FRIENDS = ["Alice", "Robert", "Karim", "Linda", "George", "Yuki", "Carla", "Simon"]
TOWNS = [
    "Porto",
    "Bristol",
    "Lyon",
    "Oslo",
    "Kyoto",
    "Boston",
    "Naples",
    "Dublin",
    "Riga",
    "Cairo",
    "Quebec",
    "Bergen",
]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
LEADS = [
    "After lunch",
    "In the evening",
    "Later that day",
    "A little later",
    "Before noon",
    "At the end of the day",
    "Around four o'clock",
    "Soon",
    "In the afternoon",
    "At sunset",
]
SETTINGS = clauses(
    "the rain | fall | all morning; the wind | blow | from the sea; the sun | warm | the roofs; "
    "the snow | cover | the road; the bells | ring | in the distance; the fog | hide | the hills; "
    "the streets | smell | of fresh bread; the river | shine | under the bridge"
)
OTHERS = clauses(
    "the neighbours | watch | from the windows; a small crowd | gather | near the door; {friend} "
    "| help | with the heavy boxes; {friend} | bring | hot coffee for everyone; two children | "
    "ask | many questions; a black dog | follow | at a safe distance; the mayor | praise | the "
    "work in a short speech; {friend} | take | a photograph of the scene; the visitors | pay | "
    "more than the usual price; an old man | tell | a long story about the past"
)
ENDINGS = deeds(
    "feel tired but proud; go home with a smile; promise to come back next year; sleep very well "
    "that night; keep the secret until winter; thank everyone for the help; decide to try again "
    "the next morning; write a long note about it"
)
# role and place -> what somebody in that role may do there
TOPICS = {
    ("baker", "the bakery"): (
        "open the shop before sunrise; bake forty loaves of rye bread; burn the first tray of "
        "rolls; sell every cake within an hour; teach a student to knead dough; find an old "
        "recipe in a drawer; repair the oven with a piece of wire"
    ),
    ("teacher", "the village school"): (
        "give the class a difficult puzzle; read a poem about the moon; lose {his} glasses under "
        "the desk; plant a cherry tree with the pupils; correct thirty essays; show the children "
        "a map of the stars; win a prize for the best lesson"
    ),
    ("fisherman", "the harbour"): (
        "catch a huge silver fish; paint {his} boat bright green; mend the torn nets; lose an "
        "anchor in deep water; see a whale near the rocks; sell the whole catch at the market; "
        "sail around the lighthouse twice"
    ),
    ("gardener", "the public garden"): (
        "plant two hundred tulips; water the roses by hand; find a silver ring among the weeds; "
        "cut the tall hedge into the shape of a swan; build a small pond for the frogs; chase a "
        "hungry goat out of the gate; pick a basket of pears"
    ),
    ("nurse", "the city hospital"): (
        "work a double shift; comfort a frightened boy; find a missing file in the basement; "
        "teach {his} patients a card game; drive the old ambulance; change the bandages of nine "
        "patients; sing a quiet song in the corridor"
    ),
    ("mechanic", "the garage"): (
        "repair a red truck with a broken engine; change four flat tyres; find a nest of mice "
        "under the seat; build a bicycle from spare parts; paint the old bus yellow; lose a small "
        "screw in the dust; drive the car around the block"
    ),
    ("librarian", "the town library"): (
        "sort a thousand dusty books; find a love letter inside a dictionary; read ghost stories "
        "to the children; mend the cover of a rare atlas; hide a prize on the top shelf; lend a "
        "stranger {his} own copy; move the heavy desk to the window"
    ),
    ("farmer", "the hill farm"): (
        "milk thirty cows by hand; repair the fence after the storm; buy a stubborn donkey at the "
        "fair; pick apples until it was dark; drive the tractor into a ditch; sell honey and "
        "cheese by the road; save a lamb from the river"
    ),
    ("painter", "the old studio"): (
        "paint a portrait of the mayor; mix a new shade of blue; sell a large picture to a "
        "stranger; break {his} favourite brush; draw the ships in the bay; cover the whole wall "
        "with sunflowers; show {his} sketches to a famous critic"
    ),
    ("cook", "the hotel kitchen"): (
        "cook soup for eighty guests; invent a dessert with figs and ginger; burn the onions "
        "twice; buy fresh crabs at the dock; win the regional cooking contest; drop a tower of "
        "plates; teach the waiters to fold napkins"
    ),
    ("scientist", "the research station"): (
        "test a new battery; measure the ice for ten hours; discover a strange beetle; lose all "
        "the notes of the week; repair the weather balloon; send the results to a laboratory; "
        "drink six cups of strong tea"
    ),
    ("musician", "the concert hall"): (
        "play the cello for two hours; break a string during the first song; write a waltz for "
        "{his} mother; sing an old sailor song; forget the second page of the score; teach a "
        "beginner three chords; meet a conductor from abroad"
    ),
    ("pilot", "the small airport"): (
        "fly over the mountains at night; land the plane in thick fog; check both engines "
        "carefully; bring medicine to an island; lose the radio signal for an hour; see a green "
        "light above the clouds; paint a star on the tail of the plane"
    ),
    ("tailor", "the corner shop"): (
        "sew a wedding dress in three days; repair a torn winter coat; find a gold coin in a "
        "pocket; measure the tallest man in the region; buy ten metres of silk; cut the wrong "
        "piece of cloth; make costumes for the theatre"
    ),
}
IRREGULAR = (
    "fall=fell blow=blew hide=hid ring=rang smell=smelled shine=shone sell=sold bring=brought "
    "take=took pay=paid tell=told feel=felt go=went sleep=slept keep=kept write=wrote burn=burned "
    "teach=taught find=found give=gave read=read lose=lost show=showed win=won catch=caught see=saw "
    "cut=cut build=built drive=drove sing=sang lend=lent buy=bought break=broke draw=drew send=sent "
    "drink=drank forget=forgot meet=met fly=flew sew=sewed make=made drop=dropped"
)
PAST = dict(pair.split("=") for pair in IRREGULAR.split())
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
    parts = [Clause("", verb, rest) for verb, rest in rng.sample(deeds(TOPICS[role, place]), rng.choice([2, 2, 3, 3]))]
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
    return Story(name, pronoun, role, place, rng.choice(TOWNS), rng.choice(DAYS), friend, tuple(parts))


# -------------------------------------------------------------------------------------- writing it out
def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def conjugate(verb: str, tense: str, plural: bool) -> str:
    if tense == "past":
        return past(verb)
    if tense == "future":
        return "will " + verb
    return verb if plural else present(verb)


def predicate(story: Story, clause: Clause, tense: str = "past", mine: str = "", plural: bool = False) -> str:
    """The clause without its subject, "baked forty loaves"; `mine` replaces "his" or "her"."""
    plural = plural or clause.subject in PLURALS
    return f"{conjugate(clause.verb, tense, plural)} {clause.rest.replace('{his}', mine or story.his)}"


def introduction(story: Story) -> str:
    return f"{story.name}, the {story.role} from {story.town},"


def tell(story: Story, tense: str = "past", first_person: bool = False, leads: bool = True) -> list[str]:
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
    """The plain telling, in the past tense; some stories place the day first or join two sentences."""
    sentences = tell(story)
    if rng.random() < 0.4:
        first = story.clauses[0]
        sentences[0] = f"On {story.day}, {introduction(story)} {predicate(story, first)} at {story.place}"
    if len(sentences) > 3 and rng.random() < 0.4 and not story.clauses[2].lead:
        tail = sentences.pop(2)
        own_name = tail.startswith((story.name, story.friend))
        sentences[1] += " and " + (tail if own_name else tail[:1].lower() + tail[1:])
    return ". ".join(sentences) + "."


def swap(text: str, words: dict[str, str]) -> str:
    """Replaces whole words, keeping a capital at the front of a word and the punctuation behind it."""
    out = []
    for word in text.split(" "):
        bare = word.rstrip(".,!?")
        new = words.get(bare.lower())
        if new is not None:
            word = (upper_first(new) if bare[:1].isupper() else new) + word[len(bare) :]
        out.append(word)
    return " ".join(out)


# fmt: off
PIRATE = {"the": "th'", "and": "an'", "of": "o'", "for": "fer", "to": "t'", "my": "me", "his": "'is",
          "old": "cursed",
          "everyone": "all hands", "home": "back t' the ship", "friend": "matey", "very": "mighty",
          "small": "wee"}
OLD = {"gave": "didst give", "found": "hath found", "lost": "hath lost",
       "saw": "didst behold",
       "bought": "hath purchased", "made": "hath wrought", "before": "ere", "very": "most",
       "everyone": "all good folk",
       "often": "oft", "near": "nigh unto", "small": "wee", "old": "ancient", "to": "unto", "until": "till",
       "home": "homeward"}
FORMAL = {"found": "located", "lost": "misplaced", "bought": "purchased", "sold": "marketed",
          "helped": "provided assistance",
          "asked": "posed", "went": "proceeded", "felt": "appeared", "got": "obtained", "gave": "presented",
          "built": "constructed", "repaired": "restored", "saw": "observed", "made": "produced",
          "showed": "presented",
          "everyone": "all persons present", "big": "substantial", "huge": "considerable",
          "children": "minors", "told": "recounted"}
# fmt: on


def pirate(s: Story, rng: random.Random) -> str:
    cries = ["Arrr!", "Yo ho ho!", "Shiver me timbers!", "Avast, me hearties!", "Aye, matey!"]
    body = [swap(x, PIRATE) + rng.choice([".", ", arrr!", ", me hearties!", ", by Davy Jones!"]) for x in tell(s)]
    return rng.choice(cries) + " " + " ".join(body) + " " + rng.choice(cries)


def formal(s: Story, rng: random.Random) -> str:
    links = ["Subsequently, ", "Furthermore, ", "In addition, ", "It should be noted that ", "Moreover, "]
    title = "Ms" if s.pronoun == "she" else "Mr"
    body = [swap(x, FORMAL) for x in tell(s, leads=False)]
    names = (s.name, s.friend)
    rest = [rng.choice(links) + (x if x.startswith(names) else x[:1].lower() + x[1:]) for x in body[1:]]
    return ". ".join([f"We hereby report that {title} {body[0]}", *rest]) + "."


def child(s: Story, rng: random.Random) -> str:
    wow = ["Wow!", "Yay!", "So cool!", "Hee hee!", "Uh oh!"]
    body = [f"{c.subject or s.pronoun} {predicate(s, c)}" for c in s.clauses]
    lines = [f"{s.name} is a {s.role}!"] + [
        f"And then {x}. {rng.choice(wow)}" if i else f"{upper_first(x)}." for i, x in enumerate(body)
    ]
    return " ".join(lines) + " The end."


def first_person(s: Story, rng: random.Random) -> str:
    return ". ".join(tell(s, first_person=True)) + "."


def questions(s: Story, rng: random.Random) -> str:
    out = [f"Who was at {s.place} on {s.day}? Was it {s.name}, the {s.role} from {s.town}?"]
    for c in s.clauses:
        who = c.subject or rng.choice([s.name, s.pronoun])
        out.append(f"{rng.choice(['Did', 'Why did', 'How did'])} {who} {c.verb} {c.rest.replace('{his}', s.his)}?")
    return " ".join(out)


def headline(s: Story, rng: random.Random) -> str:
    deed = rng.choice([c for c in s.clauses[:-1] if not c.subject])
    short = " ".join(
        x if x in ("of", "the", "a", "in", "to", "for", "by", "with", "and") else upper_first(x)
        for x in predicate(s, deed, "present").split()
    )
    return rng.choice([f"{s.town} {upper_first(s.role)} {short}", f"{s.town}: {upper_first(s.role)} {s.name} {short}"])


def bullets(s: Story, rng: random.Random) -> str:
    mark = rng.choice(["- ", "* ", "• "])
    facts = [f"{upper_first(c.subject or s.name)}: {predicate(s, c)}" for c in s.clauses]
    return "\n".join(
        mark + x for x in [f"Who: {s.name}, {s.role}", f"Where: {s.place}, {s.town}", f"When: {s.day}", *facts]
    )


def shouting(s: Story, rng: random.Random) -> str:
    return " ".join(x.upper() + rng.choice(["!", "!!", "!!!"]) for x in tell(s))


def letter(s: Story, rng: random.Random) -> str:
    to = rng.choice(["Dear aunt", "Dear friend", "Dear cousin", "My dear sister"])
    start = rng.choice(["I hope you are well.", "Thank you for your last letter.", "How are you?"])
    end = rng.choice(["Write back soon.", "I hope to see you in spring.", "Please greet the family."])
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
    lines = [f"{upper_first(c.subject or s.name)} {predicate(s, c)}, {rhymes[i % 2]}" for i, c in enumerate(s.clauses)]
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
    body = [f"Apparently {c.subject or s.pronoun} {predicate(s, c)}.{rng.choice(asides)}" for c in s.clauses[:4]]
    return " ".join([rng.choice(starts).format(f"{s.name} from {s.place}"), *body])


def news(s: Story, rng: random.Random) -> str:
    said = ["witnesses said", "officials confirmed", "sources told our reporter", "police reported"]
    body = [f"{x}, {rng.choice(said)}" if i % 2 == 0 else x for i, x in enumerate(tell(s, leads=False))]
    return f"{s.town.upper()}, {s.day} - " + ". ".join(body) + ". More news at six."


def future(s: Story, rng: random.Random) -> str:
    return ". ".join(tell(s, "future")) + "."


def old_english(s: Story, rng: random.Random) -> str:
    cries = ["Hark!", "Lo!", "Forsooth,", "Verily,", "Prithee, hear me:"]
    ends = ["Thus it was, my lord.", "So doth the tale end.", "Fare thee well!", "What sayest thou?"]
    body = [f"{rng.choice(cries)} {swap(x, OLD)}." if i % 2 == 0 else f"{swap(x, OLD)}." for i, x in enumerate(tell(s))]
    return " ".join(body) + " " + rng.choice(ends)


def robot(s: Story, rng: random.Random) -> str:
    ends = ["BEEP.", "BZZT. Process complete.", "End of transmission.", "BEEP BOOP."]
    body = [f"Action {i}: {c.subject or 'unit ' + s.name} {predicate(s, c)}." for i, c in enumerate(s.clauses, 1)]
    return f"BEEP. Unit {s.name}, model {s.role}, location {s.town}. " + " ".join(body) + " " + rng.choice(ends)


def one_sentence(s: Story, rng: random.Random) -> str:
    deeds = [predicate(s, c) for c in s.clauses if not c.subject]
    return rng.choice(["In short, ", "In a word, ", "Briefly, "]) + f"{s.name} {', '.join(deeds[:-1])} and {deeds[-1]}."


def steps(s: Story, rng: random.Random) -> str:
    lines = [
        f"Step {i}: {upper_first(c.verb)} {c.rest.replace('{his}', 'your')}."
        for i, c in enumerate((c for c in s.clauses if not c.subject), 1)
    ]
    return f"How to be a {s.role}:\nFirst go to {s.place} in {s.town}.\n" + "\n".join(lines)


def advert(s: Story, rng: random.Random) -> str:
    starts = ["Amazing offer!", "Do not miss this!", "Only today!", "Special deal!"]
    ends = ["Order now!", "Buy one, get one free!", "Call today!", "Limited places, so hurry!"]
    body = [f"The incredible {s.name} {predicate(s, c, 'present')}!" for c in s.clauses if not c.subject]
    return f"{rng.choice(starts)} Visit {s.place} in {s.town} this {s.day}! " + " ".join(body) + " " + rng.choice(ends)


def sad(s: Story, rng: random.Random) -> str:
    sighs = ["Alas,", "Sadly,", "With tears,", "With a heavy heart,"]
    ends = ["Nobody cared.", "Everything was in vain.", "The tears did not stop.", "How lonely it was."]
    body = [f"{rng.choice(sighs)} {c.subject or 'poor ' + s.name} {predicate(s, c)}." for c in s.clauses]
    return f"It was a grey, lonely {s.day} at {s.place}. " + " ".join(body) + " " + rng.choice(ends)


def dialogue(s: Story, rng: random.Random) -> str:
    asks = ["And then?", "Really?", "What else?", "Tell me more.", "No way!"]
    lines = [f'{s.friend}: "What happened at {s.place} on {s.day}?"']
    for i, c in enumerate(s.clauses):
        if i and i % 2 == 0:
            lines.append(f'{s.friend}: "{rng.choice(asks)}"')
        who = "I" if not c.subject else upper_first("my friend " + c.subject if c.subject == s.friend else c.subject)
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

# --------------------------------------------------------------------------------------------- prompts
# family -> (six wordings for training, two held out for the test file)
# fmt: off
FAMILIES: dict[str, tuple[list[str], list[str]]] = {
    "pirate": (["Rewrite this text in the voice of a pirate.", "Turn this text into pirate speech.",
                "Make this text sound like a pirate wrote it.", "Retell the text as a pirate would tell it.",
                "Convert this text to pirate talk.", "How would a pirate tell this text?"],
               ["Rewrite the text as if a pirate were speaking.", "Give this text the voice of a pirate."]),
    "formal": (["Rewrite this text in a formal tone.", "Make this text more formal and official.",
                "Turn this text into formal language.", "Change the text to a formal, official style.",
                "Convert this text to a formal register.", "Use formal language to rewrite this text."],
               ["Rewrite the text in a more formal style.", "Make the text sound formal."]),
    "child": (["Rewrite this text as a small child would tell it.",
               "Make this text sound like a little child wrote it.",
               "Retell this text in the words of a young child.",
               "Turn this text into a story told by a child.",
               "Tell the text the way a small child talks.", "How would a little child tell this text?"],
              ["Rewrite the text in the voice of a little child.", "Tell this text like a young child."]),
    "first_person": (["Rewrite this text in the first person.",
                      "Change the text to the first person, using I.",
                      "Tell this text from the first person point of view.",
                      "Turn this text into a first person account.",
                      "Convert this text to first person narration.",
                      "Use the first person to retell this text."],
                     ["Rewrite the text from a first person point of view.",
                      "Put this text into the first person."]),
    "questions": (["Rewrite this text as a series of questions.",
                   "Turn every sentence of this text into a question.",
                   "Convert this text to questions.", "Make the text into a list of questions.",
                   "Change each sentence of the text to a question.",
                   "Use only questions to rewrite this text."],
                  ["Rewrite the text using only questions.",
                   "Turn the sentences of this text into questions."]),
    "headline": (["Write a newspaper headline for this text.", "Turn this text into a short headline.",
                  "Shorten this text to a headline.", "Convert the text to a newspaper headline.",
                  "Give this text a catchy headline.", "Make a short headline from this text."],
                 ["Write a short headline for the text.", "Turn the text into a newspaper headline."]),
    "bullets": (["Rewrite this text as a bullet list.", "Turn this text into bullet points.",
                 "Convert this text to a list of bullet points.",
                 "Put the facts of the text in a bullet list.",
                 "Make a bullet list from this text.", "Use bullet points to present this text."],
                ["Rewrite the text as bullet points.", "Turn the text into a bullet list."]),
    "shouting": (["Rewrite this text in capital letters, as if shouting.",
                  "Shout this text in all capital letters.",
                  "Turn this text into loud shouting in capital letters.",
                  "Make the text shout, all in capital letters.",
                  "Convert this text to capital letters and shout it.",
                  "Use capital letters to shout this text."],
                 ["Rewrite the text as shouting in capital letters.",
                  "Make this text shout in all capital letters."]),
    "letter": (["Rewrite this text as a personal letter.", "Turn this text into a letter to a relative.",
                "Convert this text to a friendly letter.", "Write the text as a letter to somebody dear.",
                "Make a personal letter out of this text.", "Put this text in the form of a letter."],
               ["Rewrite the text in the form of a letter.", "Turn this text into a personal letter."]),
    "poem": (["Rewrite this text as a poem.", "Turn this text into a rhyming poem.",
              "Convert this text to a poem with rhymes.",
              "Make the text rhyme like a poem.", "Write a short poem from this text.",
              "Put this text into verse, as a poem."],
             ["Rewrite the text as a rhyming poem.", "Make a poem out of this text."]),
    "gossip": (["Rewrite this text as juicy gossip.", "Turn this text into gossip between neighbours.",
                "Make this text sound like gossip.", "Tell the text as a piece of gossip.",
                "Convert this text to whispered gossip.",
                "Spread this text as gossip."],
               ["Rewrite the text as gossip.", "Turn this text into juicy gossip."]),
    "news": (["Rewrite this text as a news report.", "Turn this text into a news article.",
              "Convert this text to a television news report.", "Make the text sound like a news report.",
              "Report this text as news.", "Write a news report from this text."],
             ["Rewrite the text in the style of a news report.", "Turn the text into a news report."]),
    "future": (["Rewrite this text in the future tense.", "Change this text to the future tense.",
                "Turn the verbs of this text into the future tense.", "Convert the text to future tense.",
                "Put this text into the future tense.", "Use the future tense to retell this text."],
               ["Rewrite the text using the future tense.",
                "Change the verbs of the text to the future tense."]),
    "old_english": (["Rewrite this text in old Shakespearean English.",
                     "Turn this text into Shakespearean English.",
                     "Make this text sound like Shakespeare wrote it.",
                     "Convert the text to the English of Shakespeare.",
                     "Retell this text the way Shakespeare would.",
                     "Use Shakespearean English for this text."],
                    ["Rewrite the text in the style of Shakespeare.",
                     "Make the text sound like Shakespearean English."]),
    "robot": (["Rewrite this text in the voice of a robot.", "Turn this text into robot speech.",
               "Make this text sound like a robot wrote it.", "Convert the text to the log of a robot.",
               "Retell this text as a robot would.", "How would a robot tell this text?"],
              ["Rewrite the text as if a robot were speaking.", "Make the text sound like a robot."]),
    "one_sentence": (["Summarize this text in one sentence.", "Shorten this text to a single sentence.",
                      "Give a one sentence summary of this text.", "Condense the text into one sentence.",
                      "Write one sentence that sums up this text.",
                      "Reduce this text to one short sentence."],
                     ["Summarize the text in a single sentence.",
                      "Write a one sentence summary of the text."]),
    "steps": (["Rewrite this text as step by step instructions.",
               "Turn this text into instructions with numbered steps.",
               "Convert this text to step by step instructions.",
               "Make the text into instructions to follow.",
               "Write instructions in steps from this text.",
               "Put this text in the form of numbered instructions."],
              ["Rewrite the text as instructions with steps.",
               "Turn the text into step by step instructions."]),
    "advert": (["Rewrite this text as an enthusiastic advertisement.",
                "Turn this text into an advertisement.",
                "Convert this text to a loud advertisement.",
                "Make the text sound like an enthusiastic advertisement.",
                "Write an advertisement from this text.", "Advertise this text like a sales advertisement."],
               ["Rewrite the text in the style of an advertisement.",
                "Turn the text into an enthusiastic advertisement."]),
    "sad": (["Rewrite this text in a sad tone.", "Make this text very sad.",
             "Turn this text into a sad and lonely story.",
             "Retell the text so that it sounds sad.", "Convert this text to a sad mood.",
             "Give this text a sad, tearful tone."],
            ["Rewrite the text so that it is sad.", "Make the text sound sad."]),
    "dialogue": (["Rewrite this text as a dialogue between two people.", "Turn this text into a dialogue.",
                  "Convert this text to a conversation between two friends.",
                  "Make the text into a dialogue with two speakers.",
                  "Write a dialogue from this text.", "Put this text in the form of a dialogue."],
                 ["Rewrite the text as a dialogue.", "Turn the text into a dialogue between two friends."]),
    "fairy_tale": (["Rewrite this text as a fairy tale.", "Turn this text into a fairy tale with magic.",
                    "Make this text sound like a fairy tale.",
                    "Convert the text to a fairy tale for bedtime.",
                    "Retell this text as a magical fairy tale.", "Write a fairy tale from this text."],
                   ["Rewrite the text in the style of a fairy tale.", "Tell this text as a fairy tale."]),
    "text_message": (["Rewrite this text as a text message with emoji.",
                      "Turn this text into a phone message full of emoji.",
                      "Convert this text to a chat message with emoji.",
                      "Make the text look like a phone message with emoji.",
                      "Send this text as a message with slang and emoji.",
                      "Use emoji and slang to write this text as a message."],
                     ["Rewrite the text as a chat message with emoji.",
                      "Turn the text into a message with emoji."]),
}
# fmt: on


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
        truths.append({"id": f"t{i:04d}", "rewrite_prompt": rng.choice(FAMILIES[family][1]), "family": family})
    write_csv(folder / "test.csv", tests)
    write_csv(folder / "test_truths.csv", truths)


if __name__ == "__main__":
    main()
