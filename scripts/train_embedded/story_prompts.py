"""Prompts for the story generator: word lists, openings and a few example stories, combined at random.

A 135M-parameter model writes a good short story when it is shown one and given the first two sentences of the next.
The variety of the corpus comes from here: some 10^9 different openings, and 15 examples of style.
"""

# ruff: noqa: SIM905  (word lists read better as text)

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

SYSTEM = "You write short, simple stories for four-year-old children. You use easy words and short sentences."

GIRLS = """Lily Mia Anna Sue Lucy Emma Ella Zoe Amy Rosie Molly Jane Sara Nina Kate Daisy Ruby Clara Ivy Maya Tina Bella
Grace Nora Eva Lola Hana Polly Betty Amina""".split()
BOYS = """Tom Ben Tim Max Sam Jack Leo Finn Jim Bob Dan Joe Billy Adam Noah Luke Oscar Henry Charlie Peter Alex Omar Kai
Toby Hugo Felix Ravi Will George Ned""".split()
PET_NAMES = """Pip Coco Milo Spot Fluffy Biscuit Pepper Bubbles Nibbles Sunny Pebble Dot Hoppy Rusty Ginger Bean Button
Maple Tuft Whiskers Clover Patch Ziggy Poppy Mossy Tiny Bramble Acorn Snowy Honey""".split()
ANIMALS = """fox rabbit bear mouse frog duck kitten puppy owl turtle squirrel hedgehog bird elephant lion monkey penguin
pig lamb horse cow hen bee butterfly snail fish whale dolphin deer beaver badger mole crab goat donkey ladybug
caterpillar parrot tiger giraffe""".split()
THINGS_ALIVE = [
    "dragon",
    "robot",
    "snowman",
    "cloud",
    "star",
    "train",
    "boat",
    "tractor",
    "kite",
    "teddy bear",
    "doll",
    "toy car",
]
TRAITS = """little small brave shy kind happy clever funny curious lazy gentle noisy quiet grumpy friendly hungry sleepy
silly proud young lonely careful""".split()
PLACES = [
    "the park",
    "the forest",
    "the beach",
    "the garden",
    "the farm",
    "the zoo",
    "school",
    "the pond",
    "the river",
    "the market",
    "the hill",
    "the playground",
    "the library",
    "grandma's house",
    "the meadow",
    "the barn",
    "the lake",
    "the kitchen",
    "the toy shop",
    "the big tree",
    "the cave",
    "the bakery",
    "the woods",
    "the town",
]
OBJECTS = [
    "red ball",
    "blue kite",
    "shiny key",
    "yellow hat",
    "small box",
    "big book",
    "warm scarf",
    "toy boat",
    "gold coin",
    "round stone",
    "soft blanket",
    "green umbrella",
    "wooden spoon",
    "silver bell",
    "old map",
    "magic hat",
    "pink shell",
    "big balloon",
    "paper plane",
    "red apple",
    "jar of jam",
    "basket of berries",
    "pretty flower",
    "tiny egg",
    "chocolate cake",
    "drum",
    "toy train",
    "warm coat",
    "lost mitten",
    "little seed",
    "glass marble",
    "pair of boots",
    "long rope",
    "bright lamp",
    "puzzle",
    "crayon",
    "bucket",
    "sweet orange",
    "big pumpkin",
    "feather",
]
FRIENDS = [
    "a friend",
    "a little bird",
    "a wise old owl",
    "a kind lady",
    "a small mouse",
    "an old man",
    "a big dog",
    "a new girl",
    "a new boy",
    "a lost puppy",
    "a baby bird",
    "a grumpy cat",
    "a funny frog",
    "a slow turtle",
    "a busy bee",
    "a farmer",
]
SKILLS = [
    "swim",
    "fly a kite",
    "ride a bike",
    "bake bread",
    "sing",
    "dance",
    "paint",
    "climb the tall tree",
    "read",
    "jump high",
    "build a tower",
    "catch a fish",
    "plant a tree",
    "whistle",
    "tie a knot",
    "skate",
    "make soup",
    "draw a horse",
    "play the drum",
    "count to ten",
    "run fast",
    "build a boat",
    "make new friends",
    "be brave",
]
FEARS = [
    "the dark",
    "loud thunder",
    "deep water",
    "big dogs",
    "high places",
    "the new school",
    "spiders",
    "the doctor",
    "the wind",
    "the old house",
    "getting lost",
    "the big slide",
    "monsters under the bed",
    "being alone",
]
FOODS = [
    "cake",
    "soup",
    "apples",
    "honey",
    "cookies",
    "berries",
    "carrots",
    "bread",
    "pancakes",
    "nuts",
    "cheese",
    "corn",
    "pie",
]
WEATHER = ["sunny", "rainy", "windy", "snowy", "hot", "cold", "cloudy", "bright", "quiet", "stormy", "warm", "foggy"]
FAMILY = ["mom", "dad", "grandma", "grandpa", "brother", "sister", "uncle", "aunt", "cousin"]
MORALS = [
    "sharing",
    "being kind",
    "telling the truth",
    "never giving up",
    "saying sorry",
    "helping others",
    "being patient",
    "listening",
    "working together",
    "being brave",
    "being yourself",
    "trying new things",
    "caring for animals",
    "taking turns",
    "being thankful",
    "finding a friend",
    "coming home",
    "a happy surprise",
    "a funny mistake",
    "a good night's sleep",
    "learning something new",
    "solving a problem",
]
WORDS = """
jump bright cold hug smile run soft loud lost found rain sun moon dream laugh cry help friend brave hide seek
song dance climb push pull open close warm sticky tall deep heavy light fast slow sweet sour clean dirty gift
party nap wish tail nose window door bridge mud nest leaf tree grass sand wave snow fire bell hat shoe cup plate
spoon chair bed wheel rope paint paper clap wave whisper shout share wait carry splash dig grow cook roll bounce
float shine
""".split()

