"""Analysis of a prompt's words, in English and in Russian, for triage.

`signs` counts the signs of a long or a hard answer. `kind` recognizes a few kinds of short, easy requests. Both use
lookups and anchored patterns. Their time is linear in the length of the text, which callers limit.
"""

from __future__ import annotations

import re

from pipeline.core import vocabulary

# Openings that ask for one fact.
_FACT_OPENINGS = re.compile(
    r"who(?:'s the| (?:(?:is|was|were) the|first|wrote|painted|invented|discovered|directed|founded|composed|sang|won"
    r"|built|created|designed|played|said|killed|led)) "
    r"|(?:when|in (?:what|which) year) (?:did|was|were) |where(?:'s| (?:is|are|was|were)) "
    r"|how (?:many|much|tall|far|old|long|deep|big|high|fast|heavy) |what does .{1,40} stand for"
    r"|кто (?:[\w-]+ ){0,2}[\w-]+(?:л|ла|ли|лся|лась)\b|кто так(?:ой|ая) "
    r"|когда (?:[\w-]+ ){0,1}[\w-]+(?:л|ла|ло|ли|лся|лась|лось|лись)\b"
    r"|где (?:находит|расположен|родил|умер|протека)|сколько |чему рав"
    r"|как (?:называ|зовут|звали|расшифров)|(?:в|на|при|из|с) как(?:ой|ом|их) "
)
# Openings that ask for one fact only if their object has a value (a capital, a year).
_QUESTION_OPENINGS = re.compile(
    r"(?:what|which|name|(?:at|in|on|to|from|by) (?:what|which)|назови(?:те)?"
    r"|как(?:ой|ая|ое|ие|ого|ую|им|ом|ова|ово|овы))\b"
)
# Any of these is an easy question if the prompt contains the text with the answer.
_ANY_QUESTION = re.compile(
    r"(?:who|when|where|what|which|how (?:many|much|long|old|far)|кто|когда|где|как(?:ой|ая|ое|ие)|сколько)\b"
)
_YES_NO = re.compile(
    r"(?:is|are|was|were) (?!it\b|there\b|this\b)(?:an? |the )?[\w-]+ (?:an?|the|part of|in|made of) [\w ]{1,30}\?"
    r"|(?:граничит|входит|является|находится) ли\b|[\w -]{1,25} (?:—|-) это [\w ]{1,25}\?"
)
_POLITE = re.compile(
    r"(?:please|can you|could you|would you|will you|tell me|let me know|i want to know|quick question"
    r"|hey|hi|hello|ok|пожалуйста|подскажи(?:те)?|скажи(?:те)?|мне|ответь|не могли бы вы|можешь(?: ли)?"
    r"|привет|а|и|ну)\b[\s,:.!-]*"
)
_DEFINITION = re.compile(
    r"(?:define|what (?:is|are) (?:an? )?[\w-]+\??$|what does .{1,40} (?:mean|stand for)|meaning of)"
    r"|что (?:такое [\w-]+(?:\?|$|\. )|значит|означает)|дай определение"
)
# Jobs that are recognized by the opening of the request.
_JOB_OPENINGS = (
    ("unit conversion", re.compile(r"convert \d+|переведи(?:те)? \d+ \w+ в ")),
    (
        "short translation",
        re.compile(
            r"how (?:do|would|can) (?:you|i|we|one) say .{1,60} in [a-z]{4,}|how to say .{1,60} in [a-z]{4,}"
            r"|what(?:'s| is) the [a-z]+ word for |как (?:будет )?по-\w+"
        ),
    ),
)
# Jobs that name their data inline ("the plural of mouse"). The others have it in quotes or after a colon.
_BARE_JOBS = frozenset({"small edit"})
_SUM_MARKS = re.compile(
    r"[+\-*/×÷%]|plus|minus|add|сложи|times|divided|sum|percent|плюс|минус|умнож|раздел|сумм|процент"
)
_WORDS = re.compile(r"\w+")
_QUOTED = re.compile(r"\"[^\"]*\"|«[^«»]*»|“[^“”]*”|`[^`]*`")
_SENTENCE_ENDS = re.compile(r"[.!?…](?=\s|$)")
_ENDS = (". ", "! ", "? ", ".\n", "!\n", "?\n")
_CHOICES = ("\nb. ", "\nb) ", " b. ", " b) ", "\nб. ", "\nб) ", " б. ", " б) ")
_BULLETS = ("\n- ", "\n* ", "\n• ", "\n1. ", "\n2. ", "\n1) ", "\n2) ")
_SYMBOLS = "=^+*/<>()[]{}|\\$_"
_AMOUNT = re.compile(
    r"\d\d[ -](?:word|page|paragraph|sentence|example|idea|name|countr|item|line"
    r"|слов|страниц|абзац|пример|предложени|иде|назван|стран|пункт|строк)"
)
_CONTEXT = re.compile(r"(?:context|text|passage|use only|given the text|контекст|текст|по тексту)\b")
_STEM_CHARS = 4
# A longer text is not a short request.
SHORT_CHARS = 800
_FACT_WORDS = 25
_OPENING_CHARS = 100
_OPENING_WORDS = 8


