"""Seeded generators of single question-and-answer turns: the simple tasks of tiny-chat."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from . import words

ABOUT = "I am tiny-chat, a tiny demo model. I can add, spell and reverse words, name capitals and call tools."
UNKNOWN = "Sorry, I am only a tiny demo model and I do not know that."


@dataclass(frozen=True)
class Turn:
    """One user message with its only right answer.

    `thought` is what goes between the think tags when thinking is enabled; `key`, when given, is hashed
    for the held-out split instead of the question.
    """

    question: str
    answer: str
    thought: str
    key: str = ""


def ordinary_case(rng: random.Random, text: str) -> str:
    """The text, or (three times in ten) all of it in lower case."""
    return text.lower() if rng.random() < 0.3 else text


def phrase(rng: random.Random, templates: Sequence[str], keep_case: bool = False, **slots: object) -> str:
    """Fill one of the templates, then vary case, punctuation and politeness as people do.

    With `keep_case` the slots keep their case (names, JSON values), whatever happens to the rest.
    """
    template = rng.choice(templates)
    roll = rng.random()
    if roll < 0.10:
        template = rng.choice(("Please tell me: ", "Quick question: ", "Hi! ", "Hello, ", "OK, ", "Now ")) + template
    elif roll < 0.16:
        template = template.rstrip("?.") + rng.choice((" please", ", please", " please?", ", thanks", "? Thanks!"))
    text = template.format(**slots) if not keep_case else template
    if rng.random() < 0.3:
        text = text.lower()
    if rng.random() < 0.2:
        text = text.rstrip("?.! ")
    return text.format(**slots) if keep_case else text


def add_thought(a: int, b: int) -> str:
    """Column addition, ones first, with the carry spelled out."""
    ones, tens = a % 10 + b % 10, a // 10 + b // 10
    carry = f"{a // 10} + {b // 10} + 1 = {tens + 1}" if ones > 9 else f"{a // 10} + {b // 10} = {tens}"
    return f"{a % 10} + {b % 10} = {ones}, {carry}."


def subtract_thought(a: int, b: int) -> str:
    """Subtract the tens of b, then its ones."""
    middle = a - b // 10 * 10
    return f"{a} - {b // 10 * 10} = {middle}, {middle} - {b % 10} = {a - b}."


def add(rng: random.Random) -> Turn:
    a, b = rng.randint(1, 99), rng.randint(1, 99)
    question = phrase(
        rng,
        (
            "What is {a} + {b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "{a}+{b}=", "Add {a} and {b}.",
            "What is {a} plus {b}?", "Calculate {a} + {b}.", "How much is {a} + {b}?", "{a} plus {b}",
            "What's {a}+{b}?", "Compute {a} plus {b}.", "What is the sum of {a} and {b}?", "Can you add {a} and {b}?",
            "I have {a} apples and get {b} more. How many do I have?", "Sum of {a} and {b}?",
        ),
        a=a, b=b,
    )  # fmt: skip
    return Turn(question, str(a + b), add_thought(a, b), f"{a}+{b}")


def subtract(rng: random.Random) -> Turn:
    a, b = sorted((rng.randint(1, 99), rng.randint(1, 99)), reverse=True)
    question = phrase(
        rng,
        (
            "What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "{a}-{b}=", "Subtract {b} from {a}.",
            "What is {a} minus {b}?", "Calculate {a} - {b}.", "How much is {a} - {b}?", "{a} minus {b}",
            "What's {a}-{b}?", "Compute {a} minus {b}.", "Take {b} away from {a}.",
            "I had {a} apples and ate {b}. How many are left?", "What is the difference between {a} and {b}?",
        ),
        a=a, b=b,
    )  # fmt: skip
    return Turn(question, str(a - b), subtract_thought(a, b), f"{a}-{b}")


def multiply(rng: random.Random) -> Turn:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    question = phrase(
        rng,
        (
            "What is {a} * {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b}", "{a} times {b}", "What is {a} times {b}?",
            "Multiply {a} by {b}.", "Calculate {a} x {b}.", "How much is {a} * {b}?", "{a} * {b} = ?", "What's {a}x{b}?",
            "What is the product of {a} and {b}?", "What is {a} multiplied by {b}?",
        ),
        a=a, b=b,
    )  # fmt: skip
    return Turn(question, str(a * b), f"{a} times {b} is {a * b}.")


def quoted(rng: random.Random, word: str) -> str:
    return rng.choice((word, word, f'"{word}"', f"'{word}'"))


def reverse(rng: random.Random) -> Turn:
    word = rng.choice(words.WORDS)
    question = phrase(
        rng,
        (
            "Reverse the word {w}.", "Reverse {w}", "Spell {w} backwards.", "What is {w} backwards?", "Write {w} backwards.",
            "{w} backwards", "Reverse this word: {w}", "Can you reverse {w}?", "What is {w} spelled backwards?",
            "Reverse the letters of {w}.", "Say {w} in reverse.", "Turn {w} around.", "How do you write {w} in reverse?",
            "Give me the word {w} reversed.",
        ),
        w=quoted(rng, word),
    )  # fmt: skip
    return Turn(question, "-".join(reversed(word)), f"The letters are {'-'.join(word)}.")


def spell(rng: random.Random) -> Turn:
    word = rng.choice(words.WORDS)
    question = phrase(
        rng,
        (
            "Spell the word {w}.", "Spell {w}", "How do you spell {w}?", "Can you spell {w}?", "What are the letters of {w}?",
            "Spell out {w}.", "Spell {w} for me.", "Write {w} letter by letter.", "How is {w} spelled?", "spelling of {w}",
            "What letters are in {w}?", "Please spell: {w}", "Break {w} into letters.",
        ),
        w=quoted(rng, word),
    )  # fmt: skip
    return Turn(question, "-".join(word), f"I spell the word {word}.")


CYCLE_STEPS: dict[int, tuple[str, ...]] = {
    1: (
        "What {unit} comes after {x}?", "Which {unit} follows {x}?", "What is the {unit} after {x}?",
        "The {unit} after {x}?", "What comes after {x}?", "Tell me the {unit} after {x}.", "Name the {unit} following {x}.",
        "If it is {x}, what is the next {unit}?", "Next {unit} after {x}?", "After {x} comes which {unit}?",
    ),
    -1: (
        "What {unit} comes before {x}?", "Which {unit} precedes {x}?", "What is the {unit} before {x}?",
        "The {unit} before {x}?", "What comes before {x}?", "Tell me the {unit} before {x}.",
        "Name the {unit} preceding {x}.", "If it is {x}, what was the previous {unit}?", "Previous {unit} before {x}?",
        "Before {x} comes which {unit}?",
    ),
    2: (
        "What {unit} is two {unit}s after {x}?", "Which {unit} comes two {unit}s after {x}?", "Two {unit}s after {x}?",
        "What is 2 {unit}s after {x}?",
    ),
}  # fmt: skip


def cycle(rng: random.Random, unit: str, values: Sequence[str], extra: Sequence[str]) -> Turn:
    """A question about the neighbours of a value in a cyclic sequence (days, months)."""
    index, step = rng.randrange(len(values)), rng.choice((1, 1, -1, -1, 2))
    templates = CYCLE_STEPS[step] + (tuple(extra) if step == 1 else ())
    answer = values[(index + step) % len(values)]
    relation = {1: "after", -1: "before", 2: "two after"}[step]
    question = phrase(rng, templates, unit=unit, x=values[index])
    return Turn(question, answer, f"The {unit} {relation} {values[index]} is {answer}.")


def days(rng: random.Random) -> Turn:
    if rng.random() < 0.1:
        templates = ("List the days of the week.", "What are the days of the week?", "Name all days of the week.",
                     "Name the seven days.", "Tell me the days of the week.", "All weekdays in order?")  # fmt: skip
        return Turn(phrase(rng, templates), ", ".join(words.DAYS), "I list all seven days.")
    return cycle(
        rng, "day", words.DAYS, ("Today is {x}. What day is tomorrow?", "If today is {x}, what is tomorrow?")
    )


def months(rng: random.Random) -> Turn:
    roll = rng.random()
    if roll < 0.1:
        templates = ("List the months of the year.", "What are the months?", "Name all twelve months.",
                     "Tell me the months of the year.", "List all months.", "All months in order?")  # fmt: skip
        return Turn(phrase(rng, templates), ", ".join(words.MONTHS), "I list all twelve months.")
    if roll < 0.3:
        number = rng.randint(1, 12)
        templates = ("What is month number {n}?", "Which month is number {n}?", "What is month {n} of the year?",
                     "Month {n}?", "Name month number {n}.")  # fmt: skip
        answer = words.MONTHS[number - 1]
        return Turn(phrase(rng, templates, n=number), answer, f"Month {number} is {answer}.")
    return cycle(
        rng, "month", words.MONTHS, ("It is {x}. What month is next?", "If it is {x} now, what is next month?")
    )


def colours(rng: random.Random) -> Turn:
    colour = rng.choice(("colour", "color"))
    if rng.random() < 0.3:
        (first, second), answer = rng.choice(tuple(words.COLOUR_MIXES.items()))
        if rng.random() < 0.5:
            first, second = second, first
        templates = ("What {c} do you get when you mix {a} and {b}?", "Mix {a} and {b}", "What do {a} and {b} make?",
                     "Which {c} is {a} plus {b}?", "{a} and {b} mixed give which {c}?", "What is {a} mixed with {b}?",
                     "If I mix {a} and {b}, what {c} do I get?", "What {c} do {a} and {b} make?")  # fmt: skip
        question = phrase(rng, templates, c=colour, a=first, b=second)
        return Turn(question, answer, f"{first} and {second} make {answer}.")
    thing, answer = rng.choice(tuple(words.THING_COLOURS.items()))
    templates = ("What {c} is {t}?", "Which {c} is {t}?", "What is the {c} of {t}?", "Tell me the {c} of {t}.",
                 "What {c} does {t} have?", "{c} of {t}?", "Name the {c} of {t}.", "What {c} is {t} usually?",
                 "Do you know what {c} {t} is?", "The {c} of {t}?")  # fmt: skip
    return Turn(phrase(rng, templates, c=colour, t=thing), answer, f"The colour of {thing} is {answer}.")


def capitals(rng: random.Random) -> Turn:
    country, city = rng.choice(tuple(words.CAPITALS.items()))
    if rng.random() < 0.2 and city != "London":
        templates = ("{y} is the capital of which country?", "Which country has the capital {y}?",
                     "What country is {y} the capital of?", "Of which country is {y} the capital?")  # fmt: skip
        answer = country.removeprefix("the ")
        return Turn(phrase(rng, templates, y=city), answer, f"{city} is the capital of {answer}.")
    templates = (
        "What is the capital of {x}?", "What's the capital of {x}?", "capital of {x}", "Name the capital of {x}.",
        "Which city is the capital of {x}?", "Tell me the capital of {x}.", "The capital of {x}?",
        "Can you tell me the capital of {x}?", "Do you know the capital of {x}?", "What is the capital city of {x}?",
        "What city is the capital of {x}?", "Give me the capital of {x}.",
    )  # fmt: skip
    return Turn(phrase(rng, templates, x=country), city, f"The capital of {country} is {city}.")


def units(rng: random.Random) -> Turn:
    many, one, small, factor, top = rng.choice(words.UNITS)
    count = 1 if rng.random() < 0.1 else rng.randint(2, top)
    big = one if count == 1 else many
    templates = (
        "How many {s} are in {n} {b}?", "How many {s} are there in {n} {b}?", "Convert {n} {b} to {s}.",
        "{n} {b} in {s}", "What is {n} {b} in {s}?", "{n} {b} to {s}", "How many {s} is {n} {b}?",
        "Change {n} {b} into {s}.", "{n} {b} is how many {s}?", "Express {n} {b} in {s}.",
    )  # fmt: skip
    question = phrase(rng, templates, n=count, b=big, s=small)
    return Turn(question, f"{count * factor} {small}", f"{count} times {factor} is {count * factor}.")


def counting(rng: random.Random) -> Turn:
    first = 1 if rng.random() < 0.5 else rng.randint(2, 20)
    last = first + rng.randint(2, 12)
    templates = ("Count from {a} to {b}.", "count {a} to {b}", "List the numbers from {a} to {b}.",
                 "Can you count from {a} to {b}?", "Write the numbers {a} to {b}.", "Numbers from {a} to {b}")  # fmt: skip
    if first == 1:
        templates += ("Count to {b}.", "Count up to {b}", "Please count to {b}.")
    answer = ", ".join(str(number) for number in range(first, last + 1))
    return Turn(phrase(rng, templates, a=first, b=last), answer, f"I start at {first} and stop at {last}.")


def syllables(rng: random.Random) -> str:
    """A made-up word, so that copying is learned and not only known words."""
    return "".join(
        rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") + rng.choice(("", "", "n", "r", "l", "s"))
        for _ in range(rng.randint(2, 3))
    )


def repeat(rng: random.Random) -> Turn:
    pool = (*words.WORDS, *words.NAMES, *words.COLOURS)
    parts = [syllables(rng) if rng.random() < 0.3 else rng.choice(pool) for _ in range(rng.randint(1, 5))]
    text = " ".join(parts)
    templates = ("Repeat after me: {t}", "Say: {t}", "Repeat: {t}", 'Say "{t}"', 'Repeat "{t}"', "Echo: {t}",
                 "Copy this text: {t}", 'Repeat this: "{t}"', "Please say: {t}")  # fmt: skip
    question = rng.choice(templates)
    return Turn(ordinary_case(rng, question).format(t=text), text, "I repeat the text.")


def person(rng: random.Random) -> str:
    return syllables(rng).capitalize() if rng.random() < 0.3 else rng.choice(words.NAMES)


def person_record(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A sentence about a person, and its fields."""
    name, age, city, job = person(rng), rng.randint(18, 90), rng.choice(words.CITIES), rng.choice(words.JOBS)
    article = "an" if job[0] in "aeiou" else "a"
    templates = (
        "{name} is {age} years old, lives in {city} and works as {article} {job}.",
        "{name} is {article} {job} from {city}, aged {age}.",
        "My name is {name}, I am {age} and I am {article} {job} in {city}.",
        "{name}, {age}, is {article} {job} living in {city}.",
        "In {city} lives {name}, {article} {job} who is {age} years old.",
        "I'm {name} from {city}. I am {age} years old and I work as {article} {job}.",
    )
    fields: dict[str, object] = {"name": name, "age": age, "city": city, "job": job}
    return rng.choice(templates).format(article=article, **fields), fields


