"""What an LLM wrote where a rewrite should stand: refusals and other non-answers.

No single word tells a refusal. "I cannot believe how warm it was" is a diary, "I'm sorry, but I
can't come on Saturday" a letter, "The text of the treaty was signed in Paris" a report. A refusal
speaks as the assistant about the task, in its first sentences; a rewrite speaks about its own
matter, with people, dates and a past. So signs have points: acts of refusing, things of the task,
and, with negative points, a life of its own. A refusal has an act and THRESHOLD points or more.

The points began as a logistic regression over the lists that LOG.md names, rounded and then set by
hand where a sign is rare.
"""

from __future__ import annotations

import re

from prompt_recovery.cleaning import strip_lead_in

THRESHOLD = 4.0
FIRST, SENTENCES = 600, 4  # characters and sentences looked at: a refusal says so at once
SHORT = 300  # characters; "I can't do that." and no more refuses, a diary goes on

# What the names in the patterns stand for
_NAMES = {
    "<TEXT>": (r"(?:texts?|passages?|paragraphs?|prompts?|excerpts?|snippets?|sentences?|input)\b"),
    "<FILE>": (
        r"(?:essays?|articles?|documents?|drafts?|files?|attachments?|links?|urls?|websites?|"
        r"web|web ?pages?|pdfs?|internet|images?|photos?|pictures?|videos?|recordings?|"
        r"emails?)\b"
    ),
    "<ASK>": (
        r"(?:requests?|instructions?|tasks?|messages?|questions?|query|content|material|"
        r"responses?|transformation|conversation|context|information)\b"
    ),
    "<REWORK>": (
        r"(?:re-?(?:writ|phras|word|work|design|formatt?|structur|styl|cast|tell|"
        r"told)\w*(?! (?:history|the past)\b)|(?:paraphras|convert|translat|transform|"
        r"summari[sz]|adapt|simplif|shorten|proofread|imitat|condens|format)\w*|revis(?:e|ed|"
        r"ing|ion)\b|edit(?:s|ed|ing)?\b|turn(?:ed)? (?:this|that|it|the)\b)"
    ),
    "<MAKE>": (
        r"(?:generat|creat|produc|provid|complet|fulfil|compl(?:y|ies)|process|perform|engag|"
        r"assist|help|continu|craft|respon[ds]|answer|participat|discuss|reproduc|support|"
        r"writ(?:e|ing)|shar|determin|redact|carry out|execut|deliver|oblig|honou?r|modif|"
        r"improv|remov|replac|extract|add\b|insert|includ|expand|compos|mak(?:e|ing)|merge|"
        r"render|replicat|say\b|tell\b)\w*"
    ),
    "<NOT>": (
        r"(?:we (?:cannot|can't|are unable to) (?=<REWORK>)|i(?:'ll| will)? (?:\w+ly |also |"
        r"just |still |must |would |have to |in \w+ \w+ )*(?:cannot|can't|can not|won't|"
        r"will not|(?:could not|couldn't) (?=generate|process|complete|produce|create|re-?w|"
        r"make sense)|refuse|decline|not be able)|(?:^|\b(?:and|but|i'm|am|be) )(?:\w+ly |"
        r"also |just )*(?:unable|not (?:\w+ly )?(?:able|allowed|permitted|supposed|going|"
        r"willing|capable|comfortable|equipped|programmed|designed|trained|qualified|"
        r"in a position))|i(?:'d| would) (?:rather|prefer) not|\b(?:and|which|"
        r"but) (?:i )?(?:cannot|can't|won't)|i (?:don't|do not) (?:feel|think i should|"
        r"have the (?:\w+ )?(?:ability|capability)))"
    ),
    "<MODEL>": (
        r"(?:ai|artificial intelligence|(?:\w+ )?language model|text-based (?:model|assistant|"
        r"ai)|chatbot|llm|virtual assistant|machine learning model|computer program|bard|"
        r"chatgpt)\b(?! (?!language|model|assistant|chatbot|system|program|and|so|by|but|i|my|"
        r"it|created|developed|trained|designed)\w)"
    ),
    "<SORRY>": (
        r"(?:(?:i'm|i am) (?:\w+ ){0,2}(?:sorry|afraid)|sorry|my (?:\w+ )?apologies|apologies|"
        r"i (?:\w+ )?apologi[sz]e|i regret(?: to say)?|unfortunately|regrettably|sadly)\b"
    ),
    "<LACK>": (
        r"(?:incomplete|cut[ -](?:off|short)|truncated|unclear|ambiguous|vague|garbled|"
        r"corrupted|unfinished|nonsens\w+|gibberish|incoherent|fragment\w*|missing|empty|blank|"
        r"too (?:short|long|brief)|(?:not|n't) (?:\w+ ){0,2}?(?:clear|complete|provided|"
        r"included|attached|available|enough|sufficient|suitable|make (?:any )?sense)|"
        r"random (?:characters|letters|string)|mid-sentence|confusing|abruptly|breaks? off|"
        r"not a valid|contradict\w*|lacks)\b"
    ),
}
# What a refusal does: says no, speaks of itself, misses something, asks back
_ACTS: dict[str, tuple] = {
    "cannot": (
        1,
        r"<NOT>",
    ),
    "cannot make": (
        2,
        r"<NOT>(?: to| be able to| in any way)? <MAKE>",
        r"<NOT> (?:\w+ ){0,2}<MAKE>ing\b",
    ),
    "cannot this": (
        1,
        r"<NOT>(?: [\w-]+){1,2}? (?:with )?(?:this|that|it|such|these|so)(?: (?:for you|in|as|"
        r"because|since|kind|type|sort|without|any further|(?:\w+ )?<TEXT>|<ASK>)|[,.!;]|$)",
        r"<NOT>(?: [\w-]+){1,5}? (?:this|the|your|the given|"
        r"the provided) (?:[\w-]+ ){0,2}(?:<TEXT>|requests?\b|tasks?\b|instructions?\b)",
        r"<NOT> (?:oblige|comply)\W*$",
    ),
    "bare": (
        3.5,
        r"(?<!why i )(?:^|(?<!why )\bi |\bi'm |\bam |\bi'll |\band |\bbe )(?:\w+ly |also |"
        r"still )?(?:cannot|can't|unable to|not (?:\w+ )?able to|won't|will not)(?: (?:be|able|"
        r"to|help|assist|do|comply|proceed|fulfill?|engage|generate|perform|create|write|"
        r"complete|with|in|this|that|so|you|for|kind|sort|of|any|such|requests?|action|at|"
        r"time))*[.!]*$",
    ),
    "passive": (
        1.5,
        r"\b(?:<TEXT>|request|task|question|content|version|rewrite|"
        r"instruction)\b[^.]{0,60}\b(?:cannot|can't|could not|will not|won't|can) be\b",
        r"\bno (?:rewrite|rewritten)\b",
        r"\brequest denied\b",
        r"\b(?:content|response) (?:was |has been )?(?:removed|blocked|flagged)",
    ),
    "impossible": (
        1,
        r"\bappropriate for me to\b",
        r"(?:\bnot|n't|hard|difficult|\w*possible|unethical|inappropriate|wrong|"
        r"irresponsible)(?: be)?(?: possible| feasible| appropriate| ethical|"
        r" right)? (?:for me )?to (?:<REWORK>|<MAKE>|joke|turn)",
        r"(?:\bnot|n't|im|would be in)(?: be| believe [^.]{0,30})? ?(?:possible|appropriate)\b",
        r"^without\b[^.]*\b(?:hard|difficult)\b",
    ),
    "not mine": (
        4,
        r"(?:\bnot|n't) (?:\w+ )?(?:something|a task|content|one)(?: that| which)? i(?:'m| am|"
        r" can)?(?: (?:able|comfortable|do|help|create|write|perform|rewrite)\b|[.!]*$)",
        r"\b(?:something|content|topic) (?:that )?i (?:don't|can't|cannot|have to)\b",
        r"\b(?:beyond|outside)(?: of)? (?:me\b|my\b|what i\b)",
        r"\bpass on this\b|\bi have to decline\b|\bchoosing not to\b|\bgoing to stop here\b|"
        r"\bskip this\b|\brequest i have to\b",
        r"\bi can only (?:respond|answer|provide|process)\b",
        r"^no (?:changes|edits) (?:are |were )?(?:needed|necessary|made)\W*$",
    ),
    "itself": (
        4,
        r"\b(?:as|being) (?:an? )?(?:[\w-]+ ){0,3}?<MODEL>(?! \w+ (?:for|at|in)\b)",
        r"\b(?:i am|i'm) (?:\w+ ){0,2}(?:an? )?(?:[\w-]+ ){0,2}?<MODEL>",
        r"^the (?:assistant|model) (?:cannot|is unable|declined|refused)",
        r"^\W?the model (?:declined|refused)",
        r"\b(?:i am|i'm) (?:\w+ )?(?:not )?(?:designed|programmed) to (?:be|provide|help|"
        r"assist|follow|write|generate)",
    ),
    "rules": (
        4,
        r"\b(?:against|beyond|outside|violat\w+|breach\w*|in violation|strive|our|my|usage|"
        r"with) (?:[\w'-]+ ){0,3}?(?:polic\w+|guidelines|programming|principles|capabilities|"
        r"capability|ethical standards|scope|safety filter)\b",
        r"\bmy (?:programming|training data|knowledge (?:cut-?off|ends in \d)|"
        r"purpose is to (?:help|assist))",
        r"\bbeyond (?:me|what i can)\b|\boutside (?:of )?what i\b",
        r"\bpolicy violation\b",
        r"\bhelpful and harmless\b",
    ),
    "no senses": (
        3,
        r"\bi (?:do not|don't) engage in\b",
        r"\bbrowsing capabilities|\bprevious (?:chats?|conversations?)|\bonly respond",
        r"\bi (?:do not|don't|have no|lack)(?: have| retain| actually|"
        r" currently)? (?:\w+ ){0,2}?(?:access|ability|capability|memory|way of|feelings|"
        r"emotions|a body|personal|hometown|childhood|opinions?|experiences?)\b",
    ),
    "greeting": (
        4,
        r"\bhow (?:can|may) i (?:help|assist) you(?: today)?\?$",
    ),
    "error": (
        3,
        r"\b(?:an error|something went wrong|couldn't generate|unable to process)\b",
    ),
    "lack": (
        1.5,
        r"\b(?:<TEXT>|<ASK>|it|here|your \w+)\b[^.]{0,60}\b<LACK>",
        r"^<LACK>",
        r"<LACK> (?:from )?(?:your|the|this) (?:<TEXT>|<ASK>)",
        r"\blink\b.{0,20}\bnot work\b",
    ),
    "your lack": (
        2,
        r"\byour (?:<TEXT>|request|message|prompt|question|instruction)s? [^.]{0,40}(?:<LACK>|"
        r"stops|ends)",
    ),
    "nothing": (
        2,
        r"\b(?:this|the|given|provided) (?:\w+ ){0,2}?(?:<TEXT>|context|information|content|"
        r"article|document)[^.]{0,60}?\b(?:do(?:es)? not|doesn't|don't|has no\w*|says nothing|"
        r"holds nothing|(?:mention|contain)s (?:no|only)|lacks)\b",
        r"\b(?:no|not any|nothing|not) [^.]{0,40}\b(?:in|from|of|to) (?:the|this|"
        r"your) (?:[\w-]+ )?(?:<TEXT>|message|request)",
        r"\bnothing (?:to|for me|has to)\b",
        r"\bthere (?:is|are|'s) no\b[^.]{0,60}\b(?:<TEXT>|this)",
        r"\bit (?:does not|doesn't) (?:mention|contain|describe|include)\b",
    ),
    "absent": (
        3,
        r"\b(?:no|any) (?:[\w-]+ )?<TEXT>(?: (?:was|were|is|has been|to re\w+|provided|given|"
        r"found|detected|in your|here|for me|attached|seems)\b|[.!])",
        r"\b(?:nothing|anything|no content) (?:for me )?(?:here )?to (?:<REWORK>|work|redact|"
        r"convert|correct)",
        r"\bi (?:only |don't |do not |didn't |can't seem to )+(?:seem to )?(?:see|find|have|"
        r"received?)\b[^.]{0,20}(?:<TEXT>|<FILE>|one\b|title|instruction)",
        r"\byou (?:may have |seem to have |did not |didn't |have not |haven't |forgot |"
        r"forgotten |actually )+(?:to )?(?:yet )?(?:provid|includ|past|attach|shar|giv|specif|"
        r"suppl|add)\w*",
        r"\bempty message\b",
        r"\b(?:came?|come) through\b",
        r"\bi only (?:see|received)\b|\bonly part of your\b",
        r"\b(?:nothing|no letter|only one \w+) (?:of them )?was (?:attached|supplied)",
        r"\b(?:<TEXT>|message|request) (?:is|was|appears? to be|seems? to be) (?:empty|blank)\b",
        r"\bno (?:<TEXT>|<FILE>) (?:to (?:<REWORK>|<MAKE>)|here|seems?)",
        r"\byou (?:haven't|have not|didn't) (?:told|tell|say|said)\b",
        r"\bnot enough (?:text|context)\b",
    ),
    "unchanged": (
        3,
        r"\b(?:<TEXT>|this) (?:you (?:have )?provided )?(?:is|appears to be|seems) (?:already|"
        r"fine)\b",
        r"\bno (?:further )?(?:changes|edits|revisions) (?:\w+ )?(?:needed|necessary|required|"
        r"made)[.]*$",
        r"(?:\bnot|n't) (?:need|require)\w*(?: to be| any| a| further)? (?:re\w+|edit\w*|"
        r"chang\w+|shorten\w+)",
        r"\bno need (?:to|for) (?:me to |a )?(?:rew\w+|edit)",
        r"\b(?:left (?:it|the text)|remains?) unchanged",
    ),
    "need": (
        2.5,
        r"\bwithout\b[^.]*\b(?:knowing|context|information|original)\b[^.]*\b(?:hard|difficult|"
        r"cannot|can't)\b",
        r"\bi ?(?:'ll|'d| will| would)? (?:need|require) (?:\w+ ){0,3}?(?:to (?:know|see|have|"
        r"go on)|context|information|details|clarification|text|document|original|passage|"
        r"article)\b",
        r"\b(?:don't|do not) have (?:enough|sufficient|the necessary|any) (?:\w+ )?(?:context|"
        r"information|details)",
        r"\bbefore i (?:start|re\w+|can re\w+)",
        r"\bwithout (?:more|additional|knowing|further|the original)\b",
    ),
    "lost": (
        2,
        r"\bi (?:do not|don't|didn't|did not|couldn't) (?:\w+ )?(?:understand|"
        r"make sense of) (?:what (?:you|is)|the (?:request|text|instruction)|your|this)\b",
        r"\b(?:trouble|difficulty) (?:understanding|interpreting)\b",
        r"\bclarify (?:what|how|your)\b",
        r"\b(?:not (?:\w+ )?(?:sure|certain|clear)(?: to me)?|unsure|unclear|"
        r"confused)(?: \w+)? (?:what|how|which|by your|i (?:follow|understand))\b",
    ),
    "back": (
        1,
        r"\b(?:please|could you|can you|would you(?: mind)?|kindly|did you mean to|"
        r"go ahead and) (?:\w+ )?(?:provid|shar|past|clarif|specif|rephras|elaborat|explain|"
        r"send|giv|re-?send|upload|enter|tell me|let me know)\w*",
        r"\blet me know\b",
        r"\b(?:if|once|when) you (?:could |can |have |provid|shar|past|clarif|specif|let)\w*",
        r"\b(?:what|which|who|how|whose)\b[^.]*\b(?:should|would you|do you|me to|'s the text|"
        r"is the (?:text|intended)|did you have)\b[^.]*\?|^(?:do you want|would you like|"
        r"is there more)\b",
        r"\b(?:shall i|may i (?:ask|change)|would you like that|try again)\b",
        r"\bthen (?:what|which)|^send me\b",
        r"\bi'll wait for\b|\bonce i have\b|\byou'll (?:have|need) to (?:paste|share|provide|"
        r"send)\b",
        r"\bjust (?:send|paste|share)\b",
    ),
    "offer": (
        1,
        r"\b(?:happy|glad|ready|here|love) to (?:help|assist|re\w+|make it)\b",
        r"\bi(?:'d| would)? (?:can|could|will|do my best to) (?:\w+ ){0,3}?(?:offer|write (?:a|"
        r"the)|re-?write|make it|help with)",
        r"\bi (?:can|could|will) (?:\w+ ){0,2}?(?:re-?write|offer|write a version)",
    ),
}
# What it speaks of: the text, the task, the file it was given
_THINGS: dict[str, tuple] = {
    "text": (
        2,
        r"\b(?:the|any|no|full|that|what|which|some|a) (?:[\w'-]+ ){0,2}?<TEXT>",
        r"^no <TEXT>",
        r"\benough <TEXT>",
    ),
    "this text": (
        2.5,
        r"\b(?:this|your|given|provided|original|above) (?:[\w'-]+ )?<TEXT>",
        r"\btext (?:to (?!be sent)|provided|you)\b",
        r"\bthe text (?:is (?:already|fine|not|too|in|incomplete|unclear|empty|about)|cannot|"
        r"seems|appears|describes|to|above|as|into|so|in (?:a|this|that|the (?:style|way)))\b",
        r"<TEXT>[.?!]*$",
        r"\b(?:the|your) (?:\w+ )?(?:prompt|input) (?:is|was|seems|appears|does|asks|"
        r"contains)\b",
    ),
    "given": (
        1.5,
        r"\b(?:given|provided|shared|above|requested|submitted) (?:<TEXT>|<ASK>|<FILE>)",
        r"\b(?:<TEXT>|<ASK>|<FILE>) (?:you(?:'ve| have)? )?(?:just )?(?:provided|given|above|"
        r"gave|shared|sent|mention|asked|request|submit)",
        r"\byou(?:'ve| have)? (?:just |only )?(?:provided|given|gave|mention\w*|asked (?:for|"
        r"me)|shared)\b",
        r"\bas requested\b",
    ),
    "task": (
        3,
        r"\b(?:this|that|the|your|the user's|such) (?:[\w-]+ ){0,2}?(?:requests?|tasks?|"
        r"instructions?|query|transformation|version|rewrite|role-?play|"
        r"conversation)\b(?! (?:manual|form|for|about|from|until|on|today|by|of the)\b)",
        r"\b(?:this|that|such|the requested|kind of|content|material|responses) (?:kind of |"
        r"sort of |type of )?(?:content|material|responses?|topics?|theme|that|which)\b",
        r"\bto (?:answer|generate|complete) (?:the|a|this) (?:question|response|request)",
        r"\bprevious (?:chats?|conversations?)\b",
        r"\b(?:not|n't) (?:\w+ )?a task\b",
        r"\ba (?:\w+ )?(?:response|rewrite)\b",
        r"\bin your message\b",
    ),
    "rework": (
        1.5,
        r"\b<REWORK>",
    ),
    "rework it": (
        3,
        r"\b(?:<REWORK>|improve|change|work on|work with|transform\w*)(?: on)? (?:this|it|that|"
        r"the (?:\w+ )?(?:<TEXT>|<FILE>)|something else)\b",
    ),
    "want": (
        3,
        r"\byou (?:did not|didn't) specify\b",
        r"\byou(?:'d| would)? (?:like|want|need|wish)\w* (?:me to|it|to have|to|that|"
        r"the text)? ?(?:<REWORK>|re\w+|do with (?:this|it|the)|work|edit\w*|improve|change\w*|"
        r"use\b)",
        r"\bwhat(?:'s| is)? (?:you mean|is being asked|the text)\b",
        r"\b(?:you(?:'re| are) (?:asking|requesting|referring|after)|are you looking for)\b",
        r"\bdo with (?:this|it)\b",
        r"\bi (?:should|shall) re",
        r"\byou're going for\b|\bas satire\b|\bi do with it\b",
        r"\bwhat you want me to do\b|\b(?:kind|sort) of \w+ you want\b|\bwho it is for\b|"
        r"\bdo you mean by\b",
    ),
    "harm": (
        3,
        r"\b(?:harmful|explicit|offensive|sexual\w*|violen\w+|hate(?:ful)?|hatred|"
        r"inappropriate|unethical|illegal|discriminat\w+|suggestive|disrespect\w+|abusive|"
        r"(?:mis|dis)information|derogatory|profan\w+|racis\w+|racial|sexis\w+|sensitive|"
        r"copyright\w*|self-harm|stereotyp\w+|misleading|demean\w*|impersonat\w+|propaganda|"
        r"(?:medical|legal|financial) advice|personal (?:opinions?|information|data|feelings|"
        r"experiences?)|weapons?|bombs?|mak\w+ fun of|mock\w*|minors|dangerous|glorif\w+|"
        r"promot\w+|threaten\w*|insult\w*)\b",
    ),
    "access": (
        3,
        r"\b(?:access|open|visit|brows\w+|click|look up|download|retrieve|viewing|view|"
        r"transcribe)\b[^.]{0,40}\b(?:<FILE>|real-time|current|google drive|spreadsheet|them\b)",
        r"\bsee the (?:image|picture|page)s?\b",
        r"\bwatching videos\b|\brun commands\b|\bedit images\b|\breal-time\b",
    ),
    "back text": (
        1.5,
        r"^[^.]{0,60}\b(?:style|tone|audience)\b[^.]*\?",
        r"\b(?:provid|shar|past|send|enter|giv|upload|wait for|need|requir|receiv|have|see|"
        r"which|what|let me know|resend)\w*\b[^.]{0,40}\b(?:<TEXT>|rewrite|re-?written|"
        r"what text|style|tone|audience)\b",
        r"\bsend (?:me )?the rest\b",
    ),
}
# What a rewrite has instead: a life of its own, with people and dates
_LIFE: dict[str, tuple] = {
    "others": (
        -2,
        r"\b(?:he|she|him|her|hers|his|they|we|us|ours)\b(?! perspective)",
        r"\bour (?!guidelines|polic|usage|content polic|previous|chat|conversation)",
    ),
    "mine": (
        -2.5,
        r"\bmy (?!(?:\w+ )?(?:apologies|guidelines|programming|polic\w+|capabilit\w+|abilit\w+|"
        r"knowledge|training|purpose|best|principles|understanding|ethical|safety|content|"
        r"holidays)\b)",
    ),
    "told": (
        -6,
        r"""[\"\u201d',?!] (?:\w+ ){0,3}?(?:said(?! to)|says|whispered|cried|replied|answered|"""
        r"asked|wrote|thought|muttered|explained|told|warned|argues|reported|admitted|declared|"
        r"sang|droned|demanded|boasted|seemed to say)\b",
        r"\b(?:he|she|they|the \w+) (?:said|says|explained|thought|told|wrote|replied|muttered|"
        r"asked|demanded)\b",
    ),
    "dates": (
        -2.5,
        r"\b(?:mondays?|tuesday|wednesday|thursday|friday|saturday|sundays?|tomorrow|yesterday|"
        r"tonight|january|february|march|april|june|july|august|september|october|november|"
        r"december|any ?more|years?|week|until|summer|winter|spring|autumn|noon|always|never|"
        r"morning|night)\b",
    ),
    "addressed": (
        -2,
        r"^(?:dear|hi|hello|hey) (?!there)\w+",
        r"[,;!] (?:my (?:dear|love|lord|friends?)|sir|madam|your (?:honour|majesty)|(?:dear|"
        r"darling|love|mate|officer|inspector|captain|traveller|boss|kids|folks|father|mum|"
        r"doctor|young man)\b)",
        r"(?-i:, [A-Z][a-z]+[,.!?;])",
    ),
    "past": (
        -2.5,
        r"\b(?:was|were|had|went(?! wrong)|came|sold|left|asked me|told|fell|stayed|turned|"
        r"lost|wrote|refused|could)\b(?! (?:no|not|be|you|not be|un\w+|incomplete|empty|cut|"
        r"truncated|attached|provided|supplied|given|flagged|blocked|removed|i|make|write|"
        r"offer|only|share|paste|send|explain|forgotten|used|missing|made)\b)",
    ),
    "own text": (
        -2.5,
        r"<TEXT>(?:'s)? (?:of (?!the text)|on (?:the|a|her|his)\b|about (?!the text)|between|"
        r"payment|messages?|arrived)|\b(?:text|information|changes|photos?) (?:in|from|on|"
        r"to) (?:the|this) (?!(?:\w+ )?(?:<TEXT>|chat|way|style|manner|form|language|message|"
        r"context))\w+",
        r", for (?:the|my|i|his|her|mine|it)\b",
        r"\bpassage (?-i:to [A-Z])",
        r"\b(?:message|question|content|document|article|request) (?:of|about|in|"
        r"for|on) (?:the|your|my|our|a)\b(?! (?:text|message|request|passage|prompt|context|"
        r"user|\w+ (?:text|passage)|file|link|page))",
        r"\byour (?:last )?(?:e-?mail|letter)\b",
    ),
}


