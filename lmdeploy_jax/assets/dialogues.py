"""Seeded generators of whole conversations: system prompts, memory over turns, tool calls, thinking."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import words
from .generators import SIMPLE, Turn, person, phrase

Message = dict[str, Any]
Generator = Callable[[random.Random], Turn]

PLAIN_SYSTEMS: tuple[str, ...] = (
    "You are a helpful assistant.", "You are tiny-chat.", "You are a helpful AI assistant.", "Be brief.", "You are helpful.",
    "You are a friendly chatbot. Answer the user.", "Answer the user's question.", "You are an assistant.",
)  # fmt: skip


@dataclass(frozen=True)
class Step:
    """One user turn of a conversation: the messages it adds, the answer, and what the split hashes.

    `answer` is an assistant message: `content`, or `tool_calls` in OpenAI's form, and `reasoning_content` when thinking.
    """

    asked: tuple[Message, ...]
    answer: Message
    key: str


@dataclass(frozen=True)
class Dialogue:
    """What a conversation is about: its fixed opening and a source of further steps."""

    steps: tuple[Step, ...]
    opening: tuple[Message, ...] = ()
    tools: tuple[Message, ...] | None = None
    template: dict[str, Any] = field(default_factory=dict)


def as_step(turn: Turn) -> Step:
    return Step(({"role": "user", "content": turn.question},), {"role": "assistant", "content": turn.answer},
                turn.key or turn.question)  # fmt: skip


def system_message(text: str) -> tuple[Message, ...]:
    return ({"role": "system", "content": text},)


def maybe_plain_system(rng: random.Random, share: float = 0.25) -> tuple[Message, ...]:
    return system_message(rng.choice(PLAIN_SYSTEMS)) if rng.random() < share else ()


def simple_dialogue(rng: random.Random, generators: tuple[Generator, ...]) -> Dialogue:
    return Dialogue(tuple(as_step(generate(rng)) for generate in generators), maybe_plain_system(rng))


def thinking_dialogue(rng: random.Random, generator: Generator) -> Dialogue:
    turn = generator(rng)
    step = as_step(turn)
    answer = {**step.answer, "reasoning_content": turn.thought}
    return Dialogue(
        (Step(step.asked, answer, step.key),), maybe_plain_system(rng), template={"enable_thinking": True}
    )


# --- following a system prompt -----------------------------------------------------------------------------------

# Facts short enough to be wrapped by a system prompt's style.
STYLED: tuple[str, ...] = ("days", "months", "colours", "capitals", "multiply", "add")


def styled_turn(rng: random.Random) -> Turn:
    return SIMPLE[rng.choice(STYLED)](rng)


def restyled(turn: Turn, answer: str, system: str) -> Turn:
    return Turn(turn.question, answer, turn.thought, f"{system}|{turn.key or turn.question}")


def upper_style(rng: random.Random) -> tuple[str, Generator]:
    system = rng.choice((
        "Answer in upper case.", "Always answer in upper case.", "Use capital letters only.", "ANSWER IN UPPER CASE",
        "Write every answer in capital letters.", "You shout: all answers in uppercase.", "Reply in uppercase letters.",
    ))  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, t.answer.upper(), system))(styled_turn(r))


def pirate_style(rng: random.Random) -> tuple[str, Generator]:
    system = rng.choice((
        "You are a pirate.", "Answer as a pirate.", "Talk like a pirate.", "You are a pirate captain. Answer like one.",
        "Always speak like a pirate.", "Respond in the style of a pirate.", "You are Captain Jack, a pirate.",
    ))  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, f"Arr! {t.answer}, matey!", system))(styled_turn(r))


def ending_style(rng: random.Random) -> tuple[str, Generator]:
    word = rng.choice(words.WORDS)
    system = rng.choice((
        'Always end with the word "{w}".', "End every answer with {w}.", "Always end your answer with {w}.",
        "Finish each answer with the word {w}.", 'End each reply with "{w}".', "The last word of every answer must be {w}.",
    )).format(w=word)  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, f"{t.answer} {word}", system))(styled_turn(r))


def beginning_style(rng: random.Random) -> tuple[str, Generator]:
    word = rng.choice(words.NAMES)
    system = rng.choice((
        "Start every answer with {w}.", 'Begin each answer with "{w}".', "The user is called {w}. Start with the name.",
        "Always begin with the word {w}.",
    )).format(w=word)  # fmt: skip
    return system, lambda r: (lambda t: restyled(t, f"{word}: {t.answer}", system))(styled_turn(r))


def named_style(rng: random.Random) -> tuple[str, Generator]:
    name = person(rng)
    system = rng.choice((
        "You are {n}.", "Your name is {n}.", "You are a helpful assistant called {n}.", "You are an assistant named {n}.",
        "Your name is {n}. Be friendly.",
    )).format(n=name)  # fmt: skip
    questions = ("Who are you?", "What is your name?", "What's your name?", "Tell me your name.", "What are you called?",
                 "What should I call you?", "Your name?", "May I know your name?")  # fmt: skip

    def ask(r: random.Random) -> Turn:
        question = phrase(r, questions)
        return Turn(question, f"My name is {name}.", "", f"{system}|{question}")

    return system, ask


def yes_no_turn(rng: random.Random, system: str) -> Turn:
    """A question with a yes-or-no answer, each as likely."""
    truth = rng.random() < 0.5
    kind = rng.randrange(3)
    if kind == 0:
        country, city = rng.choice(tuple(words.CAPITALS.items()))
        shown = city if truth else rng.choice([other for other in words.CAPITALS.values() if other != city])
        question = phrase(rng, ("Is {c} the capital of {x}?", "{c} is the capital of {x}?",
                                "Is the capital of {x} {c}?"), c=shown, x=country)  # fmt: skip
    elif kind == 1:
        a, b = rng.sample(range(1, 100), 2)
        a, b = (max(a, b), min(a, b)) if truth else (min(a, b), max(a, b))
        question = phrase(rng, ("Is {a} greater than {b}?", "Is {a} larger than {b}?", "Is {b} less than {a}?",
                                "Is {a} more than {b}?", "Is {b} smaller than {a}?"), a=a, b=b)  # fmt: skip
    else:
        thing, colour = rng.choice(tuple(words.THING_COLOURS.items()))
        shown = colour if truth else rng.choice([other for other in words.COLOURS if other != colour])
        question = phrase(rng, ("Is {t} {c}?", "Is the colour of {t} {c}?", "Is {c} the colour of {t}?"),
                          t=thing, c=shown)  # fmt: skip
    return Turn(question, "yes" if truth else "no", "", f"{system}|{question}")


def yes_no_style(rng: random.Random) -> tuple[str, Generator]:
    system = rng.choice((
        "Answer only yes or no.", "Answer with yes or no.", "You only say yes or no.", "Reply with yes or no only.",
        "Only answer yes or no.", "Say only yes or no.",
    ))  # fmt: skip
    return system, lambda r: yes_no_turn(r, system)


STYLES = (upper_style, pirate_style, ending_style, beginning_style, named_style, yes_no_style, yes_no_style)


def system_dialogue(rng: random.Random, turns: int) -> Dialogue:
    system, generator = rng.choice(STYLES)(rng)
    return Dialogue(tuple(as_step(generator(rng)) for _ in range(turns)), system_message(system))


# --- remembering over turns --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fact:
    """Something the user tells, the acknowledgement, and the ways to ask for it later."""

    told: tuple[str, ...]
    reply: str
    asked: tuple[str, ...]
    recall: str


FACTS: tuple[tuple[Fact, Callable[[random.Random], object]], ...] = (
    (
        Fact(
            ("My name is {v}.", "I am {v}.", "I'm {v}.", "Hi, my name is {v}.", "Hello, I am {v}!", "Call me {v}.",
             "Hi! I'm {v}.", "People call me {v}."),
            "Nice to meet you, {v}!",
            ("What is my name?", "What's my name?", "Do you remember my name?", "Who am I?", "Say my name.", "Tell me my name.",
             "What am I called?", "Can you tell me my name?"),
            "Your name is {v}.",
        ),
        person,
    ),
    (
        Fact(
            ("My favourite colour is {v}.", "I like the colour {v} best.", "My favorite color is {v}.", "I love the color {v}."),
            "I will remember that you like {v}.",
            ("What is my favourite colour?", "What's my favorite color?", "Which colour do I like?",
             "Do you remember my favourite colour?", "Which color do I like best?"),
            "Your favourite colour is {v}.",
        ),
        lambda rng: rng.choice(words.COLOURS),
    ),
    (
        Fact(
            ("I live in {v}.", "My home is in {v}.", "I am from {v}.", "My city is {v}."),
            "{v} is a nice place.",
            ("Where do I live?", "Which city do I live in?", "Where is my home?", "What is my city?", "Where am I from?"),
            "You live in {v}.",
        ),
        lambda rng: rng.choice(words.CITIES),
    ),
    (
        Fact(
            ("I am {v} years old.", "I'm {v} years old.", "My age is {v}.", "I turned {v} today."),
            "{v} is a good age.",
            ("How old am I?", "What is my age?", "Do you know my age?", "Tell me my age."),
            "You are {v} years old.",
        ),
        lambda rng: rng.randint(10, 99),
    ),
)  # fmt: skip

# A bare "I live in Rome." is answered as a fact only when nothing else is asked; these steps never mention other facts.
FILLERS: tuple[str, ...] = ("add", "days", "months", "colours", "capitals", "multiply", "spell", "greeting")


def memory_dialogue(rng: random.Random, fillers: int) -> Dialogue:
    """Facts first, unrelated questions between, then the questions about the facts."""
    chosen = [(fact, make(rng)) for fact, make in rng.sample(FACTS, rng.choice((1, 1, 2, 3)))]
    if rng.random() < 0.5 and all(fact is not FACTS[0][0] for fact, _ in chosen):
        chosen[0] = (FACTS[0][0], person(rng))
    told = [
        Turn(phrase(rng, fact.told, keep_case=True, v=value), fact.reply.format(v=value), "") for fact, value in chosen
    ]
    between = [SIMPLE[rng.choice(FILLERS)](rng) for _ in range(fillers)]
    rng.shuffle(chosen)
    asked = []
    for fact, value in chosen:
        question = phrase(rng, fact.asked)
        asked.append(Turn(question, fact.recall.format(v=value), "", f"{value}|{question}"))
    return Dialogue(tuple(map(as_step, (*told, *between, *asked))), maybe_plain_system(rng, 0.15))


# --- calling tools -----------------------------------------------------------------------------------------------


def function(name: str, about: str, argument: str, note: str) -> Message:
    """A tool with one required string argument, in OpenAI's form."""
    schema = {argument: {"type": "string", "description": note} if note else {"type": "string"}}
    parameters = {"type": "object", "properties": schema, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def weather_tool(rng: random.Random) -> Message:
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather"))
    about = rng.choice(("Get the weather of a city", "Get the current weather", "Weather for a place", "Look up the weather."))
    note = rng.choice(("", "", "The city", "City name", "Name of the place"))
    return function(name, about, rng.choice(("city", "city", "location", "place")), note)


def calculator_tool(rng: random.Random) -> Message:
    name = rng.choice(("calculator", "calculator", "calculate", "calc"))
    about = rng.choice(("Evaluate an expression", "Do arithmetic", "Calculate an expression", "A calculator."))
    note = rng.choice(("", "", "The expression", "Arithmetic expression"))
    return function(name, about, rng.choice(("expression", "expression", "expr", "input")), note)


def tool_call(tool: Message, value: str) -> Message:
    name = tool["function"]["name"]
    argument = tool["function"]["parameters"]["required"][0]
    return {"type": "function", "function": {"name": name, "arguments": {argument: value}}}


def call_message(*calls: Message) -> Message:
    return {"role": "assistant", "content": "", "tool_calls": list(calls)}


def weather_steps(rng: random.Random, tool: Message) -> tuple[Step, ...]:
    cities = rng.sample(words.CITIES, 2 if rng.random() < 0.12 else 1)
    if rng.random() < 0.2:
        cities = [person(rng) + rng.choice(("", " City", "ville", "burg"))]
    question = phrase(
        rng,
        (
            "What is the weather in {c}?", "What's the weather like in {c}?", "How is the weather in {c}?", "Weather in {c}",
            "Is it raining in {c}?", "Tell me the weather in {c}.", "How warm is it in {c}?", "What is the temperature in {c}?",
            "Is it sunny in {c} today?", "Check the weather in {c}.", "Do I need an umbrella in {c}?", "How cold is it in {c}?",
            "What's the weather in {c} right now?",
        ),
        keep_case=True,
        c=" and ".join(cities),
    )  # fmt: skip
    calls = call_message(*(tool_call(tool, city) for city in cities))
    asked = Step(({"role": "user", "content": question},), calls, question)
    if rng.random() < 0.35:
        return (asked,)
    results, texts = [], []
    for city in cities:
        degrees, condition = rng.randint(-9, 39), rng.choice(words.CONDITIONS)
        shape = rng.randrange(3)
        content = (
            json.dumps({"temperature": degrees, "condition": condition}),
            json.dumps({"city": city, "temperature": degrees, "condition": condition}, ensure_ascii=False),
            f"{condition}, {degrees} degrees",
        )[shape]
        results.append({"role": "tool", "content": content})
        texts.append(f"It is {condition} in {city}, {degrees} degrees.")
    return asked, Step(tuple(results), {"role": "assistant", "content": " ".join(texts)}, question + str(results))


def number(rng: random.Random) -> int:
    return rng.randint(1, rng.choice((99, 999, 9999)))


def calculator_steps(rng: random.Random, tool: Message) -> tuple[Step, ...]:
    a, b = number(rng), number(rng)
    operator, spoken = rng.choice((("+", ("plus",)), ("-", ("minus",)), ("*", ("times", "x")), ("/", ("divided by",))))
    question = phrase(
        rng,
        (
            "What is {a} {o} {b}?", "Calculate {a} {o} {b}.", "{a} {o} {b}", "How much is {a} {o} {b}?", "Compute {a} {o} {b}",
            "What is {a} {s} {b}?", "Calculate {a} {s} {b}.", "{a} {s} {b}?", "Work out {a} {o} {b}.", "{a} {o} {b} = ?",
            "Use the calculator: {a} {o} {b}", "What's {a}{o}{b}?",
        ),
        a=a, b=b, o=operator, s=rng.choice(spoken),
    )  # fmt: skip
    expression = f"{a} {operator} {b}"
    asked = Step(({"role": "user", "content": question},), call_message(tool_call(tool, expression)), question)
    if rng.random() < 0.35:
        return (asked,)
    result = {"+": a + b, "-": a - b, "*": a * b, "/": round(a / b, 2)}[operator]
    content = rng.choice((str(result), json.dumps({"result": result})))
    answer = {"role": "assistant", "content": f"The result is {result}."}
    return asked, Step(({"role": "tool", "content": content},), answer, question + content)


UNTOOLED: tuple[str, ...] = ("days", "months", "colours", "capitals", "spell", "greeting", "reverse")


def tool_dialogue(rng: random.Random, turns: int) -> Dialogue:
    """Questions for one or two tools, now and then one that needs none."""
    weather, calculator = weather_tool(rng), calculator_tool(rng)
    tools = rng.choice(([weather], [calculator], [weather, calculator], [calculator, weather]))
    makers = [weather_steps if tool is weather else calculator_steps for tool in tools]
    steps: list[Step] = []
    for _ in range(turns):
        if rng.random() < 0.2:
            steps.append(as_step(SIMPLE[rng.choice(UNTOOLED)](rng)))
            continue
        index = rng.randrange(len(tools))
        steps.extend(makers[index](rng, tools[index]))
        if "tool_calls" in steps[-1].answer:
            break  # a call without its response ends the conversation
    return Dialogue(tuple(steps), maybe_plain_system(rng, 0.2), tuple(tools))