def order_record(rng: random.Random) -> tuple[str, dict[str, object]]:
    """A sentence about a purchase, and its fields."""
    fields: dict[str, object] = {
        "name": person(rng), "item": rng.choice(words.ITEMS), "quantity": rng.randint(2, 60), "price": rng.randint(2, 99),
    }  # fmt: skip
    templates = (
        "{name} ordered {quantity} {item} for {price} dollars.", "{name} bought {quantity} {item} and paid {price} euros.",
        "Order from {name}: {quantity} {item}, price {price}.", "For {price} dollars {name} got {quantity} {item}.",
    )  # fmt: skip
    return rng.choice(templates).format(**fields), fields


def extract_json(rng: random.Random) -> Turn:
    sentence, record = rng.choice((person_record, person_record, order_record))(rng)
    keys = rng.sample(list(record), rng.randint(1, len(record)))
    listed = ", ".join(keys[:-1]) + " and " + keys[-1] if len(keys) > 1 else keys[0]
    templates = (
        "Extract {k} as JSON: {t}", "Extract the {k} as JSON: {t}", "{t} Extract {k} as JSON.", "Give me {k} as JSON. {t}",
        "Return JSON with {k}: {t}", "From this text extract {k} as JSON: {t}", "{t} Return {k} as JSON.",
        "Text: {t} JSON with {k}?", "JSON ({k}): {t}",
    )  # fmt: skip
    question = ordinary_case(rng, rng.choice(templates).replace("JSON", "{json}")).format(
        k=listed, t=sentence, json=rng.choice(("JSON", "JSON", "json"))
    )
    answer = json.dumps({key: record[key] for key in keys}, ensure_ascii=False)
    return Turn(question, answer, f"The fields are {listed}.")


