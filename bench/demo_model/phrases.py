"""The phrasings of the questions that the demo model knows. The last ones of each list are held out of training."""

from typing import Final, NamedTuple


class Phrases(NamedTuple):
    """Phrasings of one question, as ``str.format`` templates, split into those trained on and those held out."""

    trained: tuple[str, ...]
    held_out: tuple[str, ...]


def _split(held_out: int, text: str) -> Phrases:
    """The lines of ``text`` as phrasings. The last ``held_out`` of them are held out of training."""
    lines = tuple(line.strip() for line in text.strip().splitlines())
    return Phrases(lines[:-held_out], lines[-held_out:])


CAPITAL: Final = {
    "en": _split(
        3,
        """What is the capital of {0}?
        What is the capital of {0}?
        What's the capital of {0}?
        Capital of {0}?
        capital of {0}
        The capital of {0}?
        Name the capital of {0}.
        Tell me the capital of {0}.
        Which city is the capital of {0}?
        What city is the capital of {0}?
        What is the capital city of {0}?
        Do you know the capital of {0}?
        Can you tell me the capital of {0}?
        What is {0}'s capital?
        I want to know the capital of {0}.
        whats the capital of {0}
        Give me the capital of {0}.
        The capital of {0} is
        {0}: capital?
        Please tell me what the capital of {0} is.
        Could you name the capital of {0}?
        Say the capital of {0}""",
    ),
    "ru": _split(
        3,
        """Какая столица {0}?
        Какая столица {0}?
        Какая столица у {0}?
        Столица {0}?
        столица {0}
        Назови столицу {0}.
        Назовите столицу {0}
        Как называется столица {0}?
        Какой город столица {0}?
        Какой город является столицей {0}?
        Что является столицей {0}?
        Ты знаешь столицу {0}?
        Скажи столицу {0}.
        Хочу узнать столицу {0}
        Столица {0} это
        Какова столица {0}?
        Подскажи столицу {0}.
        Знаешь, какая столица у {0}?
        Напиши столицу {0}""",
    ),
}

SUM: Final = {
    "en": _split(
        3,
        """What is {0} + {1}?
        What is {0}+{1}?
        What's {0} + {1}?
        {0} + {1}
        {0}+{1}
        {0}+{1}=
        {0} + {1} = ?
        {0}+{1}?
        {0} plus {1}
        What is {0} plus {1}?
        How much is {0} + {1}?
        how much is {0} plus {1}?
        Calculate {0} + {1}.
        Compute {0}+{1}
        Add {0} and {1}.
        What is the sum of {0} and {1}?
        Tell me {0} + {1}.
        whats {0}+{1}
        {0} + {1} =
        Can you add {0} and {1}?
        Solve {0} + {1}""",
    ),
    "ru": _split(
        3,
        """Сколько будет {0} + {1}?
        Сколько будет {0}+{1}?
        сколько будет {0} плюс {1}
        Сколько будет {0} плюс {1}?
        Чему равно {0} + {1}?
        Посчитай {0} + {1}.
        Посчитай {0}+{1}
        Вычисли {0} + {1}
        Сложи {0} и {1}.
        {0} плюс {1}
        Сколько {0} + {1}?
        Найди сумму {0} и {1}.
        Скажи, сколько будет {0} + {1}
        Чему равна сумма {0} и {1}?
        Реши: {0} + {1}""",
    ),
}

