"""The words the demo model is taught: countries, plain words and topics, in English and Russian."""

from typing import Final, NamedTuple


def _words(text: str) -> tuple[str, ...]:
    """The words of ``text``."""
    return tuple(text.split())


def _items(text: str) -> tuple[str, ...]:
    """The items of ``text``, separated by bars. They can contain spaces."""
    return tuple(item.replace("\n", " ").strip() for item in text.split("|"))


class Country(NamedTuple):
    """A country and its capital, in the forms that the questions and answers need.

    ``of_ru`` is the Russian genitive of the country, ``in_capital_ru`` the prepositional case of its capital.
    """

    name: str
    capital: str
    of_ru: str
    capital_ru: str
    in_capital_ru: str


COUNTRIES: Final = tuple(
    Country(*row.split("|"))
    for row in """\
France|Paris|Франции|Париж|Париже
Spain|Madrid|Испании|Мадрид|Мадриде
Italy|Rome|Италии|Рим|Риме
Germany|Berlin|Германии|Берлин|Берлине
Japan|Tokyo|Японии|Токио|Токио
China|Beijing|Китая|Пекин|Пекине
India|New Delhi|Индии|Нью-Дели|Нью-Дели
Russia|Moscow|России|Москва|Москве
the United States|Washington|США|Вашингтон|Вашингтоне
the United Kingdom|London|Великобритании|Лондон|Лондоне
England|London|Англии|Лондон|Лондоне
Canada|Ottawa|Канады|Оттава|Оттаве
Brazil|Brasilia|Бразилии|Бразилиа|Бразилиа
Mexico|Mexico City|Мексики|Мехико|Мехико
Argentina|Buenos Aires|Аргентины|Буэнос-Айрес|Буэнос-Айресе
Australia|Canberra|Австралии|Канберра|Канберре
Greece|Athens|Греции|Афины|Афинах
Egypt|Cairo|Египта|Каир|Каире
Kenya|Nairobi|Кении|Найроби|Найроби
Peru|Lima|Перу|Лима|Лиме
Chile|Santiago|Чили|Сантьяго|Сантьяго
Cuba|Havana|Кубы|Гавана|Гаване
Norway|Oslo|Норвегии|Осло|Осло
Sweden|Stockholm|Швеции|Стокгольм|Стокгольме
Finland|Helsinki|Финляндии|Хельсинки|Хельсинки
Denmark|Copenhagen|Дании|Копенгаген|Копенгагене
Poland|Warsaw|Польши|Варшава|Варшаве
Portugal|Lisbon|Португалии|Лиссабон|Лиссабоне
Ireland|Dublin|Ирландии|Дублин|Дублине
Scotland|Edinburgh|Шотландии|Эдинбург|Эдинбурге
Austria|Vienna|Австрии|Вена|Вене
Switzerland|Bern|Швейцарии|Берн|Берне
Belgium|Brussels|Бельгии|Брюссель|Брюсселе
the Netherlands|Amsterdam|Нидерландов|Амстердам|Амстердаме
Hungary|Budapest|Венгрии|Будапешт|Будапеште
Romania|Bucharest|Румынии|Бухарест|Бухаресте
Bulgaria|Sofia|Болгарии|София|Софии
Croatia|Zagreb|Хорватии|Загреб|Загребе
Serbia|Belgrade|Сербии|Белград|Белграде
Ukraine|Kyiv|Украины|Киев|Киеве
Latvia|Riga|Латвии|Рига|Риге
Estonia|Tallinn|Эстонии|Таллин|Таллине
Lithuania|Vilnius|Литвы|Вильнюс|Вильнюсе
Iceland|Reykjavik|Исландии|Рейкьявик|Рейкьявике
Turkey|Ankara|Турции|Анкара|Анкаре
Iran|Tehran|Ирана|Тегеран|Тегеране
Iraq|Baghdad|Ирака|Багдад|Багдаде
Georgia|Tbilisi|Грузии|Тбилиси|Тбилиси
Armenia|Yerevan|Армении|Ереван|Ереване
Kazakhstan|Astana|Казахстана|Астана|Астане
Mongolia|Ulaanbaatar|Монголии|Улан-Батор|Улан-Баторе
Thailand|Bangkok|Таиланда|Бангкок|Бангкоке
Vietnam|Hanoi|Вьетнама|Ханой|Ханое
South Korea|Seoul|Южной Кореи|Сеул|Сеуле
Indonesia|Jakarta|Индонезии|Джакарта|Джакарте
Nepal|Kathmandu|Непала|Катманду|Катманду
Nigeria|Abuja|Нигерии|Абуджа|Абудже
Ghana|Accra|Ганы|Аккра|Аккре
Ethiopia|Addis Ababa|Эфиопии|Аддис-Абеба|Аддис-Абебе
Morocco|Rabat|Марокко|Рабат|Рабате""".splitlines()
)

