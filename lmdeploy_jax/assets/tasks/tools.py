"""Conversations with tools: a calculator and the weather, under varied names and schemas."""

from __future__ import annotations

import json
import random

from . import words
from .dialogues import Dialogue, Message, Step, as_step, maybe_plain_system
from .simple import SIMPLE
from .turns import person, phrase


def function(name: str, about: str, argument: str, note: str) -> Message:
    """A tool with one required string argument, in OpenAI's form."""
    schema = {argument: {"type": "string", "description": note} if note else {"type": "string"}}
    parameters = {"type": "object", "properties": schema, "required": [argument]}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


def weather_tool(rng: random.Random) -> Message:
    name = rng.choice(("get_weather", "get_weather", "get_current_weather", "weather"))
    about = rng.choice(
        (
            "Get the weather of a city",
            "Get the current weather",
            "Weather for a place",
            "Look up the weather.",
        )
    )
    note = rng.choice(("", "", "The city", "City name", "Name of the place"))
    return function(name, about, rng.choice(("city", "city", "location", "place")), note)


def calculator_tool(rng: random.Random) -> Message:
    name = rng.choice(("calculator", "calculator", "calculate", "calc"))
    about = rng.choice(
        ("Evaluate an expression", "Do arithmetic", "Calculate an expression", "A calculator.")
    )
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
            "What is the weather in {c}?", "What's the weather like in {c}?", "How is the weather in {c}?",
            "Weather in {c}", "Is it raining in {c}?", "Tell me the weather in {c}.",
            "How warm is it in {c}?", "What is the temperature in {c}?", "Is it sunny in {c} today?",
            "Check the weather in {c}.", "Do I need an umbrella in {c}?", "How cold is it in {c}?",
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
    return asked, Step(
        tuple(results), {"role": "assistant", "content": " ".join(texts)}, question + str(results)
    )


def number(rng: random.Random) -> int:
    return rng.randint(1, rng.choice((99, 999, 9999)))


def calculator_steps(rng: random.Random, tool: Message) -> tuple[Step, ...]:
    a, b = number(rng), number(rng)
    operator, spoken = rng.choice(
        (("+", ("plus",)), ("-", ("minus",)), ("*", ("times", "x")), ("/", ("divided by",)))
    )
    question = phrase(
        rng,
        (
            "What is {a} {o} {b}?", "Calculate {a} {o} {b}.", "{a} {o} {b}", "How much is {a} {o} {b}?",
            "Compute {a} {o} {b}", "What is {a} {s} {b}?", "Calculate {a} {s} {b}.", "{a} {s} {b}?",
            "Work out {a} {o} {b}.", "{a} {o} {b} = ?", "Use the calculator: {a} {o} {b}",
            "What's {a}{o}{b}?",
        ),
        a=a, b=b, o=operator, s=rng.choice(spoken),
    )  # fmt: skip
    expression = f"{a} {operator} {b}"
    asked = Step(
        ({"role": "user", "content": question},), call_message(tool_call(tool, expression)), question
    )
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