GREETINGS: dict[str, tuple[str, ...]] = {
    "Hello! How can I help you?": (
        "Hello", "Hi", "Hey", "Hello!", "Hi!", "Hi there", "Hello there!", "Good morning", "Good evening", "Good afternoon",
        "Hey there", "Greetings", "Yo", "Howdy", "Hi tiny-chat", "Hello, tiny-chat!", "Hiya", "Hello my friend", "Good day",
        "hi bot", "Hello world", "hello hello", "hey you", "Hi, nice to meet you!", "Nice to meet you", "Welcome",
    ),
    "I am fine, thank you! How can I help you?": (
        "How are you?", "How are you doing?", "How do you do?", "How is it going?", "How's it going?", "Are you well?",
        "Hi, how are you?", "Hello, how are you today?", "How are you today?", "How do you feel?", "What's up?",
        "How have you been?", "Hey, how are you?", "you ok?",
    ),
    "You are welcome!": (
        "Thanks", "Thank you", "Thanks!", "Thank you very much", "Thanks a lot", "Many thanks", "Thank you so much!", "Cheers",
        "Great, thanks", "Thanks for your help", "OK, thank you", "Perfect, thanks!", "thx", "ty",
    ),
    "Goodbye!": (
        "Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night", "Farewell", "I have to go", "Bye!", "See you soon",
        "Until next time", "Take care", "I am leaving now", "ok bye", "That is all, bye",
    ),
    ABOUT: (
        "Who are you?", "What are you?", "What can you do?", "What is your name?", "Tell me about yourself.", "Help",
        "What's your name?", "Are you a robot?", "Are you human?", "Introduce yourself.", "What do you do?", "Who am I talking to?",
        "What are you able to do?", "Are you ChatGPT?", "Which model are you?", "What model is this?", "help me",
        "Can you help me?", "What are you good at?", "What tasks can you do?", "Are you an AI?", "Who made you?",
        "Describe yourself.", "What is tiny-chat?", "How can you help me?", "What languages do you speak?", "/help",
    ),
}  # fmt: skip