def _compiled(*patterns: str) -> re.Pattern[str]:
    whole = "|".join(patterns)
    for _ in range(2):  # a name's meaning may hold another name
        for name, meaning in _NAMES.items():
            whole = whole.replace(name, meaning)
    return re.compile(whole, re.IGNORECASE)


_ALL = _ACTS | _THINGS | _LIFE
_SIGNS = {name: (points, _compiled(*patterns)) for name, (points, *patterns) in _ALL.items()}
# a first sentence that decides nothing
_PREFACE = _compiled(
    r"(?:oh,? )?(?:<SORRY>.{0,60}|(?:thank you|thanks)\b.{0,80}|what an? .{0,60}|"
    r"no(?: problem)?|it is important .{0,90}|"
    r"i (?:\w+ )?(?:understand|appreciate|see|know|hear)\b.{0,120}|"
    r"(?:sure|certainly|of course|absolutely|okay|ok|hello|hi|hey|great|got it)\b.{0,30}|"
    r"(?:i'd|i would|i'm|i am) (?:be )?(?:\w+ )?(?:happy|glad|here|ready)\b.{0,60})[.!:,]*"
)
_LABEL = re.compile(
    r"[\s\"'\u201c*_#>\[(`-]*"
    r"(?:(?:note|response|answer|output|assistant|model|ai|disclaimer|error|"
    r"request denied)\b\s*[:\n][\s*\"']*)?",
    re.IGNORECASE,
)
# "ALICE: I can't help you with that."
_SPEAKER = re.compile(r"(?!i\b)[\w .'-]{1,40}:\s", re.IGNORECASE)


def is_refusal(text: str) -> bool:
    """Whether a rewritten text is an LLM's refusal of the request, or another non-answer to it."""
    plain = strip_lead_in(text).translate({0x2019: "'", 0x2018: "'"})
    label = _LABEL.match(plain)
    start = label.end() if label else 0
    if _SPEAKER.match(plain, start):
        return False
    short = len(plain) < SHORT
    plain = plain[start : start + FIRST].rstrip("])*_\"' \n\u201d")
    sentences = [" ".join(each.split()) for each in re.split(r"(?<=[.!?])\s+|\n+", plain)]
    sentences = [each for each in sentences if each][:SENTENCES]
    prefaces = 0
    while prefaces < len(sentences) - 1 and _PREFACE.fullmatch(sentences[prefaces]):
        prefaces += 1
    found: dict[str, float] = {}
    for place, sentence in enumerate(sentences):
        for name, (points, pattern) in _SIGNS.items():
            if pattern.search(sentence) and (short or name != "bare"):
                share = 1.0 if place <= prefaces or name in _LIFE else 0.5
                found[name] = max(found.get(name, 0.0), share * points, key=abs)
    return bool(_ACTS.keys() & found) and sum(found.values()) >= THRESHOLD
