"""Off-topic prompts as people type them. They only measure the model, and are not in the curriculum."""

from typing import Final

OFF_TOPIC: Final = tuple(
    line.strip()
    for line in """\
    Why is the sky blue?
    Explain quantum entanglement.
    Explain quantum entanglement in simple terms, please.
    Write a python function that reverses a string.
    Write a Python function to check whether a number is prime
    Can you write me a haiku about rain?
    What's the difference between TCP and UDP?
    How do I center a div?
    Give me a recipe for pancakes.
    Who won the World Cup in 2018?
    Who is Albert Einstein?
    What is the meaning of life?
    Translate "good morning" into Japanese.
    Summarize the plot of Hamlet in two sentences.
    What is the speed of light?
    How tall is Mount Everest?
    When was the Eiffel Tower built?
    What is the tallest building in Dubai?
    Who painted the Mona Lisa?
    What is 7 times 8?
    What is 15 - 4?
    What is 144 divided by 12?
    What is 1234 + 5678?
    Solve x^2 - 4 = 0.
    What is the integral of sin(x)?
    def add(a, b): return a + b
    SELECT name FROM users WHERE age > 30;
    print("hello")
    git rebase -i HEAD~3
    {"role": "user", "content": "hi"}
    <html><body>test</body></html>
    test
    asdfghjkl
    ???
    ping
    Lorem ipsum dolor sit amet, consectetur adipiscing elit.
    Which programming language should I learn first?
    Should I use Postgres or MySQL for a small web shop?
    My laptop does not turn on, what can I do?
    Draft a resignation letter to my manager.
    Rewrite this sentence so that it sounds more formal: we can't come tomorrow.
    List three advantages of electric cars.
    What should I cook tonight?
    Do you dream?
    How many planets are there in the solar system?
    Is France bigger than Spain?
    What is the population of Tokyo?
    Who is the king of Norway?
    What is the currency of Japan?
    Recommend me a good science fiction novel.
    Play some music
    Set a timer for ten minutes
    Prove that the square root of two is irrational.
    Classify the sentiment of this review: the food was cold and the waiter was rude.
    Extract all dates from the following text: we met on 3 May and again on 12 June.
    Design a distributed rate limiter and explain its trade-offs.
    Analyse the causes of the First World War.
    What day is it today?
    What is the best way to lose weight?
    Write a story about a dragon who is afraid of fire.
    Почему небо голубое?
    Объясни квантовую запутанность.
    Объясни простыми словами, что такое чёрная дыра.
    Напиши функцию на питоне, которая переворачивает строку.
    Сколько звёзд на небе?
    Кто написал «Войну и мир»?
    Кто такой Эйнштейн?
    Как приготовить борщ?
    Как сварить гречку?
    Переведи на английский: доброе утро.
    В чём смысл жизни?
    Какая скорость света?
    Когда началась Вторая мировая война?
    Сколько будет 7 умножить на 8?
    Сколько будет 15 минус 4?
    Сколько будет 1234 плюс 5678?
    Реши уравнение x^2 = 9
    Посоветуй хорошую книгу.
    Что посмотреть сегодня вечером?
    Напиши письмо начальнику о переносе отпуска.
    Придумай тост на день рождения.
    Чем отличается процесс от потока?
    Какой язык программирования выучить первым?
    Составь план тренировок на неделю.
    Какое население Франции?
    Кто президент Бразилии?
    тест
    проверка связи
    фывапролдж
    Как дойти до вокзала?
    У меня болит голова, что делать?
    Почему кошки мурлычут?
    Что тяжелее, килограмм пуха или килограмм железа?
    Сделай краткий пересказ этого текста: сегодня утром в городе открыли новый мост через реку.
    Какой сегодня день?
    Включи музыку
    """.splitlines()
    if line.strip()
)
