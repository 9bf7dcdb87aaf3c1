"""What sentences for indirect object identification are made of: the templates of Wang et al. 2022, names, things.

`{io}` is the indirect object, `{s}` the subject, `{first}` and `{second}` the two in either order. Every sentence ends
where the indirect object follows.
"""

TEMPLATES = (
    "Then, {first} and {second} went to the {place}. {s} gave a {object} to",
    "Then, {first} and {second} had a lot of fun at the {place}. {s} gave a {object} to",
    "Then, {first} and {second} were working at the {place}. {s} decided to give a {object} to",
    "Then, {first} and {second} were thinking about going to the {place}. {s} wanted to give a {object} to",
    "Then, {first} and {second} had a long argument, and afterwards {s} said to",
    "After {first} and {second} went to the {place}, {s} gave a {object} to",
    "When {first} and {second} got a {object} at the {place}, {s} decided to give it to",
    "When {first} and {second} got a {object} at the {place}, {s} decided to give the {object} to",
    "While {first} and {second} were working at the {place}, {s} gave a {object} to",
    "While {first} and {second} were commuting to the {place}, {s} gave a {object} to",
    "After the lunch, {first} and {second} went to the {place}. {s} gave a {object} to",
    "Afterwards, {first} and {second} went to the {place}. {s} gave a {object} to",
    "Then, {first} and {second} had a long argument. Afterwards {s} said to",
    "The {place} {first} and {second} went to had a {object}. {s} gave it to",
    "Friends {first} and {second} found a {object} at the {place}. {s} gave it to",
)

PAPER_TEMPLATES = (
    "Then, {first} and {second} had a long and really crazy argument. Afterwards, {s} said to",
    "Then, {first} and {second} had lots of fun at the {place}. {s} gave a {object} to",
    "Then, {first} and {second} were working at the {place}. {s} decided to give a {object} to",
)
"""Those of Makelov, Lange and Nanda 2024 (arXiv 2405.08366)."""

PLACES = ("store", "garden", "restaurant", "school", "hospital", "office", "house", "station")
OBJECTS = ("ring", "kiss", "bone", "basketball", "computer", "necklace", "drink", "snack")

_NAMES = """
Aaron Adam Alan Alex Alice Amy Andrew Angela Anna Anthony Arthur Barbara Ben Betty Brandon Brian Carl Carol Charles
Christine Christopher Crystal Dan Daniel David Dean Diana Donald Edward Elizabeth Emily Eric Erin Frank Gary George
Grace Graham Harry Helen Henry Jack Jacob James Jamie Jane Jason Jeffrey Jennifer Jeremy Jesse Jessica Joel John
Jonathan Jordan Joseph Joshua Justin Karen Katie Keith Kelly Kevin Kyle Laura Lauren Lewis Lisa Louis Luke Maria Mark
Martha Martin Mary Matthew Melissa Michael Michelle Nathan Nicholas Patrick Paul Peter Rachel Rebecca Richard Robert
Rose Ruby Ruth Ryan Samuel Sarah Scott Sean Simon Stephen Steven Susan Thomas Timothy Tyler Victoria Walter William
"""
NAMES = tuple(_NAMES.split())

_FEMALE = """
Alice Amy Angela Anna Barbara Betty Carol Christine Crystal Diana Elizabeth Emily Erin Grace Helen Jane Jennifer Jessica
Karen Katie Laura Lauren Lisa Maria Martha Mary Melissa Michelle Rachel Rebecca Rose Ruby Ruth Sarah Susan Victoria
"""
_EITHER = ("Alex", "Jamie", "Jesse", "Jordan", "Kelly")
GENDERS = {name: "F" if name in _FEMALE.split() else "M" for name in NAMES if name not in _EITHER}
"""Of the names that are mostly of one gender."""