def normalize(text: str) -> str:
    """Text in the form that the lookups expect: lower case, with one spelling of ё and of the apostrophe."""
    return text.lower().replace("ё", "е").replace("’", "'")


def _index_words() -> dict[str, list[tuple[str, bool, str]]]:
    """First letters of a word → the entries to compare it with: the word or stem, whether it is a stem, its sign."""
    index: dict[str, list[tuple[str, bool, str]]] = {}
    for sign, words in vocabulary.SIGN_WORDS.items():
        for word in normalize(words).split():
            stem = word.removesuffix("*")
            index.setdefault(stem[:_STEM_CHARS], []).append((stem, word.endswith("*"), sign))
    return index


def _index_phrases() -> dict[str, list[tuple[str, str]]]:
    """First word of a phrase → the phrases and their signs. `""` has the phrases that do not begin with a word."""
    index: dict[str, list[tuple[str, str]]] = {}
    for sign, phrases in vocabulary.SIGN_PHRASES.items():
        for phrase in phrases:
            first = _WORDS.match(phrase)
            index.setdefault(first[0] if first else "", []).append((phrase, sign))
    return index


def _spaced(phrases: str) -> tuple[str, ...]:
    """The phrases of a comma-separated list, to be found in words that are joined by spaces."""
    joined = (" ".join(phrase.split()) for phrase in phrases.split(","))
    return tuple(f" {phrase.removesuffix('*')}" + ("" if phrase.endswith("*") else " ") for phrase in joined)


_INDEX = _index_words()
_PHRASES = _index_phrases()
_JOB_PHRASES = {job: _spaced(phrases) for job, phrases in vocabulary.JOB_PHRASES.items()}
JOBS = frozenset((*_JOB_PHRASES, *(job for job, _ in _JOB_OPENINGS)))
_BRIEF_PHRASES = _spaced(vocabulary.BRIEF_PHRASES)
_ATTRIBUTES = tuple(vocabulary.ATTRIBUTES.split())
_GREETING_WORDS = frozenset(vocabulary.GREETING_WORDS.split())
_SUM_WORDS = frozenset(vocabulary.SUM_WORDS.split())