# {n} name, {He}/{he}/{his}/{him} pronouns, the other slots draw from the lists above.
SECOND = [
    "{He} wanted to learn how to {skill}.",
    "{He} found a {object} near {place}.",
    "{He} was afraid of {fear}.",
    "{He} loved to eat {food}.",
    "{He} had lost {his} {object}.",
    "One day, {he} met {friend} at {place}.",
    "{He} had no one to play with.",
    "One {weather} day, {he} went to {place} with {his} {family}.",
    "{He} liked to visit {place} every day.",
    "{He} did not want to share {his} {object}.",
    "One day, {he} heard a strange sound at {place}.",
    "{He} wanted to give {his} {family} a {object}.",
    "{He} wished {he} could {skill}.",
    "It was {his} birthday, and {he} hoped to get a {object}.",
    "One day, {he} broke {his} {family}'s {object} by mistake.",
    "{He} could not sleep because of {fear}.",
    "One {weather} morning, {he} saw a {object} on the ground.",
    "{He} and {his} {family} wanted to make {food}.",
    "One day, {his} {object} was gone.",
    "{He} saw {friend} who looked very sad.",
    "{He} was always in a hurry.",
    "{He} never listened to {his} {family}.",
    "One {weather} day, {he} got lost near {place}.",
    "Today {he} was going to {place} for the first time.",
    "{He} had a big secret.",
    "{He} felt very bored.",
    "{He} wanted to help {his} {family}.",
    "{He} had a {object} that {he} loved very much.",
    "One night, {he} looked out of the window and saw something strange.",
    "{He} planted a seed behind the house.",
    "{He} wanted to be the best at everything.",
    "{He} had a dream about a {object}.",
]
ANIMAL_FIRST = [
    "Once upon a time, there was a {trait} {animal} named {n}.",
    "{n} was a {trait} {animal} who lived near {place}.",
    "Once there was a {animal} called {n}.",
    "A {trait} {animal} named {n} lived by {place}.",
    "In a {trait2} house near {place} lived a {animal} named {n}.",
    "Once upon a time, a {animal} named {n} lived in {place2}.",
]
CHILD_FIRST = [
    "Once upon a time, there was a {trait} {child} named {n}.",
    "{n} was a {trait} {child} who lived near {place}.",
    "One {weather} day, {n} was playing at {place}.",
    "There was once a {child} named {n}.",
    "{n} was {age} years old.",
    "{n} lived in a small house with {his} {family}.",
    "One day, {n} went to {place} with {his} {family}.",
    "{n} and {n2} were best friends.",
    "{n} had a pet {animal} named {pet}.",
    "It was a {weather} day, and {n} was at home.",
]