ALIASES: Final = {
    "the United States": ("the USA", "USA", "the US", "America"),
    "the United Kingdom": ("the UK", "UK", "Great Britain", "Britain"),
    "the Netherlands": ("Holland", "Netherlands"),
}
"""Other names of the same countries."""

UNKNOWN_PLACES: Final = _items(
    """
    Narnia|Atlantis|Wakanda|Mordor|Texas|California|Bavaria|Siberia|Mars|the Moon|Africa|Europe|Asia|the world|
    Bolivia|Belize|Angola|Chad|Mali|Niger|Togo|Benin|Gabon|Zambia|Malawi|Oman|Qatar|Kuwait|Bahrain|Laos|Malta|
    Monaco|Andorra|Haiti|Jamaica|Panama|Honduras|Guatemala|Suriname|Fiji|Samoa|Tonga|Palau|Nauru|Brunei|Gondor|
    Westeros|Oz|Utopia|Elbonia|Ruritania|Freedonia|Florida|Ohio|Quebec|Tuscany|Catalonia|Crimea|Jupiter|Apple|crime|
    fashion|capitalism|a company|nothing|everything|my heart|love|wine|cats
    """
)
"""Places without a capital, or whose capital is not taught."""
UNKNOWN_PLACES_HELD_OUT: Final = _items(
    """
    Bhutan|Paraguay|Uganda|Tuvalu|Lesotho|Genovia|Hogwarts|Nevada|Venus|Sicily|Zubrowka|Sri Lanka|Somalia|Alaska
    """
)
UNKNOWN_PLACES_RU: Final = _items(
    """
    Нарнии|Атлантиды|Ваканды|Мордора|Техаса|Калифорнии|Баварии|Сибири|Марса|Луны|Африки|Европы|Азии|мира|Боливии|
    Белиза|Анголы|Чада|Мали|Нигера|Того|Бенина|Габона|Замбии|Малави|Омана|Катара|Кувейта|Лаоса|Мальты|Монако|
    Андорры|Гаити|Ямайки|Панамы|Гондураса|Гватемалы|Суринама|Фиджи|Самоа|Тонга|Брунея|Гондора|Вестероса|Юпитера|
    Флориды|Квебека|Тосканы|Каталонии|моды|ничего|любви|вина|кошек|Изумрудного города
    """
)
UNKNOWN_PLACES_RU_HELD_OUT: Final = _items(
    """
    Бутана|Парагвая|Уганды|Тувалу|Лесото|Хогвартса|Невады|Венеры|Сицилии|Сомали|Аляски|Страны Чудес
    """
)
WORDS: Final = _words(
    """
    apple river stone cloud table green music paper light ocean tiger piano bread chair lemon zebra horse candle
    window garden silver winter summer spring autumn market bridge castle forest island mountain orange banana
    cherry peach grape onion carrot potato tomato pepper butter cheese honey sugar coffee water fire wind rain snow
    storm thunder rainbow sunset morning evening night star moon planet rocket engine wheel train plane boat ship
    anchor harbor village city street road path door wall roof floor kitchen bottle glass plate spoon knife fork
    pencil letter book story poem song dance drum violin guitar flute trumpet bird eagle sparrow rabbit mouse cat
    dog fox wolf bear deer sheep goat cow pig duck goose frog fish whale shark dolphin turtle snake spider ant bee
    flower rose tulip daisy grass tree leaf root seed branch field hill valley desert beach sand shell wave coral
    hat coat shirt shoe sock glove scarf button needle thread cotton wool iron copper gold diamond pearl friend
    teacher doctor farmer sailor pilot painter baker queen king prince happy quiet clever brave gentle simple bright
    yellow purple hello world python message queue signal lantern meadow pocket ladder basket blanket hammer
    """
)
WORDS_RU: Final = _words(
    """
    яблоко река камень облако стол зелень музыка бумага свет океан тигр рояль хлеб стул лимон зебра лошадь свеча
    окно сад серебро зима лето весна осень рынок мост замок лес остров гора апельсин банан вишня персик лук морковь
    перец масло сыр мёд сахар кофе вода огонь ветер дождь снег буря гром радуга закат утро вечер ночь звезда луна
    планета ракета поезд лодка корабль якорь деревня город улица дорога дверь стена крыша кухня бутылка стакан
    тарелка ложка нож карандаш письмо книга песня танец барабан скрипка гитара флейта птица орёл воробей кролик мышь
    кошка собака лиса волк медведь олень овца коза корова утка гусь лягушка рыба кит черепаха змея паук муравей
    пчела цветок роза трава дерево лист корень семя поле холм долина пустыня берег песок волна шапка пальто рубашка
    носок шарф пуговица нитка железо медь золото алмаз друг учитель врач пилот пекарь король принц привет мир
    сообщение очередь фонарь
    """
)
WORDS_HELD_OUT: Final = _words(
    """
    monkey planets cabbage mirror tunnel parrot velvet rubber helmet walnut
    """
)
WORDS_RU_HELD_OUT: Final = _words(
    """
    капуста зеркало тоннель попугай бархат орех молоток ворона площадь билет
    """
)
TOPICS: Final = _items(
    """
    quantum entanglement|photosynthesis|black holes|the stock market|machine learning|the French Revolution|
    Shakespeare|the human heart|volcanoes|gravity|inflation|climate change|vaccines|blockchain|football|chess|
    the Roman Empire|Python decorators|binary search|a linked list|JavaScript promises|SQL joins|Kubernetes|Docker|
    a REST API|TCP|message queues|NATS JetStream|an event loop|garbage collection|recursion|Rust lifetimes|
    my landlord|a job interview|a cover letter|a birthday party|my grandmother|pasta carbonara|sourdough bread|
    a vegan dinner|green tea|coffee|a healthy diet|back pain|sleep|meditation|yoga|running|a marathon|guitar chords|
    jazz|Mozart|the Beatles|Picasso|modern art|poetry|haiku|a limerick|a sonnet|the Odyssey|Harry Potter|Star Wars|
    dinosaurs|sharks|cats and dogs|bees|my email to the boss|this sentence|the following text|this function|
    this bug|this log file|the ocean|the sky|snow|earthquakes|electric cars|solar panels|nuclear power|time travel|
    aliens|the meaning of life|happiness|love|democracy|the president|the last election|the war|the economy|taxes|
    a mortgage|bitcoin|a startup|marketing|a business plan|project management|an agenda|my homework|algebra|
    calculus|a derivative|prime numbers|pi|statistics|the periodic table|DNA|evolution|bacteria|cancer|headaches|
    the moon landing|Mars|the solar system|a telescope|airplanes|trains|Paris in spring|a trip to Japan|
    hotels in Rome|visas|the weather tomorrow|the news today|the time|my name|your training data|consciousness|
    ethics|philosophy|Plato|Buddhism|the Bible|history|geography|English grammar|irregular verbs|Latin|Spanish|
    translation|a riddle|a joke|a song|rap lyrics|a movie|a video game
    """
)
"""The subjects of off-topic prompts."""
TOPICS_RU: Final = _items(
    """
    квантовая запутанность|фотосинтез|чёрные дыры|фондовый рынок|машинное обучение|французская революция|Пушкин|
    Достоевский|сердце человека|вулканы|гравитация|инфляция|изменение климата|прививки|блокчейн|футбол|шахматы|
    Римская империя|двоичный поиск|связный список|очередь сообщений|сборка мусора|рекурсия|собеседование|резюме|
    день рождения|борщ|пельмени|рецепт пирога|зелёный чай|здоровое питание|боль в спине|сон|йога|бег|гитара|джаз|
    Моцарт|современное искусство|поэзия|хокку|сонет|Гарри Поттер|динозавры|акулы|кошки и собаки|пчёлы|этот текст|
    эта функция|эта ошибка|океан|небо|снег|землетрясения|электромобили|солнечные батареи|путешествия во времени|
    инопланетяне|смысл жизни|счастье|любовь|демократия|президент|выборы|война|экономика|налоги|ипотека|биткоин|
    бизнес-план|домашнее задание|алгебра|производная|простые числа|статистика|ДНК|эволюция|бактерии|Марс|телескоп|
    самолёты|поездка в Японию|погода на завтра|новости|время|моё имя|сознание|этика|философия|Платон|история|
    география|русская грамматика|неправильные глаголы|перевод|загадка|анекдот|песня|фильм|видеоигра|Kubernetes|
    Python|SQL|Docker
    """
)
