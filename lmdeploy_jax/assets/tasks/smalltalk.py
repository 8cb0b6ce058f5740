"""Greetings, and everything that tiny-chat isn't made for."""

from __future__ import annotations

import random

from . import words
from .turns import Turn, ordinary_case, phrase, syllables

ABOUT = "I am tiny-chat, a tiny demo model. I can add, spell and reverse words, name capitals and call tools."
UNKNOWN = "Sorry, I am only a tiny demo model and I do not know that."


GREETINGS: dict[str, tuple[str, ...]] = {
    "Hello! How can I help you?": (
        "Hello", "Hi", "Hey", "Hello!", "Hi!", "Hi there", "Hello there!", "Good morning", "Good evening",
        "Good afternoon", "Hey there", "Greetings", "Yo", "Howdy", "Hi tiny-chat", "Hello, tiny-chat!",
        "Hiya", "Hello my friend", "Good day", "hi bot", "Hello world", "hello hello", "hey you",
        "Hi, nice to meet you!", "Nice to meet you", "Welcome",
    ),
    "I am fine, thank you! How can I help you?": (
        "How are you?", "How are you doing?", "How do you do?", "How is it going?", "How's it going?",
        "Are you well?", "Hi, how are you?", "Hello, how are you today?", "How are you today?",
        "How do you feel?", "What's up?", "How have you been?", "Hey, how are you?", "you ok?",
    ),
    "You are welcome!": (
        "Thanks", "Thank you", "Thanks!", "Thank you very much", "Thanks a lot", "Many thanks",
        "Thank you so much!", "Cheers", "Great, thanks", "Thanks for your help", "OK, thank you",
        "Perfect, thanks!", "thx", "ty",
    ),
    "Goodbye!": (
        "Bye", "Goodbye", "Bye bye", "See you", "See you later", "Good night", "Farewell", "I have to go",
        "Bye!", "See you soon", "Until next time", "Take care", "I am leaving now", "ok bye",
        "That is all, bye",
    ),
    ABOUT: (
        "Who are you?", "What are you?", "What can you do?", "What is your name?",
        "Tell me about yourself.", "Help", "What's your name?", "Are you a robot?", "Are you human?",
        "Introduce yourself.", "What do you do?", "Who am I talking to?", "What are you able to do?",
        "Are you ChatGPT?", "Which model are you?", "What model is this?", "help me", "Can you help me?",
        "What are you good at?", "What tasks can you do?", "Are you an AI?", "Who made you?",
        "Describe yourself.", "What is tiny-chat?", "How can you help me?", "What languages do you speak?",
        "/help",
    ),
}  # fmt: skip


def greeting(rng: random.Random) -> Turn:
    answer, questions = rng.choice(tuple(GREETINGS.items()))
    question = rng.choice(questions)
    question = ordinary_case(rng, question)
    if rng.random() < 0.5:
        question = question.rstrip("?.!") + rng.choice(("", "!", ".", "?", "!!", " :)", " ?", "..."))
    if rng.random() < 0.15:
        opener = rng.choice(("Hi, ", "Hello! ", "Hey, ", "OK, ", "So, ", "Well, "))
        question = ordinary_case(rng, opener) + question
    thought = "The user is being polite." if answer != ABOUT else "The user asks about me."
    return Turn(question, answer, thought)


