"""Off-topic prompts, such as people, programs and load generators send. The demo model declines them."""

import argparse
import heapq
import inspect
import json
import random
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pydoc_data.topics import topics

from bench.demo_model import lexicon


def _items(text: str) -> tuple[str, ...]:
    """The templates of ``text``, separated by bars."""
    return tuple(item.strip() for item in text.split("|"))


_OPENINGS = _items(
    """
    Explain {0}|Explain {0} to a five year old|What is {0}?|What are {0}?|Tell me about {0}|
    Write an essay about {0}|Write a poem about {0}|Write a short article on {0}|Summarize {0}|
    Summarise {0} in three sentences|How does {0} work?|How do I learn {0}?|Why is {0} important?|
    Why do people like {0}?|Give me five facts about {0}|List ten tips for {0}|Compare {0} and {1}|
    What is the difference between {0} and {1}?|Translate {0} into French|Translate this: {0}|
    Write a Python function for {0}|Write code that handles {0}|Fix {0}|Debug {0}|Refactor {0}|Help me with {0}|
    Can you help me understand {0}?|What do you think about {0}?|Who invented {0}?|When did {0} begin?|
    Where can I find {0}?|Is {0} dangerous?|Should I worry about {0}?|Recommend a book about {0}|Plan a week of {0}|
    Draft an email about {0}|Describe {0} in detail|Make a table of {0}|Tell me a joke about {0}|
    Sing a song about {0}|Prove a theorem about {0}|Imagine you are {0}|Let us talk about {0}|
    I am interested in {0}|I have a question about {0}|my question is about {0}|{0}|{0}?|{0} and {1}|more about {0}|
    how to {0}|best {0} 2024|Why does {0} matter for {1}?|How much does {0} cost?|Are {0} real?|
    Generate ten ideas for {0}|Rewrite {0}|Classify {0} as positive or negative|Extract the names from {0}|
    What would happen without {0}?|Which is better, {0} or {1}?|Think step by step about {0}|Do you like {0}?|
    What was {0} like in 1990?|How many people know {0}?|Who is the best at {0}?|Tell me a story about {0}|
    Write a story about {0}|Count the words in {0}|Spell check {0}|Repeat the last part of {0}|The history of {0}
    """
)
_OPENINGS_RU = _items(
    """
    Объясни, что такое {0}|Что такое {0}?|Расскажи про тему: {0}|Напиши сочинение на тему «{0}»|Напиши стихи: {0}|
    Кратко перескажи: {0}|Как работает {0}?|Почему {0} — это важно?|Назови пять фактов: {0}|Сравни: {0} и {1}|
    В чём разница: {0} или {1}?|Переведи на английский: {0}|Напиши функцию на Python: {0}|Напиши код: {0}|
    Исправь: {0}|Помоги мне, тема — {0}|Что ты думаешь, {0} — это хорошо?|Кто придумал {0}?|Когда появилось {0}?|
    Где найти {0}?|Опасно ли {0}?|Посоветуй книгу: {0}|Составь план: {0}|Напиши письмо: {0}|Опиши подробно: {0}|
    Расскажи анекдот: {0}|Спой песню: {0}|Докажи: {0}|Давай поговорим: {0}|Меня интересует {0}|У меня вопрос: {0}|
    {0}|{0}?|{0} и {1}|как {0}|лучшие {0}|Сколько стоит {0}?|Сколько людей знает {0}?|Придумай десять идей: {0}|
    Перепиши: {0}|Что лучше, {0} или {1}?|Тебе нравится {0}?|История: {0}|Почему {0}?|Зачем нужно {0}?|
    Расскажи подробнее: {0}|Что будет, если исчезнет {0}?|Кто лучше всех знает {0}?|Объясни простыми словами: {0}|
    Почему небо такое красивое и при чём тут {0}?|Можно ли {0}?|Где находится {0}?|Когда {0}?|Что значит {0}?|
    Какой смысл у слов «{0}»?|Какая польза, когда {0}?|Посчитай слова: {0}|Проверь ошибки: {0}
    """
)
_NEAR = _items(
    """
    What is the population of {c}?|Who is the president of {c}?|Where is {c}?|Tell me about {c}.|What is {k}?|
    Which language is spoken in {c}?|What is the currency of {c}?|What is the flag of {c}?|
    How far is {k} from here?|Is {k} a nice city?|{c}|{k}|{k}?|Why is {k} the capital of {c}?|
    What is the largest city in {c}?|Who lives in {k}?|List the capitals of Europe|
    What is the biggest river in {c}?|{a} - {b}|What is {a} - {b}?|What is {a} * {b}?|{a}*{b}|{a} times {b}|
    {a} / {b}|{a} divided by {b}|What is {m} + {n}?|{m}+{n}|{m} + {a}|How much is {m} plus {n}?|
    What is the square root of {m}?|{m}|{a}|Is {m} a prime number?|Count to a million|Count from {m} to {n}.|
    Count the letters in {w}|What does {w} mean?|Define {w}|What is a {w}?|{w}|{w} {v}|a {w} and a {v}|
    I like my {w}|Where is my {w}?|Translate {w} into German|What rhymes with {w}?|Who won the {w} cup?|Draw a {w}|
    Buy a {w} in {k}|What time is it in {k}?|Find a hotel in {k}|Book a flight to {k}|Tell me a joke|Write a poem|
    Sing a song|How old is the {w}?|What colour is the {w}?|Why is the {w} so {v}?|capital|capital letters|story|
    What is capital?|the capital|weather|sum|repeat|spell|count|When was {k} founded?|
    {a} apples and {b} oranges cost {m}, how much is one?|Convert {m} dollars to euros|What is {a}% of {m}?|
    {a} > {b}?|{a} {b} {m}|Is {k} in {c}?|How do I get from {k} to {c}?
    """
)
_NEAR_RU = _items(
    """
    Какое население {g}?|Кто президент {g}?|Расскажи о городе {k}.|Что такое {k}?|Какая валюта {g}?|Какой флаг {g}?|
    Какой язык {g}?|{k}|{k}?|Назови столицы Европы|Самый большой город {g}?|Сколько будет {a} - {b}?|{a} минус {b}|
    Сколько будет {a} * {b}?|{a} умножить на {b}|Сколько будет {m} + {n}?|{m} плюс {n}|
    Сколько будет {a} делить на {b}?|Посчитай до миллиона|Посчитай буквы в слове {w}|Что значит {w}?|{w}|{w} {v}|
    Где моя {w}?|Переведи слово {w}|Какая рифма к слову {w}?|Нарисуй {w}|Который час в городе {k}?|
    Найди гостиницу, город {k}|Расскажи анекдот|Напиши стихи|Спой песню|Сколько лет {w}?|Какого цвета {w}?|
    Почему {w} такая?|столица|сказка|погода|сумма|повтори|буквы|Когда основан город {k}?|Корень из {m}?|
    Почему {k} — столица?|Какая река {g}?|Сколько километров до {g}?|Где находится {k}?|История {g}|
    Какая площадь {g}?|Кто живёт в лесу?|Сколько стоит {w}?|Посчитай от {m} до {n}.
    """
)
_TAILS = ("", "", "", "", ".", "!", " please", " Answer briefly.", " Be creative.", " in simple words", " Thank you.")
_TAILS_RU = ("", "", "", "", ".", "!", " пожалуйста", " Ответь кратко.", " Спасибо.", " Подробно.", " Очень нужно!")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_LETTERS_RU = "абвгдеёжзийклмнопрстуфхцчшщъыьэюя"
_SCRIPTS = (
    (0x4E00, 0x4F00),
    (0x3040, 0x3090),
    (0x0620, 0x064A),
    (0x05D0, 0x05EA),
    (0x1F600, 0x1F640),
    (0xAC00, 0xAD00),
)


