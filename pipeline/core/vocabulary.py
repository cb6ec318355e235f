"""The words and phrases that triage looks for in a prompt, in English and in Russian.

In word lists, `*` after at least four letters means any ending. Russian words need it for their endings.
"""

from __future__ import annotations

# The words of each sign of a long or hard answer.
SIGN_WORDS = {
    "code": """
        python javascript typescript java rust golang kotlin cpp html css sql regex json yaml xml bash
        asyncio kubernetes docker* refactor* debug* implement* algorithm* compil* codebase unittest*
        stacktrace traceback typeerror valueerror keyerror exception* mutex* semaphore* schema* endpoint*
        deploy* async recursive*
        питон* джава* функци* скрипт* рефактор* отрефактор* отлад* алгоритм* реализуй* компил* регулярн*
        класс программу программа мьютекс* семафор* кэш база базу базы базе код сортировк* сборк*
    """,
    "reasoning": """
        prove* proof* derive* analy* compar* contrast* evaluat* critique* critici* justif* argue* argument*
        assess* deduc* infer* flaw* contradict* optimi* diagnos* investigat* resolve* decide* strateg*
        implication* consequence* relationship* influenc* responsible interpret* reconcile* tradeoff* versus
        vs
        докаж* доказ* вывед* проанализ* анализ* сравн* оцени* обоснуй* обоснов* аргумент* довод* стратег*
        последстви* связан* влия* виноват* интерпрет* разреши* выясн* проверь* реши рассуди* противореч*
        оптимиз* исследуй*
    """,
    "explanation": """
        why explain* elaborat* describ* teach* understand*
        зачем почему отчего объясн* поясн* опиш* расскаж* научи* разбер* растолк* пояснени* перескаж*
        изложи*
    """,
    "mathematics": """
        integral* factorial* remainder digits derivative* eigen* determinant* matri* equation* theorem* probab*
        polynomial* logarithm*
        solve* vector* abelian modulo permutation* combinator* calculus geometr* hypothes* variance* arrange
        irrational
        интеграл* факториал* остаток цифр* производн* определител* матриц* уравнен* теорем* вероятност*
        многочлен* логарифм* вектор*
        абелев* перестанов* докажите иррационал* дисперси* сложность
    """,
    "composition": """
        write* compose* draft* essay* story* stories poem* poetry article* blog* speech* novel* song* lyrics
        invent brainstorm* joke* generat* report* rewrite* summar* paraphras* creat* continue* names
        напиш* сочин* эссе рассказ* стих* статью статья письмо* придум* песн* доклад* состав* перепиш*
        продолж* отчёт* отчет* создай* сделай* резюм*
    """,
    "planning": """
        plan plans planned planning planner* outline* design* architect* roadmap* schedul* build* propos*
        subtask* orchestrat* coordinat* assign* workout* prepar*
        план планы плана планируй* спроектир* разработ* распиш* подзадач* координатор* распредел* разбей*
        предложи предложите подготов*
    """,
    "thoroughness": """
        detail* detailed thorough* comprehensive* everything chapter* theme* complete* steps exhaustive*
        timeline* list
        подробн* главу главы темы смысл детальн* обстоятельн* всесторонн* полностью пошагов* развёрнут* разверн*
        перечисл*
    """,
    "judgement": """
        should right wisely deserv* between matter* benefit* gains good best better makes suits suitable fits
        important worse pros cons advantage* disadvantage*
        opinion* recommend* advice advise* invest* improve* ethic* moral* rights risk* think believe* wrong
        symptom* headache* legal* difference* effective*
        стоит лучше хуже прав права между выигра* выгодны выгодно полезна полезно зависит хорош* хорошим важн*
        подойд* подход* делает плюсы минусы преимуществ* недостат*
        мнени* посовет* рекоменд* влож* налад* этич* риск* думаешь считаешь разниц* отличи* надёжн*
        надежн* болит слабые
    """,
    "personal": """
        i my mine we our us
        я мой моя мое моё мои мою моей моего моему меня мы нас наш наша наше наши нашу
    """,
    "supposition": """
        if suppose* assum* imagin* would will hypothetical* unless whether were
        если предполож* представ* допуст* бы произойд* произойдет случится
    """,
    "conjunction": """
        also then both except least without after before twice half
        кроме также затем потом либо вдвое половин*
    """,
    "negation": """
        not no never neither nor cannot incorrect false
        не нет никогда неверн*
    """,
    "abstraction": """
        economy society democracy inflation freedom consciousness justice policy theory theories philosoph*
        culture* entropy ethics history politic* instabilit* determinism meaning happiness beauty truth
        общества экономик* демократ* инфляци* свобод* сознани* справедлив* политик* теори* философ* культур*
        энтропи* детерминизм* безработиц* кризис* сознание истин* счасть*
    """,
}

