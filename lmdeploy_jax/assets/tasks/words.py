"""Word lists that the task generators draw from."""

from __future__ import annotations


def spaced(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def listed(text: str) -> tuple[str, ...]:
    """The parts between commas, with single spaces inside."""
    return tuple(" ".join(part.split()) for part in text.split(","))


# Reversed and spelled letter by letter; every word appears in training.
WORDS: tuple[str, ...] = spaced(
    """
    apple arm army baby back bag ball bank bath beach bear bed bee bell bird blue boat body book box boy
    bread brick bridge brown bus butter cake camel camera candle candy car card castle cat chair cheese
    chess child city class clock cloud coat coffee coin cold cook cookie corn cow crab cream cup dance
    day deer desk dog door dragon dream dress drum duck eagle ear earth egg engine eye face farm father
    feather field finger fire fish flag floor flower fog food foot forest fork fox friend frog fruit
    game garden gate ghost giraffe girl glass goat gold grape grass green hair hammer hand happy hat
    heart hello hill home honey horse hotel house ice island jacket jam jelly juice kettle key king
    kitchen kite knee knife ladder lake lamp leaf lemon letter light lion lizard magic mango map maple
    market milk mirror money monkey moon morning mother mountain mouse mouth music nail name neck needle
    nest night north nose number ocean office onion orange owl paint panda paper parrot party pasta
    peach pear pen pencil people pepper phone piano picture pig pilot pizza planet plant plate pocket
    potato prince purple queen rabbit rain ring river road robot rocket roof room rope rose salt sand
    school sea seed sheep ship shirt shoe silver sister sky sleep smile snake snow soap sock song soup
    spider spoon spring star stone storm sugar summer sun swan table tea teacher tiger time toast tomato
    tooth tower town toy train tree truck turtle umbrella uncle violin voice wall watch water wave whale
    wheel white wind window winter wolf wood word world yellow zebra zoo
    """
)

DAYS: tuple[str, ...] = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

MONTHS: tuple[str, ...] = spaced(
    "January February March April May June July August September October November December"
)

CAPITALS: dict[str, str] = {
    "Argentina": "Buenos Aires", "Australia": "Canberra", "Austria": "Vienna", "Belgium": "Brussels",
    "Brazil": "Brasilia", "Bulgaria": "Sofia", "Canada": "Ottawa", "Chile": "Santiago", "China": "Beijing",
    "Colombia": "Bogota", "Croatia": "Zagreb", "Cuba": "Havana", "Denmark": "Copenhagen", "Egypt": "Cairo",
    "England": "London", "Estonia": "Tallinn", "Ethiopia": "Addis Ababa", "Finland": "Helsinki",
    "France": "Paris", "Germany": "Berlin", "Ghana": "Accra", "Greece": "Athens", "Hungary": "Budapest",
    "Iceland": "Reykjavik", "India": "New Delhi", "Indonesia": "Jakarta", "Iran": "Tehran", "Iraq": "Baghdad",
    "Ireland": "Dublin", "Italy": "Rome", "Jamaica": "Kingston", "Japan": "Tokyo", "Kenya": "Nairobi",
    "Latvia": "Riga", "Lithuania": "Vilnius", "Mexico": "Mexico City", "Morocco": "Rabat",
    "Nepal": "Kathmandu", "the Netherlands": "Amsterdam", "New Zealand": "Wellington", "Nigeria": "Abuja",
    "Norway": "Oslo", "Pakistan": "Islamabad", "Peru": "Lima", "Poland": "Warsaw", "Portugal": "Lisbon",
    "Romania": "Bucharest", "Russia": "Moscow", "Scotland": "Edinburgh", "Senegal": "Dakar",
    "Serbia": "Belgrade", "South Korea": "Seoul", "Spain": "Madrid", "Sweden": "Stockholm",
    "Switzerland": "Bern", "Thailand": "Bangkok", "Turkey": "Ankara", "Ukraine": "Kyiv",
    "the United Kingdom": "London", "the United States": "Washington", "Venezuela": "Caracas",
    "Vietnam": "Hanoi",
}  # fmt: skip

THING_COLOURS: dict[str, str] = {
    "a banana": "yellow", "a lemon": "yellow", "the sun": "yellow", "a tomato": "red", "a strawberry": "red",
    "blood": "red", "a fire engine": "red", "a ruby": "red", "grass": "green", "a frog": "green",
    "a cucumber": "green", "an emerald": "green", "broccoli": "green", "the sky": "blue", "the ocean": "blue",
    "a sapphire": "blue", "snow": "white", "milk": "white", "a polar bear": "white", "a swan": "white",
    "coal": "black", "a raven": "black", "the night sky": "black", "a carrot": "orange",
    "a pumpkin": "orange",
    "an orange": "orange", "chocolate": "brown", "coffee": "brown", "an elephant": "grey", "a mouse": "grey",
    "a flamingo": "pink", "a pig": "pink", "an aubergine": "purple", "lavender": "purple",
}  # fmt: skip

COLOUR_MIXES: dict[tuple[str, str], str] = {
    ("red", "yellow"): "orange", ("red", "blue"): "purple", ("blue", "yellow"): "green",
    ("red", "white"): "pink", ("black", "white"): "grey",
}  # fmt: skip

# (plural of the larger unit, its singular, the smaller unit, factor, largest count asked for)
UNITS: tuple[tuple[str, str, str, int, int], ...] = (
    ("metres", "metre", "centimetres", 100, 40),
    ("meters", "meter", "centimeters", 100, 40),
    ("kilometres", "kilometre", "metres", 1000, 40),
    ("kilometers", "kilometer", "meters", 1000, 40),
    ("centimetres", "centimetre", "millimetres", 10, 60),
    ("kilograms", "kilogram", "grams", 1000, 40),
    ("tonnes", "tonne", "kilograms", 1000, 20),
    ("litres", "litre", "millilitres", 1000, 20),
    ("hours", "hour", "minutes", 60, 12),
    ("minutes", "minute", "seconds", 60, 12),
    ("days", "day", "hours", 24, 10),
    ("weeks", "week", "days", 7, 12),
    ("years", "year", "months", 12, 12),
    ("feet", "foot", "inches", 12, 12),
    ("yards", "yard", "feet", 3, 12),
    ("centuries", "century", "years", 100, 20),
    ("euros", "euro", "cents", 100, 40),
    ("dollars", "dollar", "cents", 100, 40),
)

NAMES: tuple[str, ...] = spaced(
    """
    Adam Aisha Alex Alice Amir Amy Ana Andrew Anna Arthur Ben Carlos Carol Chen Chloe Clara Daniel David
    Diana Dora Elena Eli Emily Emma Eric Erik Eva Fatima Felix Fiona Frank Gabriel George Grace Hana
    Hannah Hugo Ian Ines Iris Isabel Ivan Jack Jacob James Jane Jin Joan John Jonas Julia Karim Kate
    Kenji Lara Laura Leo Lily Lina Liu Louis Lucas Lucy Maja Marco Maria Mark Martin Mary Max Maya Mei
    Mia Michael Mila Mohammed Nadia Nina Noah Nora Olga Oliver Omar Oscar Paul Peter Priya Rachel Rahul
    Rosa Ruth Sam Sara Sofia Sophie Stefan Susan Thomas Tim Tina Tom Victor Walter Wei Yuki Yusuf Zara
    Zoe
    """
)

CITIES: tuple[str, ...] = tuple(
    dict.fromkeys(
        [
            *sorted(CAPITALS.values()),
            *spaced(
                """
    Barcelona Boston Chicago Dallas Denver Dubai Florence Geneva Hamburg Houston Istanbul Karachi Lagos
    Lyon Manchester Marseille Melbourne Miami Milan Montreal Mumbai Munich Naples Osaka Oxford Seattle
    Shanghai Singapore Sydney Toronto Turin Vancouver Venice Zurich
    """
            ),
            "Cape Town", "Hong Kong", "Los Angeles", "New York", "San Francisco", "Tel Aviv",
        ]
    )
)  # fmt: skip

JOBS: tuple[str, ...] = spaced(
    """
    actor artist baker builder chef dancer dentist doctor driver engineer farmer fisherman gardener
    journalist judge lawyer librarian musician nurse painter pilot plumber poet professor sailor singer
    soldier student tailor teacher waiter writer
    """
)

ITEMS: tuple[str, ...] = spaced(
    """
    apples bananas books bottles bowls boxes candles carrots chairs cups eggs forks lamps lemons mugs
    oranges pears pencils pens plates potatoes shirts shoes socks spoons tables tickets tomatoes towels
    toys
    """
)

ANIMALS: tuple[str, ...] = spaced(
    "bird cat cow dog donkey fish goat hamster horse lizard mouse parrot pig pony rabbit snake turtle"
)

COLOURS: tuple[str, ...] = (
    "black", "blue", "brown", "green", "grey", "orange", "pink", "purple", "red", "white", "yellow",
)  # fmt: skip

CONDITIONS: tuple[str, ...] = spaced("cloudy cold foggy rainy snowy stormy sunny warm windy")

# What tiny-chat is not made for: the stuff of the "other" task.
TOPICS: tuple[str, ...] = listed(
    """
    quantum physics, gravity, photosynthesis, the French Revolution, black holes, democracy, inflation,
    jazz, opera, chess openings, machine learning, neural networks, evolution, dinosaurs, climate
    change, volcanoes, football, basketball, the stock market, taxes, philosophy, love, happiness, the
    meaning of life, dreams, sleep, memory, cooking, baking bread, gardening, knitting, photography,
    astronomy, the moon landing, the Roman Empire, ancient Egypt, the Second World War, Shakespeare,
    modern art, poetry, grammar, Latin, the internet, computers, Python, JavaScript, databases,
    encryption, blockchain, bitcoin, electric cars, trains, aeroplanes, rockets, robots, vaccines,
    viruses, bacteria, cancer, nutrition, vitamins, yoga, meditation, running, swimming, cycling,
    hiking, camping, fishing, cats, dogs, whales, bees, spiders, birds, trees, oceans, rivers, deserts,
    earthquakes, thunder, rainbows, money, marriage, friendship, religion, ethics, logic, algebra,
    geometry, calculus, statistics, prime numbers, the periodic table, atoms, electricity, magnets,
    light, sound, time travel, aliens, ghosts, magic, video games, films, novels, newspapers,
    television, radio, fashion, architecture, bridges, castles, pyramids, coffee, tea, wine, chocolate,
    cheese, pizza, sushi, the economy, politics, elections, law, human rights, school, jobs
    """
)

ACTIVITIES: tuple[str, ...] = listed(
    """
    bake a cake, boil an egg, fix a flat tyre, learn to swim, write a letter, plant a tree, lose weight,
    save money, buy a house, find a job, learn Spanish, play the guitar, draw a cat, build a website,
    make pancakes, cook rice, clean a window, tie a tie, change a light bulb, sleep better, stop
    smoking, train a puppy, grow tomatoes, read faster, get rich, make friends, travel to Mars, install
    Linux, sort a list, fly a kite, catch a fish, sew a button, paint a wall, ride a horse, drive a car,
    win at poker, solve a cube, take good photos, remove a stain, start a business, choose a laptop,
    repair a phone, write a novel, sing well, dance the tango, whistle, juggle
    """
)

PEOPLE: tuple[str, ...] = listed(
    """
    Albert Einstein, Isaac Newton, Marie Curie, Napoleon, Julius Caesar, Cleopatra, Mozart, Beethoven,
    Leonardo da Vinci, Picasso, Shakespeare, Gandhi, Nelson Mandela, Charles Darwin, Galileo, Aristotle,
    Plato, Socrates, Tesla, Ada Lovelace, Alan Turing, Christopher Columbus, Joan of Arc, Mickey Mouse,
    Sherlock Holmes, Harry Potter, Batman, Frida Kahlo, Bach, Elvis Presley, Bob Dylan, Messi, Pele,
    Buddha, Homer, Dante, Goethe, Tolstoy, Kafka
    """
)

LANGUAGES: tuple[str, ...] = spaced(
    "French German Spanish Italian Chinese Japanese Latin Russian Arabic Greek"
)