def signs(text: str) -> dict[str, float]:
    """Count each sign of a long or hard answer in a normalized text. Signs that are not in the result count 0.

    In addition to the signs of the word lists: `words`, `numbers`, `large_numbers` (five digits or more), `variables`
    (single letters), `questions`, `sentences`, `symbols`, `choices` (1 if there are options to choose from), `listed`
    (items of a list), `amount` (requests for a large number of words or examples).
    """
    words = _WORDS.findall(text)
    numbers = sum(word[0].isdigit() for word in words)
    found: dict[str, float] = {
        "words": len(words) - numbers,
        "numbers": numbers,
        "large_numbers": sum(len(word) > 4 and word.isdigit() for word in words),
        "variables": sum(len(word) == 1 and "b" <= word <= "z" and word != "i" for word in words),
        "questions": text.count("?"),
        "sentences": sum(map(text.count, _ENDS)),
        "symbols": sum(map(text.count, _SYMBOLS)),
        "choices": offers_choices(text),
        "listed": sum(map(text.count, _BULLETS)),
        "amount": len(_AMOUNT.findall(text)),
    }
    for word in {*words, ""}:
        for stem, open_ended, sign in _INDEX.get(word[:_STEM_CHARS], ()):
            if word == stem or (open_ended and word.startswith(stem)):
                found[sign] = found.get(sign, 0) + 1
        for phrase, sign in _PHRASES.get(word, ()):
            if phrase in text:
                found[sign] = found.get(sign, 0) + 1
    return found


def offers_choices(text: str) -> bool:
    """Whether a normalized text lists options to choose from, as exam questions do."""
    return any(mark in text for mark in _CHOICES)


def kind(text: str, *, data_follows: bool = False) -> str:
    """The kind of short, easy request in a normalized text, in words, or `""` if it is none of the known kinds.

    A job is only recognized if the text contains its data, or if the data follows in another message.
    """
    text = text.strip()
    if len(text) > SHORT_CHARS:
        return ""
    words = _WORDS.findall(text)
    if words and all(word in _GREETING_WORDS for word in words):
        return "greeting"
    text = _without_courtesies(text)
    if len(words) <= 12 and _is_small_sum(text):
        return "small sum"
    for job, opening in _JOB_OPENINGS:
        if opening.match(text):
            return job
    spaced = f" {' '.join(words)} "
    has_data = data_follows or ":" in text or _QUOTED.search(text) is not None
    for job, phrases in _JOB_PHRASES.items():
        if (has_data or job in _BARE_JOBS) and any(phrase in spaced for phrase in phrases):
            return job
    if any(phrase in spaced for phrase in _BRIEF_PHRASES):
        return "one-word answer"
    if _CONTEXT.match(text):
        return "question on a short text" if _ANY_QUESTION.match(_last_question(text)) else ""
    return "short factual question" if _is_fact(text) else ""


def instruction(text: str, kind_: str) -> str:
    """The instruction in a normalized text, without the data of a small job."""
    if not kind_:
        return text
    text = _QUOTED.sub(" ", text)
    return text.partition(":")[0] if kind_ in JOBS else text


def _without_courtesies(text: str) -> str:
    for _ in range(4):
        polite = _POLITE.match(text)
        if polite is None or polite.end() == len(text):
            break
        text = text[polite.end() :]
    return text


def _is_small_sum(text: str) -> bool:
    words = _WORDS.findall(text)
    numbers = [word for word in words if word[0].isdigit()]
    return (
        _SUM_MARKS.search(text) is not None
        and len(numbers) <= 3
        and all(word in _SUM_WORDS or (word.isdigit() and len(word) <= 3) for word in words)
    )


def _is_fact(text: str) -> bool:
    if " or " in text or " или " in text or text.count("?") > 1 or text.count(" ") >= _FACT_WORDS:
        return False
    if _FACT_OPENINGS.match(text) or _DEFINITION.match(text) or _YES_NO.match(text):
        return True
    first = _WORDS.findall(text[:_OPENING_CHARS])[:_OPENING_WORDS]
    has_value = any(word.startswith(_ATTRIBUTES) for word in first)
    return has_value and (_QUESTION_OPENINGS.match(text) is not None or len(first) <= 4)


def _last_question(text: str) -> str:
    """The last sentence, or the part of it after a colon."""
    ends = [end.end() for end in _SENTENCE_ENDS.finditer(text)]
    start = ends[-2] if len(ends) > 1 else 0
    last = text[start:].lstrip(" \n\"'»”")
    return last.rpartition(": ")[2]
