"""Prompts for the story generator: word lists, openings and a few example stories, combined at random.

A 135M-parameter model writes a good short story when it is shown one and given the first two sentences of the next.
The variety of the corpus comes from here: some 10^9 different openings, and 15 examples of style.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

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
THINGS_ALIVE = ["dragon", "robot", "snowman", "cloud", "star", "train", "boat", "tractor", "kite", "teddy bear", "doll", "toy car"]
TRAITS = """little small brave shy kind happy clever funny curious lazy gentle noisy quiet grumpy friendly hungry sleepy
silly proud young lonely careful""".split()
PLACES = ["the park", "the forest", "the beach", "the garden", "the farm", "the zoo", "school", "the pond", "the river",
          "the market", "the hill", "the playground", "the library", "grandma's house", "the meadow", "the barn",
          "the lake", "the kitchen", "the toy shop", "the big tree", "the cave", "the bakery", "the woods", "the town"]
OBJECTS = ["red ball", "blue kite", "shiny key", "yellow hat", "small box", "big book", "warm scarf", "toy boat", "gold coin",
           "round stone", "soft blanket", "green umbrella", "wooden spoon", "silver bell", "old map", "magic hat", "pink shell",
           "big balloon", "paper plane", "red apple", "jar of jam", "basket of berries", "pretty flower", "tiny egg",
           "chocolate cake", "drum", "toy train", "warm coat", "lost mitten", "little seed", "glass marble", "pair of boots",
           "long rope", "bright lamp", "puzzle", "crayon", "bucket", "sweet orange", "big pumpkin", "feather"]
FRIENDS = ["a friend", "a little bird", "a wise old owl", "a kind lady", "a small mouse", "an old man", "a big dog", "a new girl",
           "a new boy", "a lost puppy", "a baby bird", "a grumpy cat", "a funny frog", "a slow turtle", "a busy bee", "a farmer"]
SKILLS = ["swim", "fly a kite", "ride a bike", "bake bread", "sing", "dance", "paint", "climb the tall tree", "read", "jump high",
          "build a tower", "catch a fish", "plant a tree", "whistle", "tie a knot", "skate", "make soup", "draw a horse",
          "play the drum", "count to ten", "run fast", "build a boat", "make new friends", "be brave"]
FEARS = ["the dark", "loud thunder", "deep water", "big dogs", "high places", "the new school", "spiders", "the doctor",
         "the wind", "the old house", "getting lost", "the big slide", "monsters under the bed", "being alone"]
FOODS = ["cake", "soup", "apples", "honey", "cookies", "berries", "carrots", "bread", "pancakes", "nuts", "cheese", "corn", "pie"]
WEATHER = ["sunny", "rainy", "windy", "snowy", "hot", "cold", "cloudy", "bright", "quiet", "stormy", "warm", "foggy"]
FAMILY = ["mom", "dad", "grandma", "grandpa", "brother", "sister", "uncle", "aunt", "cousin"]
MORALS = ["sharing", "being kind", "telling the truth", "never giving up", "saying sorry", "helping others", "being patient",
          "listening", "working together", "being brave", "being yourself", "trying new things", "caring for animals",
          "taking turns", "being thankful", "finding a friend", "coming home", "a happy surprise", "a funny mistake",
          "a good night's sleep", "learning something new", "solving a problem"]
WORDS = """jump bright cold hug smile run soft loud lost found rain sun moon dream laugh cry help friend brave hide seek song
dance climb push pull open close warm sticky tall deep heavy light fast slow sweet sour clean dirty gift party nap wish tail nose
window door bridge mud nest leaf tree grass sand wave snow fire bell hat shoe cup plate spoon chair bed wheel rope paint paper
clap wave whisper shout share wait carry splash dig grow cook roll bounce float shine""".split()

# {n} name, {He}/{he}/{his}/{him} pronouns, the other slots draw from the lists above.
SECOND = [
    "{He} wanted to learn how to {skill}.", "{He} found a {object} near {place}.", "{He} was afraid of {fear}.",
    "{He} loved to eat {food}.", "{He} had lost {his} {object}.", "One day, {he} met {friend} at {place}.",
    "{He} had no one to play with.", "One {weather} day, {he} went to {place} with {his} {family}.",
    "{He} liked to visit {place} every day.", "{He} did not want to share {his} {object}.",
    "One day, {he} heard a strange sound at {place}.", "{He} wanted to give {his} {family} a {object}.",
    "{He} wished {he} could {skill}.", "It was {his} birthday, and {he} hoped to get a {object}.",
    "One day, {he} broke {his} {family}'s {object} by mistake.", "{He} could not sleep because of {fear}.",
    "One {weather} morning, {he} saw a {object} on the ground.", "{He} and {his} {family} wanted to make {food}.",
    "One day, {his} {object} was gone.", "{He} saw {friend} who looked very sad.", "{He} was always in a hurry.",
    "{He} never listened to {his} {family}.", "One {weather} day, {he} got lost near {place}.",
    "Today {he} was going to {place} for the first time.", "{He} had a big secret.", "{He} felt very bored.",
    "{He} wanted to help {his} {family}.", "{He} had a {object} that {he} loved very much.",
    "One night, {he} looked out of the window and saw something strange.", "{He} planted a seed behind the house.",
    "{He} wanted to be the best at everything.", "{He} had a dream about a {object}.",
]
ANIMAL_FIRST = [
    "Once upon a time, there was a {trait} {animal} named {n}.", "{n} was a {trait} {animal} who lived near {place}.",
    "Once there was a {animal} called {n}.", "A {trait} {animal} named {n} lived by {place}.",
    "In a {trait2} house near {place} lived a {animal} named {n}.", "Once upon a time, a {animal} named {n} lived in {place2}.",
]
CHILD_FIRST = [
    "Once upon a time, there was a {trait} {child} named {n}.", "{n} was a {trait} {child} who lived near {place}.",
    "One {weather} day, {n} was playing at {place}.", "There was once a {child} named {n}.", "{n} was {age} years old.",
    "{n} lived in a small house with {his} {family}.", "One day, {n} went to {place} with {his} {family}.",
    "{n} and {n2} were best friends.", "{n} had a pet {animal} named {pet}.", "It was a {weather} day, and {n} was at home.",
]

EXAMPLES = [
    ("Write a short story about a duck who is afraid of deep water. It should be about being brave.",
     "Once upon a time, there was a little duck named Dot. Dot was afraid of deep water. All the other ducks swam in the middle "
     "of the pond, but Dot stayed near the grass.\n\nOne day, Dot heard a cry. A baby frog was stuck on a leaf in the middle of "
     "the pond. \"Help me!\" said the frog. Dot looked at the deep water. Her legs shook. Then she took a big breath and swam. "
     "She swam and swam until she reached the leaf.\n\n\"Climb on my back,\" said Dot. The frog climbed on, and Dot took him "
     "home. \"Thank you, Dot! You are so brave,\" said the frog. Dot smiled. The deep water was not so scary after all."),
    ("Write a short story about a boy and a red ball. It should be about sharing.",
     "Tom had a red ball. He loved it very much, and he did not let anyone touch it. One sunny day, Tom took his ball to the "
     "park. A girl named Mia asked, \"Can I play with you?\" Tom shook his head. \"No, it is my ball,\" he said.\n\nTom kicked "
     "the ball up and ran after it. He kicked it again and ran after it again. It was not much fun. Mia sat on the bench and "
     "looked sad. Tom thought for a moment. Then he kicked the ball to Mia. She laughed and kicked it back.\n\nThey played all "
     "day long. \"A ball is more fun with two,\" said Tom. From then on, Tom and Mia were good friends."),
    ("Write a short story about a bear who loses his hat. It should be about listening.",
     "Benny was a big bear with a small green hat. One morning, he could not find it. He looked under his bed. He looked behind "
     "the door. He looked in the cookie jar, and he ate two cookies, but there was no hat.\n\n\"Where is my hat?\" he shouted. "
     "A tiny ant said, \"Benny, your hat is...\" But Benny did not listen. He ran to the river. He ran to the hill. The ant ran "
     "after him.\n\nAt last Benny sat down and was tired. \"Now will you listen?\" asked the ant. \"Your hat is on your head!\" "
     "Benny put his paw on his head. There it was! He laughed so hard that the hat fell off. \"Next time I will listen first,\" "
     "he said."),
    ("Write a short story about a girl who helps a lost puppy. It should be about being kind.",
     "One rainy day, Anna was walking home from school. She saw a small brown puppy under a bench. It was wet and cold. \"Oh, "
     "poor puppy,\" said Anna. \"Are you lost?\" The puppy looked up and gave a little bark.\n\nAnna put her scarf around the "
     "puppy and carried it home. Her mom gave it warm milk. Then they saw a note on its collar. It said, \"My name is Biscuit.\" "
     "There was a number too, so Mom made a call.\n\nSoon an old man knocked on the door. \"Biscuit!\" he cried, and the puppy "
     "jumped into his arms. \"Thank you for being so kind,\" he said to Anna. \"You may come and play with Biscuit every day.\" "
     "Anna was very happy."),
    ("Write a short story about a mouse who wants to fly. It should be about never giving up.",
     "Pip was a small mouse who wanted to fly. \"Mice cannot fly,\" said the cat. \"Mice cannot fly,\" said the cow. But Pip did "
     "not give up.\n\nHe made wings from two leaves. He jumped off a rock and fell into the mud. He made wings from paper. He "
     "jumped again and fell into a bush. Then Pip saw a kite lying in the grass. He tied himself to the kite with a long string "
     "and waited.\n\nThe wind came. It blew and blew, and the kite went up. Pip went up too! He flew over the cat. He flew over "
     "the cow. \"Look at me!\" he shouted. When the wind stopped, he came down softly in the hay. That night, he dreamed of the "
     "sky."),
    ("Write a short story about two friends who build a tower. It should be about working together.",
     "Sam and Nina wanted to build a tower. Sam put a block here. Nina put a block there. But Sam pushed Nina's block away. "
     "\"I want it my way,\" he said. \"No, my way!\" said Nina. They pulled, and the tower fell down with a loud crash.\n\nSam "
     "was angry, and Nina was sad. Then Nina had an idea. \"You hold the bottom, and I will put the top on,\" she said. Sam held "
     "the bottom very still. Nina put one block on top, and then another. The tower grew and grew.\n\nAt last it was as tall as "
     "the table. \"We did it!\" they shouted. Dad took a picture. It was the best tower they had ever made."),
    ("Write a short story about a rabbit who eats too many carrots. It should be about a funny mistake.",
     "Hoppy the rabbit loved carrots. One day he found a whole basket of them by the gate. \"All for me!\" he said. He ate one. "
     "He ate five. He ate them all. Then his tummy began to hurt, and he could not hop at all.\n\nHis friend Lulu came by. "
     "\"Hoppy, why are you so round?\" she asked. \"I ate too much,\" said Hoppy. Just then, Mother Rabbit came home. \"Where are "
     "the carrots for your birthday cake?\" she asked. Hoppy's ears went red.\n\nHe had eaten his own cake! Lulu laughed, and "
     "soon Hoppy laughed too. They made a cake with apples, and Hoppy had only a very small piece."),
    ("Write a short story about a girl who tells a lie. It should be about telling the truth.",
     "Lucy was playing with her ball in the house. Her mom had told her not to. The ball hit a blue cup, and the cup fell and "
     "broke. Lucy was scared. When Mom came in, Lucy said, \"The cat did it.\"\n\nMom sent the cat outside. The cat sat in the "
     "rain and cried. Lucy looked at her through the window. She felt bad inside. She ran to her mom. \"It was me,\" she said. "
     "\"I broke the cup. I am sorry.\"\n\nMom gave her a hug. \"I am glad that you told me the truth,\" she said. They let the "
     "cat in and dried her with a towel. Lucy gave her a bowl of milk. She never told a lie about the cat again."),
    ("Write a short story about a star that falls from the sky. It should be about coming home.",
     "One night, a little star fell from the sky. It landed in a garden with a soft plop. A boy named Leo heard it and came "
     "outside. \"Who are you?\" he asked. \"I am a star,\" said the star. \"I fell down, and I want to go home.\"\n\nLeo took the "
     "star to the top of the hill, but the sky was too high. He threw it up, but it fell down again. Then an owl came by. \"I "
     "can fly high,\" said the owl. \"Give it to me.\"\n\nThe owl took the star and flew up and up, past the clouds. Leo waited. "
     "Then he saw a tiny light far away. It blinked twice. Leo waved. \"Good night, little star,\" he said, and he went to bed."),
    ("Write a short story about a pig who does not want to take a bath. It should be about trying new things.",
     "Rosie the pig did not like baths. She liked mud. She rolled in it in the morning, and she rolled in it at night. \"Please "
     "take a bath,\" said the sheep. \"You smell bad.\" \"No,\" said Rosie. \"Water is boring.\"\n\nOne hot day, the mud was dry "
     "and hard. Rosie was sad. She saw the ducks in the pond. They splashed and laughed. \"Come in!\" they called. Rosie put in "
     "one foot. It was cool and nice. Then she jumped in with a big splash.\n\nShe blew bubbles. She made waves. When she came "
     "out, she was pink and clean. \"Baths are fun!\" said Rosie. Then she rolled in the dust, so that she could take another "
     "one."),
    ("Write a short story about a snail who runs a race. It should be about being patient.",
     "Sid was a slow snail. One day, the animals had a race to the big tree. \"You are too slow, Sid,\" said the hare. \"I will "
     "try,\" said Sid.\n\nThe race began. The hare ran fast, but he stopped to eat. The dog ran fast, but he saw a stick and "
     "chased it. The bird flew fast, but she stopped to sing a song. Sid did not stop. He went on and on, past the rock and past "
     "the pond.\n\nThe sun went down. All the animals were asleep in the grass. In the morning they woke up and looked at the "
     "tree. There sat Sid, eating a leaf. \"Good morning,\" he said. \"What took you so long?\""),
    ("Write a short story about a boy and his grandpa. It should be about learning something new.",
     "Max went to see his grandpa. Grandpa was making a boat out of wood. \"Can I help?\" asked Max. \"Yes,\" said Grandpa. \"But "
     "you must go slowly.\" Max took the brush and painted very fast. The paint went on the floor and on the dog.\n\n\"Oh no!\" "
     "said Max. Grandpa was not angry. He showed Max how to hold the brush. \"Up and down, like this,\" he said. Max tried again. "
     "This time the paint went where it should.\n\nWhen the boat was dry, they took it to the lake. It did not sink. The wind "
     "pushed it over the water. \"You made a fine boat,\" said Grandpa. Max held his hand and smiled."),
    ("Write a short story about a child who is new at school. It should be about finding a friend.",
     "It was Amy's first day at her new school. She did not know anyone. She sat alone and looked at her shoes. At lunch, all the "
     "other children talked and laughed. Amy wanted to go home.\n\nThen a boy sat down next to her. He had a big box of crayons. "
     "\"I am Ravi,\" he said. \"Do you like to draw?\" Amy nodded. She took the green one and drew a dragon. Ravi took the red "
     "one and drew the fire.\n\n\"That is the best dragon ever,\" said Ravi. Soon more children came to look. They all wanted to "
     "draw dragons too. When Amy's dad came, she ran to him. \"Can I come back tomorrow?\" she asked."),
    ("Write a short story about a cloud who is sad. It should be about helping others.",
     "High in the sky lived a small gray cloud. The white clouds did not play with it. \"You are too dark,\" they said. The gray "
     "cloud was sad and floated away.\n\nIt came to a garden. The flowers hung their heads. The grass was brown. A girl stood "
     "there with an empty bucket. \"We have no water,\" she said. \"My flowers will die.\" The gray cloud wanted to help. It "
     "thought about how sad it was, and it began to cry.\n\nDrip, drip, drop! Rain fell on the garden. The flowers lifted their "
     "heads. The girl danced in the rain. \"Thank you, cloud!\" she called. The cloud was so happy that a rainbow came out."),
    ("Write a short story about a kitten who cannot sleep. It should be about a good night's sleep.",
     "It was late, but Milo the kitten could not sleep. The wind said whoo, and the door said creak. \"I am scared,\" said Milo. "
     "He went to the dog. \"Can I sleep here?\" he asked. But the dog snored too loudly.\n\nHe went to the hen house. \"Can I "
     "sleep here?\" But the hens took all the room. He went to the horse. \"Can I sleep here?\" But the hay made him sneeze.\n\n"
     "Then Milo heard a soft voice. It was his mom. \"Come here, my little one,\" she said. Milo lay down next to her. She was "
     "warm, and she sang a quiet song. Milo closed his eyes. He did not hear the wind any more."),
]


# The last paragraph begins so; left to itself, the generator often finds no end.
CLOSINGS = ["In the end,", "From that day on,", "That night,", "At last,", "When {he} got home,", "{n} smiled and", "Finally,",
            "The next day,", "{n} learned that", "{n} was so happy that", "After that,", "Soon", "Then {n} had an idea.", "Before bed,",
            "{n} felt", "Now", "And so,", "When it was time to go home,", "{n} laughed and", "Everyone"]


@dataclass(frozen=True)
class StoryPrompt:
    """One story to be written: what the user asks for, the sentences it must begin with, how its last paragraph begins."""

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
        "n": name, "n2": other, "pet": pick(PET_NAMES), "animal": creature, "child": "girl" if girl else "boy", "trait": pick(TRAITS),
        "trait2": pick(["small", "cozy", "tiny", "little", "red", "warm"]), "age": pick(["three", "four", "five", "six", "seven"]),
        "place": pick(PLACES), "place2": pick(["a forest", "a garden", "a big tree", "a barn", "a small town", "a cozy den", "a pond"]),
        "object": pick(OBJECTS), "friend": pick(FRIENDS), "skill": pick(SKILLS), "fear": pick(FEARS), "food": pick(FOODS),
        "weather": pick(WEATHER), "family": pick(FAMILY), "He": "She" if girl else "He", "he": "she" if girl else "he",
        "his": "her" if girl else "his", "him": "her" if girl else "him",
    }
    first = pick(CHILD_FIRST if is_child else ANIMAL_FIRST)
    if "{n2}" in first:  # two heroes: the singular second sentences do not fit
        second = pick(["They liked to play at {place}.", "One day, they found a {object}.", "One {weather} day, they went to {place}.",
                       "They did everything together.", "They both wanted the {object}.", "One day, they had a big fight."])
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
    """The part that a whole batch shares: the system message and ``count`` example stories, in the generator's chat format."""
    text = f"<|im_start|>system\n{SYSTEM}<|im_end|>\n"
    n = len(EXAMPLES)
    for i in (index, index + 1 + index // n)[:count]:
        request, story = EXAMPLES[i % n]
        text += f"<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n{story}<|im_end|>\n"
    return text


def render_prompt(prompt: StoryPrompt) -> str:
    """The part of its own: the request, and the answer begun."""
    return f"<|im_start|>user\n{prompt.request}<|im_end|>\n<|im_start|>assistant\n{prompt.opening}"