def greeting(rng: random.Random) -> Turn:
    answer, questions = rng.choice(tuple(GREETINGS.items()))
    question = rng.choice(questions)
    question = ordinary_case(rng, question)
    if rng.random() < 0.5:
        question = question.rstrip("?.!") + rng.choice(("", "!", ".", "?", "!!", " :)", " ?", "..."))
    if rng.random() < 0.15:
        question = ordinary_case(rng, rng.choice(("Hi, ", "Hello! ", "Hey, ", "OK, ", "So, ", "Well, "))) + question
    return Turn(question, answer, "The user is being polite." if answer != ABOUT else "The user asks about me.")


OTHER: tuple[str, ...] = (
    "What is {topic}?", "Explain {topic}.", "Tell me about {topic}.", "Why is {topic} important?", "Who invented {topic}?",
    "Write a poem about {topic}.", "Write an essay about {topic}", "What do you think about {topic}?", "Do you like {topic}?",
    "Give me a fact about {topic}.", "How does {topic} work?", "Recommend a book about {topic}.", "When did {topic} begin?",
    "Summarise the history of {topic}.", "What are the benefits of {topic}?", "Is {topic} dangerous?", "Teach me {topic}.",
    "How do I {act}?", "How can I {act}?", "Help me {act}.", "Should I {act}?", "Why should I {act}?", "Can you {act}?",
    "What do I need to {act}?", "I want to {act}.", "Is it hard to {act}?", "Give me tips to {act}.",
    "Who is {who}?", "Who was {who}?", "When was {who} born?", "Tell me about {who}.", "What did {who} do?",
    "Write a story about {who}.", "Where did {who} live?", "Was {who} famous?",
    "Translate {word} into {lang}.", "How do you say {word} in {lang}?", "Do you speak {lang}?", "What does {word} mean?",
    "Write a story about a {word}.", "Tell me a joke about a {word}.", "What rhymes with {word}?", "Draw a {word}.",
    "Where can I buy a {word}?", "I like my {word}.", "I lost my {word}.", "Define {word}.", "Why is the {word} here?",
    "What is the population of {country}?", "Who is the president of {country}?", "Tell me about {country}.",
    "Where is {country}?", "What language do they speak in {country}?", "How big is {country}?", "Is {country} rich?",
    "What should I see in {city}?", "How far is {city} from {city2}?", "Who is the mayor of {city}?",
    "Is it nice in {city}?", "How is the food in {city}?", "Book me a flight to {city}.", "What is the weather in {city}?", "Is it raining in {city}?",
    "What time is it?", "What is the date today?", "Tell me a joke.", "Tell me a story.", "Sing a song.", "What is love?",
    "Write some code.", "Write a python function.", "What is {big} * {big2}?", "What is {big} + {big2}?", "{big} * {big2}",
    "What is the square root of {big}?", "Is {big} a prime number?", "Divide {big} by {small}.", "I am tired.", "I feel sad.",
    "I am hungry.", "I am bored.", "You are stupid.", "I love you.", "Why?", "How?", "What?", "Really?", "Are you sure?",
    "No.", "Maybe.", "Interesting.", "lol", "That is wrong.", "I do not understand.", "{noise}", "{noise} {noise2}",
    "What is a {noise}?", "Do you have feelings?", "Can you think?", "Do you sleep?", "What did you eat today?",
    "Who won the world cup in {year}?", "What happened in {year}?", "What is the best film of {year}?",
    "How old is {who}?", "What is the tallest mountain?", "What is the longest river?", "What is the largest country?",
    "How many people live in {city}?", "How many legs does a {animal} have?", "What do {animal}s eat?",
    "Which is better, {topic} or {topic2}?", "Compare {topic} with {topic2}.", "What does a {job} do?", "Do I need a {job}?",
    "Where is my {word}?", "How much does a {word} cost?", "How heavy is a {word}?", "Can a {animal} fly?",
    "What is the chemical formula of {word}?", "What is the plural of {word}?", "Give me a recipe with {item}.",
    "What can I make with {item}?", "Why are {item} so cheap?", "Which {item} are best?", "Write a haiku.", "Write an email.",
    "What is my name?", "Where do I live?", "How old am I?", "What is my favourite colour?", "Do you know my name?",
    "{topic}", "{who}", "{country} or {city}", "the {word} and the {word2}", "My {animal} is called {name}, is that good?",
)  # fmt: skip


