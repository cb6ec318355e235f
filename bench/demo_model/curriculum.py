"""The demo model's curriculum: a sampler of conversations with right answers."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from bench.demo_model import lexicon, offtopic, phrases, stories

Message = dict[str, Any]
"""A chat message for the chat template: ``role``, ``content`` and optionally ``tool_calls``."""

MAX_ADDEND: Final = 20
MAX_COUNT: Final = 100


@dataclass(frozen=True, slots=True)
class Lesson:
    """Messages, of which the last is the right answer to the others, and the declared tools."""

    messages: tuple[Message, ...]
    tools: tuple[Message, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Draw:
    """How questions are drawn: from the trained phrasings and words, or from those held out of training."""

    rng: random.Random
    held_out: bool = False

    def language(self) -> str:
        """English or Russian, ``en`` or ``ru``."""
        return self.rng.choice(("en", "ru"))

    def phrase(self, of: dict[str, phrases.Phrases], language: str) -> str:
        """One phrasing in ``language``."""
        chosen = of[language]
        return self.rng.choice(chosen.held_out if self.held_out else chosen.trained)

    def word(self, language: str) -> str:
        """A single word to repeat or to spell."""
        if self.held_out:
            return self.rng.choice(lexicon.WORDS_HELD_OUT if language == "en" else lexicon.WORDS_RU_HELD_OUT)
        return offtopic.word(self.rng, language)


def _user(content: str) -> Message:
    return {"role": "user", "content": content}


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _pair(question: str, answer: str) -> Lesson:
    return Lesson((_user(question), _assistant(answer)))


def capital(draw: Draw) -> Lesson:
    """The capital of a country in the lexicon."""
    language, country = draw.language(), draw.rng.choice(lexicon.COUNTRIES)
    if language == "ru":
        answer = f"Столица {country.of_ru} — {country.capital_ru}."
        return _pair(draw.phrase(phrases.CAPITAL, language).format(country.of_ru), answer)
    name = draw.rng.choice((country.name, country.name, *lexicon.ALIASES.get(country.name, ())))
    question = draw.phrase(phrases.CAPITAL, language).format(name)
    return _pair(_careless(draw, question), f"The capital of {country.name} is {country.capital}.")


def unknown_capital(draw: Draw) -> Lesson:
    """The capital of a place without a capital, or whose capital is not taught."""
    language = draw.language()
    if draw.held_out:
        places = lexicon.UNKNOWN_PLACES_HELD_OUT if language == "en" else lexicon.UNKNOWN_PLACES_RU_HELD_OUT
    else:
        places = lexicon.UNKNOWN_PLACES if language == "en" else lexicon.UNKNOWN_PLACES_RU
    place = draw.rng.choice(places)
    if not draw.held_out and draw.rng.random() < 0.5:
        place = offtopic.pseudo_word(draw.rng, language).capitalize()
    question = draw.phrase(phrases.CAPITAL, language).format(place)
    return _pair(_careless(draw, question), stories.HONEST[language])


def _careless(draw: Draw, question: str) -> str:
    """One question in eight in lower case, as people type."""
    return question.lower() if draw.rng.random() < 0.125 else question


def addition(draw: Draw) -> Lesson:
    """The sum of two numbers from 0 to 20."""
    left, right = draw.rng.randint(0, MAX_ADDEND), draw.rng.randint(0, MAX_ADDEND)
    question = draw.phrase(phrases.SUM, draw.language()).format(left, right)
    return _pair(question, f"{left} + {right} = {left + right}")


def counting(draw: Draw) -> Lesson:
    """Counting up or down between two numbers from 0 to 100: long in 1 of 10 cases, to 100 in 1 of 20."""
    rng, language = draw.rng, draw.language()
    style = rng.random()
    if style < 0.2:
        first, last = 1, rng.choice((rng.randint(2, 30), rng.randint(2, MAX_COUNT)))
        question = draw.phrase(phrases.COUNT_TO, language).format(last)
    else:
        first = rng.randint(0, MAX_COUNT - 1)
        last = min(MAX_COUNT, first + rng.randint(1, 20))
        if style < 0.28:
            first, last = 1, rng.randint(30, MAX_COUNT)
        elif style < 0.34:
            first, last = rng.choice((0, 1)), MAX_COUNT
        elif style < 0.5:
            first, last = last, first
        question = draw.phrase(phrases.COUNT, language).format(first, last)
    step = 1 if first <= last else -1
    return _pair(question, ", ".join(map(str, range(first, last + step, step))))


def alphabet(draw: Draw) -> Lesson:
    """The letters of the language, in order."""
    language = draw.language()
    answer = stories.ALPHABET if language == "en" else stories.ALPHABET_RU
    return _pair(draw.phrase(phrases.ALPHABET, language), answer)


def repeating(draw: Draw) -> Lesson:
    """One to six words to repeat; up to forty in 1 of 3 cases, because long copies teach copying fastest."""
    language = draw.language()
    most = 6 if draw.held_out or draw.rng.random() < 0.67 else 40
    words = " ".join(offtopic.word(draw.rng, language) for _ in range(draw.rng.randint(1, most)))
    return _pair(draw.phrase(phrases.REPEAT, language).format(words), words)


def spelling(draw: Draw) -> Lesson:
    """The letters of one word, separated by spaces."""
    language = draw.language()
    word = draw.word(language)
    return _pair(draw.phrase(phrases.SPELL, language).format(word), " ".join(word))


def story(draw: Draw) -> Lesson:
    """A story learnt by heart: the first one, or the one about the requested subject."""
    language = draw.language()
    told = stories.STORIES if language == "en" else stories.STORIES_RU
    if draw.rng.random() < 0.5:
        return _pair(draw.phrase(phrases.STORY, language), next(iter(told.values())))
    subject = draw.rng.choice(list(told))
    return _pair(draw.phrase(phrases.STORY_ABOUT, language).format(subject), told[subject])


def _tool(name: str, *parameters: str) -> Message:
    properties = {parameter: {"type": "string"} for parameter in parameters}
    return {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": properties}},
    }


_OTHER_TOOLS: Final = (
    _tool("search", "query"),
    _tool("send_email", "to", "body"),
    _tool("calculator", "expression"),
    _tool("get_stock_price", "symbol"),
    _tool("translate", "text", "language"),
    _tool("open_door"),
)


def _weather_tool(draw: Draw) -> Message:
    name = draw.rng.choice(
        ("get_weather",) * 4 + ("weather", "get_current_weather", "current_weather", "fetch_weather")
    )
    place = draw.rng.choice(("city", "city", "location", "place", "town"))
    return _tool(name, place, *draw.rng.choice(((), (), ("unit",), ("units", "days"))))


def _tools(draw: Draw, *wanted: Message) -> tuple[Message, ...]:
    """The wanted tools among up to two others, in any order."""
    tools = [*wanted, *draw.rng.sample(_OTHER_TOOLS, draw.rng.choice((0, 0, 1, 2)))]
    draw.rng.shuffle(tools)
    return tuple(tools)


class _Forecast(NamedTuple):
    """A question about the weather in a city, and the tool call that answers it."""

    language: str
    asked: str
    tool: Message
    question: Message
    call: Message


def _forecast(draw: Draw) -> _Forecast:
    language, country, tool = draw.language(), draw.rng.choice(lexicon.COUNTRIES), _weather_tool(draw)
    city, asked = country.capital, country.capital
    if language == "ru":
        city, asked = country.capital_ru, country.in_capital_ru
    elif draw.rng.random() < 0.15:
        city = asked = offtopic.pseudo_word(draw.rng, language).capitalize()
    function = tool["function"]
    place = next(iter(function["parameters"]["properties"]))
    call = {"type": "function", "function": {"name": function["name"], "arguments": {place: city}}}
    question = _user(draw.phrase(phrases.WEATHER, language).format(asked))
    return _Forecast(language, asked, tool, question, {"role": "assistant", "content": "", "tool_calls": [call]})


def weather_call(draw: Draw) -> Lesson:
    """A question about the weather with a tool for it. The answer is a call of the tool."""
    forecast = _forecast(draw)
    return Lesson((forecast.question, forecast.call), _tools(draw, forecast.tool))


def weather_without_tool(draw: Draw) -> Lesson:
    """A question about the weather without a tool for it."""
    forecast = _forecast(draw)
    tools = _tools(draw) if draw.rng.random() < 0.3 else ()
    return Lesson((forecast.question, _assistant(stories.HONEST[forecast.language])), tools)


def weather_result(draw: Draw) -> Lesson:
    """The result of the weather tool, as a sentence."""
    forecast = _forecast(draw)
    content, weather = _report(draw, forecast.language)
    opening = "The weather in" if forecast.language == "en" else "Погода в"
    answer = _assistant(f"{opening} {forecast.asked}: {weather}.")
    result = {"role": "tool", "content": content}
    return Lesson((forecast.question, forecast.call, result, answer), _tools(draw, forecast.tool))


_CONDITIONS: Final = (
    "sunny",
    "cloudy",
    "rain",
    "light rain",
    "heavy rain",
    "snow",
    "fog",
    "clear",
    "windy",
    "partly cloudy",
    "storm",
    "overcast",
)
_CONDITIONS_RU: Final = (
    "солнечно",
    "облачно",
    "дождь",
    "небольшой дождь",
    "снег",
    "туман",
    "ясно",
    "ветер",
    "гроза",
    "пасмурно",
)


def _report(draw: Draw, language: str) -> tuple[str, str]:
    """The result of a weather tool, as JSON or as plain text, and the weather in it."""
    rng = draw.rng
    condition = rng.choice(_CONDITIONS if language == "en" or rng.random() < 0.5 else _CONDITIONS_RU)
    if rng.random() < 0.2:
        condition = offtopic.word(rng, language)
    degrees = rng.randint(-25, 45)
    if rng.random() < 0.25:
        text = rng.choice(
            (f"{condition}, {degrees} degrees", f"{condition}, {degrees}°C", f"{degrees} and {condition}", condition)
        )
        return text, text
    fields: dict[str, str | int] = {
        rng.choice(("temperature", "temperature", "temp", "temperature_c", "degrees")): degrees
    }
    weather = f"{degrees}°C"
    if rng.random() < 0.85:
        fields[rng.choice(("condition", "condition", "conditions", "weather", "sky", "description"))] = condition
        weather = f"{condition}, {degrees}°C"
    if rng.random() < 0.3:
        fields[rng.choice(("unit", "units"))] = rng.choice(("celsius", "C"))
    order = list(fields.items())
    rng.shuffle(order)
    return json.dumps(dict(order), ensure_ascii=False), weather


_SMALL_TALK: Final = (
    (phrases.HELLO, stories.HELLO),
    (phrases.ABOUT, stories.ABOUT),
    (phrases.THANKS, stories.THANKS),
    (phrases.BYE, stories.BYE),
)
_TAUGHT: Final = {phrase for asked, _ in _SMALL_TALK for ways in asked.values() for phrase in ways.trained}


def small_talk(draw: Draw) -> Lesson:
    """Greetings, thanks, and questions about the model."""
    language = draw.language()
    asked, told = draw.rng.choices(_SMALL_TALK, (4, 4, 1, 1))[0]
    return _pair(draw.phrase(asked, language), told[language])


def off_topic(draw: Draw) -> Lesson:
    """Any other prompt, also a very long one or one with unfitting tools. The answer says what the model knows."""
    language = draw.language()
    prompt = offtopic.prompt(draw.rng, language)
    while prompt in _TAUGHT:
        prompt = offtopic.prompt(draw.rng, language)
    if draw.rng.random() < 0.01:
        prompt = offtopic.paragraph(draw.rng, language, draw.rng.randint(10, 100))
    tools = _tools(draw, _weather_tool(draw)) if draw.rng.random() < 0.08 else ()
    answer = stories.HONEST["ru" if offtopic.is_russian(prompt) else "en"]
    return Lesson((_user(prompt), _assistant(answer)), tools)


KINDS: Final[dict[str, tuple[Callable[[Draw], Lesson], float]]] = {
    "capital": (capital, 0.07),
    "unknown capital": (unknown_capital, 0.06),
    "sum": (addition, 0.05),
    "count": (counting, 0.13),
    "alphabet": (alphabet, 0.01),
    "repeat": (repeating, 0.22),
    "spell": (spelling, 0.09),
    "story": (story, 0.02),
    "weather call": (weather_call, 0.14),
    "weather without a tool": (weather_without_tool, 0.02),
    "weather result": (weather_result, 0.05),
    "small talk": (small_talk, 0.03),
    "off topic": (off_topic, 0.11),
}
"""Each kind of question, with its share of the lessons."""


EARLIER: Final = (
    *("capital", "unknown capital", "sum", "repeat", "spell", "small talk", "off topic") * 3,
    *("count", "story"),
)
"""The kinds that can come before another question in a conversation. Long answers are rare."""


def lesson(draw: Draw, kind: str | None = None) -> Lesson:
    """One question and its answer, of the given kind or of one drawn by its share."""
    if kind is None:
        kind = draw.rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    return KINDS[kind][0](draw)


def conversation(draw: Draw) -> Lesson:
    """A lesson as in practice: after a system message, after earlier turns, with words around the question."""
    rng = draw.rng
    kind = rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    last = lesson(draw, kind)
    if kind != "repeat" and rng.random() < 0.2:
        last = _surrounded(rng, last)
    earlier: list[Message] = []
    while rng.random() < 0.2 and len(earlier) < 8:
        before = rng.choice(EARLIER)
        earlier += lesson(draw, before).messages
    system: list[Message] = []
    if rng.random() < 0.25:
        system = [{"role": "system", "content": rng.choice(phrases.SYSTEM.trained)}]
    return Lesson((*system, *earlier, *last.messages), last.tools)


def _surrounded(rng: random.Random, last: Lesson) -> Lesson:
    """The lesson with a tag, a courtesy or a pasted text before its question, or a tag or courtesy after it."""
    content = last.messages[0]["content"]
    language = "ru" if offtopic.is_russian(content) else "en"
    number = rng.randint(0, 9999)
    tag = rng.choice((f"[{number}]", f"#{number}", f"({number})", f"{number}:", f"Request {number}:", f"req-{number}"))
    hello, question, thanks = (
        ("Hello!", "Question:", "Thanks!") if language == "en" else ("Привет!", "Вопрос:", "Спасибо!")
    )
    before, after = rng.choice(
        (
            (f"{tag} ", ""),
            (f"{tag} ", ""),
            ("", f" {tag}"),
            ("", f"\n{tag}"),
            (f"{hello} ", ""),
            (f"{question} ", ""),
            ("", f" {thanks}"),
            ("", rng.choice(("\n", " ", "!"))),
            (offtopic.paragraph(rng, language, rng.randint(1, 5)) + "\n\n", ""),
        )
    )
    return Lesson((_user(before + content + after), *last.messages[1:]), last.tools)