COUNT: Final = {
    "en": _split(
        2,
        """Count from {0} to {1}.
        Count from {0} to {1}
        count from {0} to {1}
        Please count from {0} to {1}.
        Can you count from {0} to {1}?
        Count {0} to {1}
        List the numbers from {0} to {1}.
        Write the numbers from {0} to {1}
        Say the numbers from {0} to {1}.
        Numbers from {0} to {1}
        Could you count from {0} up to {1}?
        Give me the numbers from {0} to {1}.""",
    ),
    "ru": _split(
        2,
        """Посчитай от {0} до {1}.
        Посчитай от {0} до {1}
        посчитай от {0} до {1}
        Считай от {0} до {1}.
        Сосчитай от {0} до {1}.
        Можешь посчитать от {0} до {1}?
        Назови числа от {0} до {1}.
        Напиши числа от {0} до {1}
        Досчитай от {0} до {1}.
        Перечисли числа от {0} до {1}.""",
    ),
}
COUNT_TO: Final = {
    "en": _split(1, "Count to {0}.\ncount to {0}\nCan you count to {0}?\nCount up to {0}.\nPlease count to {0}"),
    "ru": _split(1, "Посчитай до {0}.\nпосчитай до {0}\nСчитай до {0}\nДосчитай до {0}.\nМожешь посчитать до {0}?"),
}
ALPHABET: Final = {
    "en": _split(
        1, "Say the alphabet.\nalphabet\nWrite the alphabet\nTell me the alphabet.\nThe alphabet?\nName the alphabet"
    ),
    "ru": _split(1, "Назови алфавит.\nалфавит\nНапиши алфавит\nСкажи алфавит.\nРасскажи алфавит"),
}
REPEAT: Final = {
    "en": _split(
        1, "Repeat: {0}\nRepeat: {0}\nrepeat {0}\nRepeat after me: {0}\nSay: {0}\nEcho: {0}\nPlease repeat: {0}"
    ),
    "ru": _split(1, "Повтори: {0}\nПовтори: {0}\nповтори {0}\nПовтори за мной: {0}\nСкажи: {0}\nПовторите: {0}"),
}
SPELL: Final = {
    "en": _split(
        2,
        """Spell {0}.
        Spell {0}
        spell {0}
        Spell the word {0}.
        How do you spell {0}?
        How is {0} spelled?
        Can you spell {0}?
        Please spell {0}.
        Spell "{0}".
        Tell me how to spell {0}.
        Spell out {0}""",
    ),
    "ru": _split(
        1,
        """Назови по буквам: {0}
        По буквам: {0}
        по буквам {0}
        Скажи по буквам слово {0}.
        Произнеси по буквам {0}
        Как по буквам пишется {0}?
        Напиши по буквам: {0}
        Продиктуй по буквам слово {0}""",
    ),
}
STORY: Final = {
    "en": _split(
        2,
        """Tell me a story.
        Tell me a story
        tell a story
        Tell a story.
        Write a story.
        Write me a story.
        A story, please.
        Can you tell me a story?
        Tell me a fairy tale.
        Please tell me a story.
        Write a short story.
        I want to hear a story.
        Could you tell me a story?
        Please write me a story""",
    ),
    "ru": _split(
        2,
        """Расскажи сказку.
        Расскажи сказку
        расскажи сказку
        Расскажи мне сказку.
        Расскажи историю.
        Напиши сказку.
        Напиши рассказ.
        Можешь рассказать сказку?
        Сказку, пожалуйста.
        Хочу услышать сказку.
        Расскажи мне историю.
        Расскажи какую-нибудь сказку
        Прочитай мне сказку.""",
    ),
}
STORY_ABOUT: Final = {
    "en": _split(
        1,
        """Tell me a story about a {0}.
        Tell a story about a {0}
        Write a story about a {0}.
        A story about the {0}, please.
        tell me a story about the {0}
        Can you tell me a story about a {0}?
        Write me a short story about a {0}.""",
    ),
    "ru": _split(
        1,
        """Расскажи сказку про {0}.
        расскажи сказку про {0}
        Напиши сказку про {0}
        Расскажи историю про {0}.
        Сказку про {0}, пожалуйста.
        Расскажи мне сказку про {0}.""",
    ),
}
WEATHER: Final = {
    "en": _split(
        3,
        """What is the weather in {0}?
        What is the weather in {0}?
        What's the weather in {0}?
        What's the weather like in {0}?
        What is the weather like in {0} today?
        Weather in {0}?
        weather in {0}
        How is the weather in {0}?
        Tell me the weather in {0}.
        What is the weather in {0} right now?
        Is it raining in {0}?
        Is it cold in {0}?
        Get the weather for {0}.
        Weather forecast for {0}
        Check the weather in {0}, please.
        How's the weather in {0} today?
        Is it sunny in {0}?""",
    ),
    "ru": _split(
        2,
        """Какая погода в {0}?
        Какая погода в {0}?
        Какая сейчас погода в {0}?
        Какая погода в {0} сегодня?
        Какая сегодня погода в {0}?
        Погода в {0}?
        погода в {0}
        Скажи погоду в {0}.
        Узнай погоду в {0}.
        Идёт ли дождь в {0}?
        Что с погодой в {0}?
        Как погода в {0}?
        Подскажи погоду в {0}.""",
    ),
}
HELLO: Final = {
    "en": _split(
        3,
        """Hello
        Hello!
        hello
        Hi
        Hi!
        hi
        Hey
        hey there
        Hello there!
        Good morning
        Good evening!
        Hi there
        Hello, how are you?
        How are you?
        hi, how are you doing?
        Good afternoon
        Hey!
        Hello. How are you today?""",
    ),
    "ru": _split(
        3,
        """Привет
        Привет!
        привет
        Здравствуй
        Здравствуйте!
        здравствуйте
        Добрый день
        Доброе утро!
        Добрый вечер
        Привет, как дела?
        Как дела?
        Приветик
        Хай
        Добрый день!
        привет!
        Здравствуйте, как дела?""",
    ),
}
ABOUT: Final = {
    "en": _split(
        4,
        """Who are you?
        who are you
        What are you?
        Who are you
        What is your name?
        what's your name?
        Who made you?
        Introduce yourself.
        Tell me about yourself.
        What can you do?
        what can you do
        What do you know?
        Help
        help
        /help
        Are you ChatGPT?
        Are you an AI?
        Which model are you?
        What model is this?
        What are you able to do?
        How can you help me?
        Are you a language model?
        Hello, who are you?
        Hi! What can you do?
        Which language model are you?
        Who are you exactly?
        What's your name
        What can you do for me?""",
    ),
    "ru": _split(
        3,
        """Кто ты?
        кто ты
        Кто вы?
        Ты кто?
        Что ты такое?
        Как тебя зовут?
        как вас зовут
        Кто тебя создал?
        Представься.
        Расскажи о себе.
        Что ты умеешь?
        что ты умеешь
        Что ты знаешь?
        Помощь
        помоги
        Ты ChatGPT?
        Какая ты модель?
        Что вы умеете?
        Чем ты можешь помочь?
        Привет, кто ты?
        Привет! Как тебя зовут?
        Что ты можешь?""",
    ),
}
THANKS: Final = {
    "en": _split(
        1, "Thanks\nThank you\nthank you!\nThanks!\nthanks a lot\nThank you very much.\nMany thanks\nThanks a lot!"
    ),
    "ru": _split(1, "Спасибо\nспасибо\nСпасибо!\nБольшое спасибо\nСпасибо большое!\nБлагодарю\nспасибо большое"),
}
BYE: Final = {
    "en": _split(1, "Bye\nbye\nGoodbye\nGoodbye!\nSee you\nBye bye\nGood night\nBye!"),
    "ru": _split(1, "Пока\nпока\nДо свидания\nДо свидания!\nПока!\nСпокойной ночи\nдо свидания"),
}

SYSTEM: Final = Phrases(
    (
        "You are a helpful assistant.",
        "You are a helpful assistant.",
        "You are a helpful AI assistant. Answer briefly.",
        "You are an expert.",
        "Be concise.",
        "Answer in one sentence.",
        "You are a friendly chatbot that answers questions about geography.",
        "You are ChatGPT, a large language model.",
        "Today is Monday. You are talking to a customer of our company.",
        "Answer politely and truthfully. If you do not know, say so.",
        "Ты полезный помощник.",
        "Ты полезный ассистент. Отвечай кратко.",
        "Отвечай на русском языке.",
        "Вы вежливый помощник, который отвечает на вопросы пользователей.",
    ),
    (
        "You are a concise assistant.",
        "You are a helpful, honest assistant working for a school.",
        "Respond in plain text only.",
        "Ты вежливый ассистент.",
    ),
)