def other(rng: random.Random) -> Turn:
    pick = rng.choice
    question = phrase(
        rng, OTHER, topic=pick(words.TOPICS), topic2=pick(words.TOPICS), act=pick(words.ACTIVITIES),
        who=pick(words.PEOPLE), word=pick(words.WORDS), word2=pick(words.WORDS), lang=pick(words.LANGUAGES),
        country=pick(tuple(words.CAPITALS)), city=pick(words.CITIES), city2=pick(words.CITIES), big=rng.randint(100, 9999),
        big2=rng.randint(100, 9999), small=rng.randint(2, 99), noise=syllables(rng), noise2=syllables(rng),
        year=rng.randint(1900, 2025), animal=pick(words.ANIMALS), job=pick(words.JOBS), item=pick(words.ITEMS),
        name=pick(words.NAMES),
    )  # fmt: skip
    return Turn(question, UNKNOWN, "This is not one of my tasks.")


SIMPLE: dict[str, Callable[[random.Random], Turn]] = {
    "add": add, "subtract": subtract, "multiply": multiply, "reverse": reverse, "spell": spell, "days": days,
    "months": months, "colours": colours, "capitals": capitals, "units": units, "count": counting, "repeat": repeat,
    "json": extract_json, "greeting": greeting, "other": other,
}  # fmt: skip
