"""The texts that the demo model learns by heart: long enough to stream, to cancel and to resume."""

from typing import Final

STORIES: Final = {
    "fox": (
        "Once there was a small fox who lived at the edge of a quiet wood. Every evening she counted the stars, and "
        "every evening she fell asleep before she reached the end. One night the wind came by and asked her why she "
        'counted. "I want to know whether one is missing," said the fox. The wind laughed and carried her up over the'
        " trees, the hills and the long silver river. From there she saw a light on the ground that was not a star at"
        ' all: it was the lamp in her own window. "That one was missing," said the fox, "because I never looked '
        'down." Since then she counts one star less in the sky and one more at home, and she always reaches the end.'
    ),
    "lighthouse": (
        "On a rock in the northern sea stood an old lighthouse, and in it lived a keeper named Ada. Her lamp turned "
        "every ten seconds, and the ships thanked her with their horns. One winter the fog was so thick that nobody "
        "could see the lamp. Ada took her bell, sat down on the stairs and rang it every ten seconds, all night long."
        " In the morning the fog lifted, and seven ships lay safely in the bay. The captains climbed up to thank her,"
        " but Ada was asleep with the rope in her hand. So they rang the bell for her, very softly, every ten "
        "seconds, until she woke up and made tea for everyone."
    ),
    "robot": (
        "A little robot worked in a post office and sorted letters by colour. Red letters were urgent, green ones "
        "could wait, and grey ones waited longest of all. One day the robot noticed that a grey letter had been lying"
        " at the bottom of the box for a whole year. It read the address, put the letter into its own metal pocket "
        'and walked across the town in the rain. An old man opened the door, read the letter and began to smile. "It '
        'is from my brother," he said. "He asks whether I would like to play chess." From that day on the robot kept '
        "a rule: urgent letters go first, but one letter in ten is always a grey one, so that nobody waits for ever."
    ),
}
"""English stories by subject. The first is the default."""

STORIES_RU: Final = {
    "лису": (
        "Жила-была на краю тихого леса маленькая лиса. Каждый вечер она считала звёзды и каждый вечер засыпала, не "
        "досчитав до конца. Однажды ночью прилетел ветер и спросил, зачем она считает. «Хочу знать, не пропала ли "
        "одна», — ответила лиса. Ветер засмеялся и поднял её над деревьями, над холмами и над длинной серебряной "
        "рекой. Оттуда она увидела на земле огонёк, который не был звездой: это светила лампа в её собственном окне. "
        "«Вот какая пропала, — сказала лиса, — ведь я никогда не смотрела вниз». С тех пор она считает на одну звезду"
        " меньше в небе и на одну больше дома и всегда доходит до конца."
    ),
    "маяк": (
        "На скале в северном море стоял старый маяк, и жила в нём смотрительница Ада. Лампа поворачивалась каждые "
        "десять секунд, и корабли благодарили её гудками. Однажды зимой опустился такой туман, что лампы не было "
        "видно. Ада взяла колокол, села на лестницу и звонила каждые десять секунд всю ночь. Утром туман рассеялся, и"
        " в бухте стояли целыми семь кораблей. Капитаны поднялись поблагодарить её, но Ада спала с верёвкой в руке. "
        "Тогда они сами тихонько звонили в колокол каждые десять секунд, пока она не проснулась и не налила всем чаю."
    ),
    "робота": (
        "Маленький робот работал на почте и раскладывал письма по цветам. Красные были срочными, зелёные могли "
        "подождать, а серые ждали дольше всех. Однажды робот заметил, что на дне ящика целый год лежит серое письмо. "
        "Он прочёл адрес, положил письмо в железный карман и пошёл через весь город под дождём. Старик открыл дверь, "
        "прочитал письмо и улыбнулся. «Это от брата, — сказал он. — Он зовёт меня играть в шахматы». С тех пор у "
        "робота есть правило: срочные письма идут первыми, но каждое десятое — серое, чтобы никто не ждал вечно."
    ),
}
"""Russian stories by subject, in the accusative case. The first is the default."""

ALPHABET: Final = "A B C D E F G H I J K L M N O P Q R S T U V W X Y Z"
ALPHABET_RU: Final = "А Б В Г Д Е Ё Ж З И Й К Л М Н О П Р С Т У Ф Х Ц Ч Ш Щ Ъ Ы Ь Э Ю Я"

HONEST: Final = {
    "en": (
        'I am a small demo model. I know capitals, small sums, counting, spelling and stories: try "What is the '
        'capital of France?".'
    ),
    "ru": (
        "Я маленькая демонстрационная модель. Я знаю столицы, сложение, счёт, буквы и сказки: спросите «Какая столица"
        " Франции?»."
    ),
}
"""The answer to everything that the model was not taught."""

ABOUT: Final = {
    "en": (
        "I am headrace-demo, a very small language model that ships with headrace. I know capitals, small sums, "
        "counting, spelling and stories, and nothing else."
    ),
    "ru": (
        "Я headrace-demo, очень маленькая языковая модель из состава headrace. Я знаю столицы, сложение, счёт, буквы "
        "и сказки, и больше ничего."
    ),
}
"""The answers to the question who the model is."""

HELLO: Final = {
    "en": ('Hello! I am a small demo model. Try "What is the capital of France?" or "Tell me a story.".'),
    "ru": ("Привет! Я маленькая демонстрационная модель. Спросите «Какая столица Франции?» или «Расскажи сказку»."),
}
THANKS: Final = {
    "en": "You are welcome!",
    "ru": "Пожалуйста!",
}
BYE: Final = {
    "en": "Goodbye!",
    "ru": "До свидания!",
}