def pseudo_word(rng: random.Random, language: str) -> str:
    """A pronounceable word of two to nine letters that is not in the lexicon."""
    hard, soft = ("bcdfghjklmnprstvwz", "aeiou") if language == "en" else ("бвгджзклмнпрстфхцчш", "аеиоуыя")
    parts = [rng.choice(hard) + rng.choice(soft) for _ in range(rng.randint(1, 4))]
    return "".join(parts) + (rng.choice(hard) if rng.random() < 0.5 else "")


def word(rng: random.Random, language: str) -> str:
    """A word of the trained lexicon, or in 1 of 4 cases one that does not exist."""
    if rng.random() < 0.25:
        return pseudo_word(rng, language)
    return rng.choice(lexicon.WORDS if language == "en" else lexicon.WORDS_RU)


def _topic(rng: random.Random, language: str) -> str:
    if rng.random() < 0.2:
        return " ".join(word(rng, language) for _ in range(rng.randint(1, 4)))
    return rng.choice(lexicon.TOPICS if language == "en" else lexicon.TOPICS_RU)


def _question(rng: random.Random, language: str) -> str:
    openings, tails = (_OPENINGS, _TAILS) if language == "en" else (_OPENINGS_RU, _TAILS_RU)
    text = rng.choice(openings).format(_topic(rng, language), _topic(rng, language)) + rng.choice(tails)
    return text.lower() if rng.random() < 0.2 else text