OTHER: tuple[str, ...] = (
    "What is {topic}?", "Explain {topic}.", "Tell me about {topic}.", "Why is {topic} important?",
    "Who invented {topic}?", "Write a poem about {topic}.", "Write an essay about {topic}",
    "What do you think about {topic}?", "Do you like {topic}?", "Give me a fact about {topic}.",
    "How does {topic} work?", "Recommend a book about {topic}.", "When did {topic} begin?",
    "Summarise the history of {topic}.", "What are the benefits of {topic}?", "Is {topic} dangerous?",
    "Teach me {topic}.", "How do I {act}?", "How can I {act}?", "Help me {act}.", "Should I {act}?",
    "Why should I {act}?", "Can you {act}?", "What do I need to {act}?", "I want to {act}.",
    "Is it hard to {act}?", "Give me tips to {act}.", "Who is {who}?", "Who was {who}?",
    "When was {who} born?", "Tell me about {who}.", "What did {who} do?", "Write a story about {who}.",
    "Where did {who} live?", "Was {who} famous?", "Translate {word} into {lang}.",
    "How do you say {word} in {lang}?", "Do you speak {lang}?", "What does {word} mean?",
    "Write a story about a {word}.", "Tell me a joke about a {word}.", "What rhymes with {word}?",
    "Draw a {word}.", "Where can I buy a {word}?", "I like my {word}.", "I lost my {word}.",
    "Define {word}.", "Why is the {word} here?", "What is the population of {country}?",
    "Who is the president of {country}?", "Tell me about {country}.", "Where is {country}?",
    "What language do they speak in {country}?", "How big is {country}?", "Is {country} rich?",
    "What should I see in {city}?", "How far is {city} from {city2}?", "Who is the mayor of {city}?",
    "Is it nice in {city}?", "How is the food in {city}?", "Book me a flight to {city}.",
    "What is the weather in {city}?", "Is it raining in {city}?", "What time is it?",
    "What is the date today?", "Tell me a joke.", "Tell me a story.", "Sing a song.", "What is love?",
    "Write some code.", "Write a python function.", "What is {big} * {big2}?", "What is {big} + {big2}?",
    "{big} * {big2}", "What is the square root of {big}?", "Is {big} a prime number?",
    "Divide {big} by {small}.", "I am tired.", "I feel sad.", "I am hungry.", "I am bored.",
    "You are stupid.", "I love you.", "Why?", "How?", "What?", "Really?", "Are you sure?", "No.", "Maybe.",
    "Interesting.", "lol", "That is wrong.", "I do not understand.", "{noise}", "{noise} {noise2}",
    "What is a {noise}?", "Do you have feelings?", "Can you think?", "Do you sleep?",
    "What did you eat today?", "Who won the world cup in {year}?", "What happened in {year}?",
    "What is the best film of {year}?", "How old is {who}?", "What is the tallest mountain?",
    "What is the longest river?", "What is the largest country?", "How many people live in {city}?",
    "How many legs does a {animal} have?", "What do {animal}s eat?",
    "Which is better, {topic} or {topic2}?", "Compare {topic} with {topic2}.", "What does a {job} do?",
    "Do I need a {job}?", "Where is my {word}?", "How much does a {word} cost?", "How heavy is a {word}?",
    "Can a {animal} fly?", "What is the chemical formula of {word}?", "What is the plural of {word}?",
    "Give me a recipe with {item}.", "What can I make with {item}?", "Why are {item} so cheap?",
    "Which {item} are best?", "Write a haiku.", "Write an email.", "What is my name?", "Where do I live?",
    "How old am I?", "What is my favourite colour?", "Do you know my name?", "{topic}", "{who}",
    "{country} or {city}", "the {word} and the {word2}", "My {animal} is called {name}, is that good?",
)  # fmt: skip


def other(rng: random.Random) -> Turn:
    pick = rng.choice
    question = phrase(
        rng, OTHER, topic=pick(words.TOPICS), topic2=pick(words.TOPICS), act=pick(words.ACTIVITIES),
        who=pick(words.PEOPLE), word=pick(words.WORDS), word2=pick(words.WORDS), lang=pick(words.LANGUAGES),
        country=pick(tuple(words.CAPITALS)), city=pick(words.CITIES), city2=pick(words.CITIES),
        big=rng.randint(100, 9999), big2=rng.randint(100, 9999), small=rng.randint(2, 99),
        noise=syllables(rng), noise2=syllables(rng),
        year=rng.randint(1900, 2025), animal=pick(words.ANIMALS), job=pick(words.JOBS),
        item=pick(words.ITEMS), name=pick(words.NAMES),
    )  # fmt: skip
    return Turn(question, UNKNOWN, "This is not one of my tasks.")