# Signs of more than one word, and marks.
SIGN_PHRASES = {
    "code": (
        "source code",
        "write code",
        "this code",
        "function that",
        "write a function",
        "this class",
        "unit test",
        "time complexity",
        "def ",
        "();",
        "){",
        "=>",
        "#include",
        "import ",
        "for i in",
        "</",
        "/>",
        "select *",
        "базу данных",
        "запрос sql",
    ),
    "composition": (
        "an email to",
        "a letter",
        "cover letter",
        "email to",
    ),
    "reasoning": (
        "step by step",
        "step-by-step",
        "chain of thought",
        "point out",
        "review the",
        "review this",
        "trade-off",
        "find the flaw",
        "what happens if",
        "шаг за шагом",
        "по шагам",
        "в чем",
        "что будет, если",
        "слабые места",
    ),
    "mathematics": (
        "\\frac",
        "\\sum",
        "\\int",
        "\\sqrt",
        "$$",
        "x^",
        "^2",
        "how many ways",
        "f(x)",
        "sin(",
        "log(",
        "корень из",
        "∫",
        "∑",
        "√",
        "∀",
        "∃",
        "≤",
        "≥",
        "->",
        "[[",
    ),
    "thoroughness": (
        "in detail",
        "at length",
        "in depth",
        "in-depth",
        "tell me about",
        "the message of",
        "as many as",
        "all the",
        "and say what",
        "все о ",
        "как можно больше",
        "в деталях",
    ),
    "judgement": (
        "what do you think",
        "pros and cons",
        "what could it be",
        "my rights",
        "что делать",
        "что это может быть",
        "за и против",
    ),
    "explanation": (
        "how does",
        "how do i ",
        "how do we ",
        "how to",
        "how would",
        "how should",
        "how can",
        "what causes",
        "каким образом",
        "как работает",
        "как настроить",
        "как сделать",
        "как наладить",
        "как это",
    ),
}

# Small jobs on a given text, by the words that name them: whole words in this order, `*` as above.
JOB_PHRASES = {
    "short translation": """
        translate, переведи, переведите
    """,
    "short classification": """
        classify, categorize, categorise, label, sentiment, spam, route this, pick the, which language is,
        классифицируй, тональность, спам, отнеси, к одной из, выбери, на каком языке
    """,
    "short extraction": """
        extract, mentioned, in this sentence, in this text, named here, named in the text, названа в тексте,
        назван в тексте, in the following, извлеки, выпиши, найди дату,
        найди имя, найди адрес, найди номер, найди сумму, найди телефон
    """,
    "small edit": """
        correct the spelling, fix the typo, fix the spelling, fix the grammar, uppercase, lowercase, plural,
        plural of,
        singular of, synonym*, antonym*, opposite of, past tense of, spell, исправь ошибк*, исправьте ошибк*,
        исправь опечатк*, синоним*, антоним*, множественн*, единственное число, единственном числе, заглавны*,
        прописны*
    """,
}

# Requests for a very short answer.
BRIEF_PHRASES = """
    one word, single word, yes or no, true or false, reply with, respond with, answer with, name only,
    number only, label only, letter only, only the name, only the number, одним словом, да или нет,
    ответь словом, ответь только, ответьте только, ответь ок, только названи*, только имен*, только числ*,
    только слов*
"""

# The objects of a question for one fact, each with any ending.
ATTRIBUTES = """
    capital currency population year date day month colour color symbol language planet ocean sea river country
    city continent mountain lake desert animal bird tree element number height length depth weight distance
    temperature speed port author president king queen director painter inventor flag code area abbreviation
    acronym formula unit instrument sport team film movie book novel song age zone boiling melting freezing
    birthday island nationality word border
    largest longest highest smallest deepest closest nearest tallest fastest biggest oldest shortest heaviest
    столиц валют населени год дату дата день месяц цвет символ язык планет океан море река реки реку стран
    город континент материк гора гору озер пустын животн птиц дерев элемент номер имя высот длин глубин масс
    расстояни температур скорост порт автор президент корол режиссер художник флаг код площад аббревиатур
    формул единиц инструмент команд фильм книг песн возраст век остров самы наибольш крупнейш
"""

# The only words of a greeting.
GREETING_WORDS = """
    hi hello hey there good morning evening afternoon night day thanks thank you bye goodbye say how are doing
    today that is all very much lot so friend everyone team a an in friendly way please to me
    привет здравствуй здравствуйте добрый доброе доброго утро утра день дня вечер вечера спасибо большое пока
    до свидания как дела это все всем тебе вам поздоровайся
"""

# The only words of a small sum, besides its numbers.
SUM_WORDS = """
    what is s the how much many calculate compute add sum of plus minus times divided by and equals equal
    percent
    one two three four five six seven eight nine ten
    сколько будет чему равно равна посчитай вычисли сложи сумма плюс минус умножить разделить на и процентов от
    один два три четыре пять шесть семь восемь девять десять
"""