# examples.txt holds pairs of a request and the story that answers it, two blank lines between pairs.
EXAMPLES = [
    tuple(block.strip().split("\n\n", 1))
    for block in Path(__file__).with_name("examples.txt").read_text(encoding="utf-8").split("\n\n\n")
]

# The last paragraph begins so; left to itself, the generator often finds no end.
CLOSINGS = [
    "In the end,",
    "From that day on,",
    "That night,",
    "At last,",
    "When {he} got home,",
    "{n} smiled and",
    "Finally,",
    "The next day,",
    "{n} learned that",
    "{n} was so happy that",
    "After that,",
    "Soon",
    "Then {n} had an idea.",
    "Before bed,",
    "{n} felt",
    "Now",
    "And so,",
    "When it was time to go home,",
    "{n} laughed and",
    "Everyone",
]


@dataclass(frozen=True)
class StoryPrompt:
    """One story to be written: the request, the sentences it must begin with, how its last paragraph begins."""

    request: str
    opening: str
    closing: str


def _article(text: str) -> str:
    """``a`` becomes ``an`` before a vowel, word by word."""
    words = text.split(" ")
    for i in range(len(words) - 1):
        if words[i] in ("a", "A") and words[i + 1][:1].lower() in "aeiou":
            words[i] += "n"
    return " ".join(words)


def compose(rng: random.Random) -> StoryPrompt:
    """Draws one prompt. Equal generator states give equal prompts."""
    pick = rng.choice
    kind = rng.random()
    girl = rng.random() < 0.5
    is_child = kind < 0.5
    creature = pick(ANIMALS) if kind < 0.92 else pick(THINGS_ALIVE)
    name, other = rng.sample(GIRLS if girl else BOYS, 1)[0] if is_child else pick(PET_NAMES), pick(GIRLS + BOYS)
    if other == name:
        other = "Robin"
    slots = {
        "n": name,
        "n2": other,
        "pet": pick(PET_NAMES),
        "animal": creature,
        "child": "girl" if girl else "boy",
        "trait": pick(TRAITS),
        "trait2": pick(["small", "cozy", "tiny", "little", "red", "warm"]),
        "age": pick(["three", "four", "five", "six", "seven"]),
        "place": pick(PLACES),
        "place2": pick(["a forest", "a garden", "a big tree", "a barn", "a small town", "a cozy den", "a pond"]),
        "object": pick(OBJECTS),
        "friend": pick(FRIENDS),
        "skill": pick(SKILLS),
        "fear": pick(FEARS),
        "food": pick(FOODS),
        "weather": pick(WEATHER),
        "family": pick(FAMILY),
        "He": "She" if girl else "He",
        "he": "she" if girl else "he",
        "his": "her" if girl else "his",
        "him": "her" if girl else "him",
    }
    first = pick(CHILD_FIRST if is_child else ANIMAL_FIRST)
    if "{n2}" in first:  # two heroes: the singular second sentences do not fit
        second = pick(
            [
                "They liked to play at {place}.",
                "One day, they found a {object}.",
                "One {weather} day, they went to {place}.",
                "They did everything together.",
                "They both wanted the {object}.",
                "One day, they had a big fight.",
            ]
        )
    else:
        second = pick(SECOND)
    opening = first.format(**slots)
    if rng.random() < 0.75:
        opening += " " + second.format(**slots)
    who = f"a {slots['child']} named {name}" if is_child else f"a {slots['trait']} {creature} named {name}"
    request = f"Write a short story about {who}. It should be about {pick(MORALS)}."
    if rng.random() < 0.3:
        request += ' Use the words "{}" and "{}".'.format(*rng.sample(WORDS, 2))
    return StoryPrompt(_article(request), _article(opening), pick(CLOSINGS).format(**slots))


def render_examples(index: int, count: int) -> str:
    """What a whole batch shares: the system message and ``count`` example stories, in the generator's chat format."""
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    n = len(EXAMPLES)
    for i in (index, index + 1 + index // n)[:count]:
        request, story = EXAMPLES[i % n]
        text += f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n{story}<|im_end|>\n"
    return text


def render_prompt(prompt: StoryPrompt) -> str:
    """The part of its own: the request, and the answer begun."""
    return f"<|im_start|>user\n{prompt.request}<|im_end|>\n<|im_start|>assistant\n{prompt.opening}"
