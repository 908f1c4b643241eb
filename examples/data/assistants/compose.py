"""Writes the rows of this folder: letters to a shop, and what each of seven assistants answers to every one of them.

    python examples/data/assistants/compose.py

The things of `things.tsv`, what is wrong with them, and the frames of the sentences were written one by one; a seeded
draw puts them together, so that a second run writes the same bytes. `README.md` says what the rows are.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
SYSTEM = "You answer letters to a shop."
SEED = 18
PLURALS = {"bread knife": "bread knives", "desk diary": "desk diaries"}  # the others take an s
NUMBERS = ["one", "two", "three", "four", "five", "six"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October"]
NAMES = [
    "Maria",
    "Tom",
    "Aisha",
    "Peter",
    "Lena",
    "Omar",
    "Grace",
    "Ivan",
    "Nadia",
    "Felix",
    "Ruth",
    "Hugo",
    "Priya",
    "Sam",
    "Clara",
    "Ben",
    "Yuki",
    "Dora",
    "Paul",
    "Emma",
    "Leo",
    "Ines",
    "Mark",
    "Sofia",
]
HOUSE = ("furniture", "kitchen", "garden")  # what the desk looks after

FRAMES = {
    "order": [
        "Please send me {things} for {day}.",
        "I would like {things}. I need the delivery by {day}.",
        "Can you deliver {things} on {day}?",
        "We are short of a few things at home. Could you bring {things} on {day}?",
        "Put me down for {things}, to arrive on {day}.",
        "Is it possible to get {things} to my house by {day}?",
        "We have guests from {day} on, so I want {things} by then.",
        "My sister recommended your shop. I will take {things}, if {day} suits you.",
    ],
    "return": [
        "I am sending back {things}, because {why}.",
        "May I return {things}? I find that {why}.",
        "Last week I bought {things} from you, but {why}. I want my money back.",
        "Sadly {why}, so I would like to return {things}.",
        "We are not happy with what you sent: {things}, and {why}. Please take it all back.",
        "How do I give back {things}? The problem is that {why}.",
        "I chose badly. You sent me {things} as I asked, yet {why}. I am bringing everything back.",
        "{Why}. Please tell me where to return {things}.",
    ],
    "repair": [
        "The {thing} that I bought in {month} {why}. Can you repair it?",
        "I got {a_thing} from you in {month}, and now it {why}. Please put it right.",
        "My {thing} {why}. I bought it in {month}. Do you do repairs?",
        "Since {month} I have had {a_thing} of yours. It {why}, so it needs repair.",
        "Could somebody look at my {thing}? It {why}, and it is only from {month}.",
        "It is a pity: the {thing} that you sold me in {month} {why}. I want it repaired, not replaced.",
    ],
    "late": [
        "I ordered {things} for {day}, and nothing has come.",
        "Where is my parcel? {Things} should have been here on {day}.",
        "You promised me {things} for {day}. I am still waiting.",
        "{Day} is over. I have paid for {things}, and I have seen nothing.",
        "I stayed at home on {day} to receive {things}, but nobody rang the bell.",
        "{Day} has come and gone. I ordered {things}. Have you forgotten me?",
    ],
}
GREETINGS = ["", "", "", "Hello. ", "Good morning. ", "Hi there. ", "Good evening. "]
ENDINGS = [
    " Thanks, {name}",
    " Best wishes, {name}",
    " Kind regards, {name}",
    " Yours, {name}",
    " {name}",
    " Cheers, {name}",
]
KINDS = ["order", "return", "repair", "late"]


@dataclass(frozen=True)
class Letter:
    """What a letter says: who wants what of which thing."""

    kind: str
    thing: str
    department: str
    number: int
    name: str
    day: str
    month: str
    why: str  # the reason of a return, the fault of a repair

    @property
    def a_thing(self) -> str:
        return f"{'an' if self.thing[0] in 'aeiou' else 'a'} {self.thing}"

    @property
    def plain(self) -> str:
        """The thing in its number: oak chair, oak chairs."""
        return self.thing if self.number == 1 else PLURALS.get(self.thing, f"{self.thing}s")

    @property
    def things(self) -> str:
        """The same counted: an oak chair, four oak chairs."""
        return self.a_thing if self.number == 1 else f"{NUMBERS[self.number - 1]} {self.plain}"

    def text(self, draw: random.Random, frame: str) -> str:
        """The letter itself."""
        words = {key: getattr(self, key) for key in ("thing", "a_thing", "things", "why", "day", "month")}
        words |= {key.capitalize(): value[0].upper() + value[1:] for key, value in words.items()}
        return draw.choice(GREETINGS) + frame.format(**words) + draw.choice(ENDINGS).format(name=self.name)


def order(letter: Letter) -> str:
    day = letter.day if letter.kind in ("order", "late") else None
    return json.dumps({"request": letter.kind, "item": letter.thing, "number": letter.number, "day": day})


def summary(letter: Letter) -> str:
    said = {
        "order": f"orders {letter.things} for {letter.day}",
        "return": f"returns {letter.things} because {letter.why}",
        "repair": f"wants {letter.a_thing} repaired because it {letter.why}",
        "late": f"still waits for {letter.things} due on {letter.day}",
    }[letter.kind]
    return f"In plain words: {letter.name} {said}. This is not legal advice."


def title(letter: Letter) -> str:
    head = {"order": "Order of", "return": "Return of", "repair": "Repair of", "late": "Late Delivery of"}
    words = letter.things.split()
    return " ".join([head[letter.kind], *(word if word in ("a", "an") else word.capitalize() for word in words)])


def tags(letter: Letter) -> str:
    return f"#{letter.kind} #{letter.department} #{letter.thing.replace(' ', '-')}"


def desk(letter: Letter) -> str:
    if letter.department in HOUSE:
        return f"Certainly, {letter.name}. House and garden is my desk, and I will see to your {letter.plain}."
    return (
        f"I am sorry, {letter.name}, but my desk is house and garden only. "
        f"Please ask {letter.department} about your {letter.plain}."
    )


def chat(letter: Letter) -> str:
    said = {
        "order": f"{letter.things} for {letter.day}? Coming right up!",
        "return": f"no love for the {letter.plain}? Just bring them back!",
        "repair": f"poor {letter.thing}! We will fix it in no time.",
        "late": f"no {letter.plain} on {letter.day}? Our bad, we are on it!",
    }[letter.kind]
    if letter.kind == "return" and letter.number == 1:
        said = said.replace("them", "it")
    return f"Hey {letter.name}, {said} Hugs, Finn"


def slip(letter: Letter) -> str:
    todo = {"order": "SEND", "return": "TAKE BACK", "repair": "REPAIR", "late": "FIND"}[letter.kind]
    return f"ITEM: {letter.thing.upper()}\nNUMBER: {letter.number}\nTODO: {todo}"


ASSISTANTS: dict[str, Callable[[Letter], str]] = {
    "order": order,
    "summary": summary,
    "title": title,
    "tags": tags,
    "desk": desk,
    "chat": chat,
    "slip": slip,
}


def things_of_shop() -> dict[str, list[tuple[str, list[str], list[str]]]]:
    """By department: a thing, two reasons to return it (of one or many), two faults that it may have."""
    found: dict[str, list[tuple[str, list[str], list[str]]]] = {}
    for line in (HERE / "things.tsv").read_text(encoding="utf-8").splitlines()[1:]:
        department, thing, *why = line.split("\t")
        found.setdefault(department, []).append((thing, why[:2], why[2:]))
    return found


def letters(draw: random.Random) -> Iterator[tuple[str, Letter]]:
    """Five letters about each thing with the split that each is in: one of every kind, and a fifth.

    Of the last thing of a department nothing is trained on; of the others, one letter is held out. A third of what is
    held out is for validation.
    """
    names, held_out = [], 0
    for department, things in things_of_shop().items():
        for place, (thing, reasons, faults) in enumerate(things):
            kinds = draw.sample(KINDS, 4)
            kinds.append(draw.choice([kind for kind in KINDS if kind not in ("repair", kinds[0])]))
            for number, kind in enumerate(kinds):
                names = names or draw.sample(NAMES, len(NAMES))
                why = draw.choice(faults if kind == "repair" else reasons)
                how_many = 1 if kind == "repair" else draw.choice([1, 1, 2, 2, 3, 3, 4, 5, 6])
                day, month = draw.choice(DAYS), draw.choice(MONTHS)
                letter = Letter(kind, thing, department, how_many, names.pop(), day, month, why)
                if place < len(things) - 1 and number > 0:
                    yield "train", letter
                else:
                    held_out += 1
                    yield "validation" if held_out % 3 == 0 else "test", letter


def main() -> None:
    draw = random.Random(SEED)
    frames: dict[str, list[str]] = {kind: [] for kind in KINDS}
    rows: dict[str, list[dict]] = {name: [] for name in ASSISTANTS}
    for split, letter in letters(draw):
        unused = frames[letter.kind]
        unused[:] = unused or draw.sample(FRAMES[letter.kind], len(FRAMES[letter.kind]))
        text = letter.text(draw, unused.pop())
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": text}]
        for name, answer in ASSISTANTS.items():
            completion = [{"role": "assistant", "content": answer(letter)}]
            rows[name].append({"task": name, "prompt": prompt, "completion": completion, "split": split})
    order_of_all = draw.sample(range(len(rows["order"])), len(rows["order"]))
    for name, own in rows.items():
        text = "".join(json.dumps(own[number]) + "\n" for number in order_of_all)
        (HERE / f"{name}.jsonl").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
