"""What is worked out: sums, letters, units, counting, copying, fields as JSON."""

from __future__ import annotations

import json
import random

from . import words
from .turns import Turn, ordinary_case, person, phrase, syllables


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
            "What's {a}+{b}?", "Compute {a} plus {b}.", "What is the sum of {a} and {b}?",
            "Can you add {a} and {b}?", "I have {a} apples and get {b} more. How many do I have?",
            "Sum of {a} and {b}?",
        ),
        a=a, b=b,
    )  # fmt: skip
    return Turn(question, str(a + b), add_thought(a, b), f"{a}+{b}")


def subtract(rng: random.Random) -> Turn:
    a, b = sorted((rng.randint(1, 99), rng.randint(1, 99)), reverse=True)
    question = phrase(
        rng,
        (
            "What is {a} - {b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "{a}-{b}=",
            "Subtract {b} from {a}.", "What is {a} minus {b}?", "Calculate {a} - {b}.",
            "How much is {a} - {b}?", "{a} minus {b}", "What's {a}-{b}?", "Compute {a} minus {b}.",
            "Take {b} away from {a}.", "I had {a} apples and ate {b}. How many are left?",
            "What is the difference between {a} and {b}?",
        ),
        a=a, b=b,
    )  # fmt: skip
    return Turn(question, str(a - b), subtract_thought(a, b), f"{a}-{b}")


def multiply(rng: random.Random) -> Turn:
    a, b = rng.randint(1, 10), rng.randint(1, 10)
    question = phrase(
        rng,
        (
            "What is {a} * {b}?", "{a} * {b}", "{a}*{b}", "{a} x {b}", "{a} times {b}",
            "What is {a} times {b}?", "Multiply {a} by {b}.", "Calculate {a} x {b}.",
            "How much is {a} * {b}?", "{a} * {b} = ?", "What's {a}x{b}?",
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
            "Reverse the word {w}.", "Reverse {w}", "Spell {w} backwards.", "What is {w} backwards?",
            "Write {w} backwards.", "{w} backwards", "Reverse this word: {w}", "Can you reverse {w}?",
            "What is {w} spelled backwards?", "Reverse the letters of {w}.", "Say {w} in reverse.",
            "Turn {w} around.", "How do you write {w} in reverse?", "Give me the word {w} reversed.",
        ),
        w=quoted(rng, word),
    )  # fmt: skip
    return Turn(question, "-".join(reversed(word)), f"The letters are {'-'.join(word)}.")


def spell(rng: random.Random) -> Turn:
    word = rng.choice(words.WORDS)
    question = phrase(
        rng,
        (
            "Spell the word {w}.", "Spell {w}", "How do you spell {w}?", "Can you spell {w}?",
            "What are the letters of {w}?", "Spell out {w}.", "Spell {w} for me.",
            "Write {w} letter by letter.", "How is {w} spelled?", "spelling of {w}",
            "What letters are in {w}?", "Please spell: {w}", "Break {w} into letters.",
        ),
        w=quoted(rng, word),
    )  # fmt: skip
    return Turn(question, "-".join(word), f"I spell the word {word}.")


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
    templates: tuple[str, ...]
    templates = ("Count from {a} to {b}.", "count {a} to {b}", "List the numbers from {a} to {b}.",
                 "Can you count from {a} to {b}?", "Write the numbers {a} to {b}.",
                 "Numbers from {a} to {b}")  # fmt: skip
    if first == 1:
        templates += ("Count to {b}.", "Count up to {b}", "Please count to {b}.")
    answer = ", ".join(str(number) for number in range(first, last + 1))
    return Turn(phrase(rng, templates, a=first, b=last), answer, f"I start at {first} and stop at {last}.")


def repeat(rng: random.Random) -> Turn:
    pool = (*words.WORDS, *words.NAMES, *words.COLOURS)
    parts = [syllables(rng) if rng.random() < 0.3 else rng.choice(pool) for _ in range(rng.randint(1, 5))]
    text = " ".join(parts)
    templates = ("Repeat after me: {t}", "Say: {t}", "Repeat: {t}", 'Say "{t}"', 'Repeat "{t}"', "Echo: {t}",
                 "Copy this text: {t}", 'Repeat this: "{t}"', "Please say: {t}")  # fmt: skip
    question = rng.choice(templates)
    return Turn(ordinary_case(rng, question).format(t=text), text, "I repeat the text.")


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
        "name": person(rng), "item": rng.choice(words.ITEMS), "quantity": rng.randint(2, 60),
        "price": rng.randint(2, 99),
    }  # fmt: skip
    templates = (
        "{name} ordered {quantity} {item} for {price} dollars.",
        "{name} bought {quantity} {item} and paid {price} euros.",
        "Order from {name}: {quantity} {item}, price {price}.",
        "For {price} dollars {name} got {quantity} {item}.",
    )  # fmt: skip
    return rng.choice(templates).format(**fields), fields


def extract_json(rng: random.Random) -> Turn:
    sentence, record = rng.choice((person_record, person_record, order_record))(rng)
    keys = rng.sample(list(record), rng.randint(1, len(record)))
    listed = ", ".join(keys[:-1]) + " and " + keys[-1] if len(keys) > 1 else keys[0]
    templates = (
        "Extract {k} as JSON: {t}", "Extract the {k} as JSON: {t}", "{t} Extract {k} as JSON.",
        "Give me {k} as JSON. {t}", "Return JSON with {k}: {t}", "From this text extract {k} as JSON: {t}",
        "{t} Return {k} as JSON.", "Text: {t} JSON with {k}?", "JSON ({k}): {t}",
    )  # fmt: skip
    question = ordinary_case(rng, rng.choice(templates).replace("JSON", "{json}")).format(
        k=listed, t=sentence, json=rng.choice(("JSON", "JSON", "json"))
    )
    answer = json.dumps({key: record[key] for key in keys}, ensure_ascii=False)
    return Turn(question, answer, f"The fields are {listed}.")
