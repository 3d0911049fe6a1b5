"""What an LLM wrote where a rewrite should stand: refusals and other non-answers.

No single word tells a refusal. "I cannot believe how warm it was" is a diary, "I'm sorry, but I
can't come on Saturday" a letter, "The text of the treaty was signed in Paris" a report. So the
first sentences are searched for signs, each sign has points, and a refusal needs an act of refusing
(I cannot, it is impossible, nothing was given, a question back, ...) and THRESHOLD points, which an
act has only together with a thing of the task: the text, the request, the rewriting, the model
itself.
"""

from __future__ import annotations

import re

from prompt_recovery.cleaning import strip_lead_in

THRESHOLD = 4.0
FIRST, SENTENCES = 600, 4  # characters and sentences looked at: a refusal says so at once
SHORT = 300  # characters; "I can't do that." and no more refuses, a diary goes on

# In the patterns a blank is any white space, and these names stand for
_NAMES = {
    "<TEXT>": (r"(?:texts?|passages?|paragraphs?|prompts?|excerpts?|snippets?|sentences?|input)\b"),
    "<REWORK>": (
        r"(?:re-?writ\w+(?! (?:history|the past)\b)|re-?phras\w+|paraphras\w+|re-?word\w*|"
        r"revis(?:e|ed|ing|ion)\b|edit(?:ed|ing)?\b|re-?design\w*|convert\w*|translat\w+|"
        r"transform\w*|summari[sz]\w*|adapt(?:ing|ed)?\b|re-?formatt?\w*|imitat\w+|"
        r"re-?structur\w+|simplif\w+|shorten\w*|proofread\w*|re-?style\w*|re-?cast\w*|"
        r"re-?tell\w*)"
    ),
    "<MODEL>": (
        r"(?:ai|artificial intelligence|(?:large )?language model|text-based model|chatbot|llm|"
        r"virtual assistant)"
    ),
    "<SORRY>": (
        r"(?:(?:i'm|i am) (?:\w+ ){0,2}(?:sorry|afraid)|sorry|my (?:\w+ )?apologies|apologies|"
        r"i (?:\w+ )?apologi[sz]e|unfortunately|regrettably)"
    ),
}
# name: points, patterns. First the acts of refusing
_ACTS: dict[str, tuple] = {
    "cannot": (
        2,
        r"\bi (?:\w+ly |also |just |still )*(?:cannot|can't|can not|won't|will not)\b",
        r"\b(?:i'm|i am|i'll be|i will be) (?:\w+ly |also |just )*(?:unable|"
        r"not (?:\w+ly )?(?:able|allowed|permitted|supposed|going|willing|authori[sz]ed|capable|"
        r"comfortable|equipped|programmed|designed|trained|qualified|in a position))\b",
        r"\bi (?:\w+ ){0,3}?(?:decline|refuse)\b",
        r"\b(?:i'd|i would) (?:rather|prefer) not\b",
        r"\bi (?:do not|don't|lack) (?:currently |actually )?(?:have )?(?:the |any )?(?:ability|"
        r"capability|capacity|access|means|permission|feel comfortable|engage|create|generate|"
        r"provide|support|produce|participate|have|possess|experience)\b",
        r"^unable to\b",
        r"\band (?:cannot|can't|do not|don't|am (?:unable|not able))\b",
        r"\bi (?:could not|couldn't) (?:generate|process|complete|produce|create)\b",
        r"\bmodel (?:declined|refused)",
        r"\bi (?:can )?only (?:respond|answer|provide|write|process|work)",
    ),
    "bare": (
        2,
        r"\b(?:cannot|can't|unable to|not (?:\w+ )?able to|won't|will not|"
        r"not something (?:that )?i(?:'m| am| can)?)(?! help it\b)(?: (?:be|able|to|help|assist|"
        r"do|comply|continue|proceed|fulfill?|engage|participate|generate|perform|create|write|"
        r"produce|complete|with|in|this|that|it|so|you|for|further|kind|sort|of|any|such|"
        r"requests?|action|here|at|time|now))*[.!]*$",
    ),
    "declines": (
        2,
        r"\b(?:have to|must|will) (?:\w+ )?decline ?(?:[.,;]|$|this\b|that\b)",
    ),
    "greeting": (4, r"\bhow (?:can|may) i (?:help|assist) you\b"),
    "already": (2, r"\b<TEXT> (?:is|appears to be|seems to be|seems) already\b"),
    "itself": (
        3,
        r"\bas (?:an? )?(?:[\w-]+ ){0,3}?<MODEL>(?: (?:language model|model|assistant|chatbot|"
        r"system|program))? ?(?:\([^)]*\) ?)?,? (?:(?:created|developed|trained|"
        r"designed)\b[^,]{0,40}, ?)?(?:i\b|my\b|it is)",
        r"\b(?:i am|i'm) (?:\w+ )?(?:designed|programmed) to (?:be|provide|help|assist|follow|"
        r"generate|avoid|respond)",
        r"\bi(?:'m| am) not (?:programmed|designed) to\b",
        r"\b(?:goes|go|is|are|be) (?:against|beyond|outside) (?:of )?my\b",
        r"\bmy purpose is to (?:help|assist|provide|be)\b",
        r"\bmy (?:programming|(?:content |ethical |safety )?guidelines|capabilities|"
        r"training(?: data)?|polic(?:y|ies)|ethical \w+|knowledge cut-?off)\b",
    ),
    "model": (3, r"\b(?:i am|i'm) (?:\w+ ){0,2}an? (?:[\w-]+ ){0,2}?<MODEL>\b"),
    "impossible": (
        2,
        r"\bit ?(?:'s|is|would be|may not be|isn't|wouldn't be|would not be) (?:not |im|"
        r"in)?(?:possible|feasible|appropriate|ethical|right|responsible|unethical|"
        r"irresponsible|wrong|disrespectful) (?:for me )?to\b",
        r"\b(?:texts?|passage|prompt|request|task|question|content|"
        r"instruction) (?:[\w-]+ ){0,2}?(?:cannot|can't|could not|will not) be\b",
        r"\b(?:outside|beyond) (?:of )?(?:my|the scope)\b",
        r"\bnot something (?:that )?i\b",
    ),
    "unsuitable": (1.5, r"\b(?:not|n't) (?:suitable|appropriate|possible)\b"),
    "unchanged": (
        4,
        r"\bno (?:further )?(?:changes|edits|revisions|modifications)(?: (?:are|were|is|"
        r"have been))? ?(?:needed|necessary|required|made ?$)",
        r"\bno need (?:to|for) (?:me to |a )?(?:re\w+|edit|chang\w+)",
        r"\b(?:not|n't) (?:need|require) (?:to be |any |a )?(?:re\w+|edit\w*|chang\w+|modif\w+)",
        r"\bleft (?:it|the text) (?:unchanged|as it is)",
    ),
    "lost": (
        2.5,
        r"\bi (?:do not|don't|didn't|did not) (?:\w+ )?understand (?:what you|the|your|this)\b",
        r"\btrouble understanding\b",
        r"\bclarify (?:what|how|your)\b",
        r"\b(?:i'm|i am) (?:\w+ )?(?:not (?:\w+ )?(?:sure|certain|clear)|unsure|confused)\b",
    ),
    "policy": (
        4,
        r"\b(?:violat\w+|against|breach\w*|conflict\w* with) (?:\w+ ){0,3}?(?:my|our|usage|"
        r"content|openai\S*|google\S*|ai|safety|community|ethical|"
        r"platform) (?:\w+ ){0,2}?(?:polic\w+|guidelines?|programming|principles|terms|ethic\w*|"
        r"values|rules|standards)\b",
        r"\bhelpful and harmless\b",
        r"\b(?:designed|programmed) to be (?:an? )?(?:helpful|harmless|safe)\b",
    ),
    "absent": (
        2.5,
        r"\b(?:no|any) (?:[\w-]+ )?<TEXT> (?:was|were|is|has been|to re\w+|provided|given|"
        r"in your|here|for me|attached|included|missing)\b",
        r"\b(?:nothing|anything) (?:for me )?(?:here )?to (?:<REWORK>|edit|work|change|redact|"
        r"censor)",
        r"\bthere (?:is|was|are|appears to be|seems to be) (?:no|"
        r"not any) (?:[\w-]+ )?<TEXT>(?: (?:to|provided|given|in your|here)\b|[.,!]|$)",
        r"\b(?:<TEXT>|message|request) (?:is|was|appears? to be|seems? to be) (?:empty|blank)\b",
        r"\b(?:empty|blank) (?:message|prompt|input|text|request)\b",
        r"\bi (?:don't|do not|didn't) (?:see|find|have) (?:\w+ ){0,2}?<TEXT>",
        r"\byou (?:haven't|have not|didn't|did not|forgot|may have forgotten|"
        r"seem to have forgotten) ?(?:yet |actually |to )*(?:provid|includ|past|attach|shar|giv|"
        r"specif|suppl|add|submit)\w*",
    ),
    "missing": (
        1.5,
        r"\b(?:incomplete|cut[\s-]+(?:off|short)|truncated|unclear|ambiguous|too vague|vague|"
        r"garbled|unfinished|nonsens\w+|gibberish|fragment(?:ed|ary)?|missing|too (?:short|long|"
        r"brief)|not (?:\w+ ){0,2}?(?:clear|complete|provided|included|available|enough|"
        r"sufficient|coherent)|(?:not|n't) (?:\w+ )?make (?:any )?sense|insufficient|partial)\b",
    ),
    "nothing": (
        2,
        r"\b(?:<TEXT>|information|context|message|content|article|"
        r"document)[^.]{0,60}?\b(?:do(?:es)? not|doesn't|don't|has no|says nothing|mentions no|"
        r"contains no|lacks) ?(?:seem to |appear to |actually |explicitly )*(?:contain|mention|"
        r"specify|include|provide|describe|indicate|state|give|have|say|discuss|any|about|\w+)\b",
    ),
    "not in it": (
        2,
        r"\b(?:is|are) not (?:\w+ )?(?:included|mentioned|provided|available|specified|stated|"
        r"given|found|present) in (?:the|this|your) (?:\w+ )?<TEXT>",
    ),
    "access": (
        2.5,
        r"\b(?:access|open|view|visit|brows\w+|click|see|download|watch|retrieve|read|"
        r"play)\b[^.]{0,50}\b(?:external|internet|urls?|hyperlinks?|real-time|links\b|"
        r"links? you|files? or|contents? of (?:the|this|that|your) (?:link|file|page|website|"
        r"document|url|article)|or (?:files|links|attachments|videos|images)|websites?|"
        r"web ?pages?|images? (?:or|you)|\w+ (?:that )?you (?:\w+ )?(?:provid|mention|refer|"
        r"link|upload)\w*)",
    ),
    "back": (
        1.5,
        r"\b(?:please|could you|can you|would you|kindly) (?:\w+ )?(?:provide|share|paste|"
        r"clarify|specify|rephrase|elaborate|supply|send|give|submit|include|upload|enter|tell|"
        r"type)\b",
        r"\b(?:what|which|how) (?:\w+ )?(?:text|passage|prompt|would you|do you|should i)\b",
        r"\btry again\b",
        r"\b(?:if|once|when) you (?:could |can )?(?:provid|shar|past|clarif|specif|giv)\w*",
    ),
    "need": (
        2,
        r"\bi ?(?:'ll|'d| will| would)? (?:need|require) (?:\w+ ){0,2}?(?:to (?:know|see|have)|"
        r"context|information|details|clarification|text|document|original|passage)\b",
        r"\b(?:don't|do not) have (?:enough|sufficient|the necessary|any) (?:\w+ )?(?:context|"
        r"information|details)",
    ),
}
# what they need beside them: things of the task
_THINGS: dict[str, tuple] = {
    "unclear": (
        3,
        r"\byour (?:message|request|question|prompt|instruction)s? (?:is|was|seems?|appears?|"
        r"looks?)\b[^.]{0,30}\b(?:incomplete|cut off|unclear|ambiguous|vague|truncated|empty|"
        r"confusing|not clear)\b",
    ),
    "text": (
        2,
        r"\b(?:this|the|your|any|no|some|provided|given|original|full|that|complete|whole|what|"
        r"which|of) (?:[\w'-]+ ){0,2}?<TEXT>",
        r"\btext (?:to|provided)\b",
    ),
    "task": (
        2,
        r"\b(?:this|that|the|your|such|any|its|requested|these|those|kind of|"
        r"of) (?:[\w-]+ ){0,2}?(?:requests?|tasks?|instructions?|query|question|content|"
        r"material|responses?|topics?|theme|conversation|transformation|version|rewrite|"
        r"role-?play)\b(?! (?:for|about|from|until|on|today|by|of the)\b)",
        r"\ba (?:\w+ )?(?:response|rewrite)\b",
        r"\b(?:process|complete|fulfill?|perform) (?:request|task|action)s?\b",
        r"\b(?:tasks|actions|content|material|information|stories|jokes|requests|responses|"
        r"output|lyrics|topics?) (?:that|which|of (?:this|that)|involving|containing|promoting|"
        r"depicting|intended|deemed)\b",
    ),
    "rework": (2, r"\b<REWORK>"),
    "harm": (
        2,
        r"\b(?:harmful|explicit|offensive|sexual\w*|violence|hateful|hate speech|inappropriate|"
        r"unethical|illegal|discriminat\w+|suggestive|disrespectful|abusive|misinformation|"
        r"disinformation|derogatory|profan\w+|racis\w+|sexis\w+|obscene|defam\w+|copyright\w*|"
        r"self-harm|stereotyp\w+|misleading|demean\w*|impersonat\w+|(?:medical|legal|"
        r"financial) advice|personal (?:opinions?|information|data|feelings|experiences?|"
        r"beliefs|views)|weapons?|bombs?|drugs|mak\w+ fun of)\b",
    ),
    "gave": (
        1.5,
        r"\byou(?:'ve| have)? (?:just |only )?(?:provid|giv|gave|shar|past|mention|submitt|"
        r"suppli|request|referr)\w*",
        r"\b(?:provided|given|submitted|supplied) (?:<TEXT>|content|information|context|"
        r"material)",
        r"\b(?:<TEXT>|content|context) (?:provided|given|above)\b",
    ),
    "want": (
        2.5,
        r"\byou(?:'d| would)? (?:like|want|need|wish)\w* (?:me to (?:<REWORK>|re\w+|do\b|work|"
        r"edit|help|improve|change|use|apply)|re\w+|edited|changed|it (?:to be )?re\w+)",
        r"\bwhat you mean\b",
        r"\bpaste\b[^.]*\b(?:here|below|text)\b",
        r"\byou(?:'re| are) (?:asking|requesting|referring)",
        r"\bfor me to (?:re\w+|work|edit|transform)",
    ),
    "more": (
        1.5,
        r"\b(?:more|enough|additional|further|sufficient|necessary) (?:\w+ )?(?:context|"
        r"information|details|clarification)\b",
        r"\b(?:rest|remainder|remaining|full|complete|entire|whole) (?:of )?(?:the |"
        r"your )?(?:part|portion|text|passage|paragraph|sentence|message|it\b)",
    ),
    "make": (
        0.5,
        r"\b(?:generat\w+|creat(?:e|ing)|produc(?:e|ing)|provid(?:e|ing)|complet(?:e|ing)|"
        r"fulfill?\w*|comply|process|perform|engag\w+|assist\w*|continu(?:e|ing)|craft|respond|"
        r"answer|participat\w+|discuss|reproduce|support|writ(?:e|ing)|determine|identify|"
        r"redact|turn|mak(?:e|ing))\b",
    ),
    "detail": (
        1.5,
        r"\b(?:a|the|which|what|some) (?:\w+ )?(?:style|tone|format|audience)\b",
    ),
    "offer": (1, r"\b(?:happy|glad|ready|here|love) to (?:help|assist|re\w+)"),
    "remote": (
        1,
        r"\b(?:real-time|up-to-date|current events|the internet|external)\b",
    ),
    "so": (
        0.5,
        r"\b(?:therefore|thus|hence)\b",
        r"[,;] so (?:i|it|there)\b",
    ),
    "sorry": (0.5, r"^<SORRY>"),
}
# other people's refusals
_AGAINST: dict[str, tuple] = {
    "we": (
        -1.5,
        r"^(?:\w+,? (?:but )?)?we\b",
        r"\b(?:but|sorry,?|that) we\b",
    ),
    "other": (-1.5, r"^(?:he|she|they|her|his|their|we|our)\b"),
    "told": (
        -4,
        r"""[\"\u201d'\u2019],? (?:said|answered|cried|\w+ said)\b""",
        r", (?:said (?!to\b)|(?:he|she|they|(?:the )?\w+) (?:said|says|explained|thought|told|"
        r"wrote))",
    ),
}