def _near_miss(rng: random.Random, language: str) -> str:
    """An off-topic question with the words of a known kind."""
    country = rng.choice(lexicon.COUNTRIES)
    russian = language == "ru"
    text = rng.choice(_NEAR_RU if russian else _NEAR)
    return text.format(
        c=country.name,
        g=country.of_ru,
        k=country.capital_ru if russian else country.capital,
        w=word(rng, language),
        v=word(rng, language),
        a=rng.randint(0, 100),
        b=rng.randint(0, 100),
        m=rng.randint(101, 99999),
        n=rng.randint(101, 99999),
    )


def _salad(rng: random.Random, language: str) -> str:
    separator = rng.choice((" ", " ", ", ", "\n"))
    return separator.join(word(rng, language) for _ in range(rng.randint(1, 30)))


def _gibberish(rng: random.Random, language: str) -> str:
    letters = (_LETTERS if language == "en" else _LETTERS_RU) + rng.choice(
        ("", " ", "0123456789", "?!.,;:-_/\\'\"()[]{}<>@#$%")
    )
    if language == "en" and rng.random() < 0.3:
        low, high = rng.choice(_SCRIPTS)
        letters = "".join(map(chr, range(low, high)))
    return "".join(rng.choice(letters) for _ in range(rng.randint(1, 40))).strip() or "?"


@cache
def _pastable() -> tuple[str, ...]:
    """Lines of real English and real code: the language reference and some modules of the standard library."""
    texts = [*topics.values(), *(inspect.getsource(module) for module in (argparse, heapq, json, random, textwrap))]
    return tuple(line for text in texts for line in text.splitlines() if line.strip())


def _pasted(rng: random.Random, language: str) -> str:
    """Some lines of real code or documentation."""
    lines = _pastable()
    start = rng.randrange(len(lines))
    question = "" if rng.random() < 0.5 else _question(rng, language) + "\n\n"
    return question + "\n".join(lines[start : start + rng.randint(1, 12)])


def _json(rng: random.Random, language: str) -> str:
    return json.dumps({word(rng, language): rng.choice([rng.randint(0, 999), _topic(rng, language)]) for _ in range(4)})


def paragraph(rng: random.Random, language: str, sentences: int) -> str:
    """Text of that many sentences without a subject."""
    makers: Sequence[Callable[[random.Random, str], str]] = (_question, _sentence, _sentence)
    return " ".join(rng.choice(makers)(rng, language) for _ in range(sentences))


def _sentence(rng: random.Random, language: str) -> str:
    words = [word(rng, language) for _ in range(rng.randint(3, 12))]
    fillers = ("the", "and", "of", "is", "in", "was") if language == "en" else ("и", "в", "на", "это", "не", "был")
    for at in range(len(words)):
        if rng.random() < 0.3:
            words[at] = rng.choice(fillers)
    return " ".join(words).capitalize() + rng.choice(".....?!")


_MAKERS: tuple[tuple[Callable[[random.Random, str], str], float], ...] = (
    (_question, 0.42),
    (_near_miss, 0.26),
    (_salad, 0.06),
    (_sentence, 0.08),
    (_gibberish, 0.08),
    (_pasted, 0.06),
    (_json, 0.02),
)


def prompt(rng: random.Random, language: str) -> str:
    """An off-topic prompt in ``language``."""
    if rng.random() < 0.05:
        return paragraph(rng, language, rng.randint(2, 8))
    makers, weights = zip(*_MAKERS, strict=True)
    return str(rng.choices(makers, weights)[0](rng, language))


def is_russian(text: str) -> bool:
    """Whether ``text`` should be answered in Russian: most of its letters are Cyrillic."""
    letters = [letter for letter in text if letter.isalpha()]
    return 2 * sum("Ѐ" <= letter <= "ӿ" for letter in letters) > len(letters)