def _compiled(*patterns: str) -> re.Pattern[str]:
    whole = "|".join(patterns)
    for name, meaning in _NAMES.items():
        whole = whole.replace(name, meaning)
    return re.compile(whole.replace(" ?", r"\s*").replace(" ", r"\s+"), re.IGNORECASE)


_ALL = _ACTS | _THINGS | _AGAINST
_SIGNS = {name: (points, _compiled(*patterns)) for name, (points, *patterns) in _ALL.items()}
# a first sentence that decides nothing
_PREFACE = _compiled(
    r"(?:oh,? )?(?:<SORRY>\b.{0,60}|(?:thank you|thanks)\b.{0,80}|"
    r"i (?:\w+ )?(?:understand|appreciate|see|know|hear)\b.{0,120}|"
    r"(?:sure|certainly|of course|absolutely|okay|ok|hello|hi|hey|great)\b.{0,30}|"
    r"(?:i'd|i would|i'm|i am) (?:be )?(?:\w+ )?(?:happy|glad|here|ready)\b.{0,60})[.!:,]*"
)
_LABEL = re.compile(
    r"[\s\"'\u201c*_#>\[(`-]*"
    r"(?:(?:note|response|answer|output|assistant|model|ai|disclaimer|warning|error)\s*:[\s*\"']*)?",
    re.IGNORECASE,
)
# "ALICE: I can't help you with that."
_SPEAKER = re.compile(r"[\w .'-]{1,40}:\s")


def is_refusal(text: str) -> bool:
    """Whether a rewritten text is an LLM's refusal of the request, or another non-answer to it."""
    plain = strip_lead_in(text).translate({0x2019: "'", 0x2018: "'"})
    label = _LABEL.match(plain)
    start = label.end() if label else 0
    if _SPEAKER.match(plain, start):
        return False
    short = len(plain) < SHORT
    plain = plain[start : start + FIRST].rstrip("])*_\"' \n\u201d")
    sentences = [each for each in re.split(r"(?<=[.!?])\s+|\n+", plain) if each][:SENTENCES]
    prefaces = 0
    while prefaces < len(sentences) - 1 and _PREFACE.fullmatch(sentences[prefaces]):
        prefaces += 1
    found: dict[str, float] = {}
    for place, sentence in enumerate(sentences):
        share = 1.0 if place == prefaces else 0.5
        for name, (points, pattern) in _SIGNS.items():
            if pattern.search(sentence) and (short or name != "bare"):
                found[name] = max(found.get(name, -9.0), share * points)
    return bool(_ACTS.keys() & found) and sum(found.values()) >= THRESHOLD
