"""Tenants whose texts do not tell them apart: a simulation, and all ways to serve them compared.

Each tenant sends the same kinds of message to queues of its own. The rule, all of it drawn by a seed:

    message ─▶ intent (an answer of a demo task) ─▶ queue of the trade, for some intents another of the tenant's own

A trade sends each intent to one of its queues, at random. A tenant belongs to a trade, agrees with it on most intents,
and sends the others elsewhere. It shows some messages with their queues, few or many; neither the intent nor the trade
is told to anyone. So the text does not say the queue, and tenants of one trade can learn from one another.

    python examples/tenants.py
    python examples/tenants.py --seeds 3 --rates 0.001 0.003 --epochs 12

It writes a file of JSON lines for each tenant, and then does what `peft-poly compare` does on any folder of tasks.
"""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from rich.console import Console
from train_multitask import HelpFormatter
from transformers import HfArgumentParser
from transformers.hf_argparser import HfArg

from peft_poly.compare import Settings, compare_methods, comparison_table, default_encoder, verdict

console = Console(highlight=False)


@dataclass
class Arguments:
    """Settings of the tenants and of the comparison."""

    model: str = HfArg(default="", help="Hub id or folder of an encoder; empty for MiniLM.")
    data: str = HfArg(
        default=str(Path(__file__).parent / "data"), help="Folder of the tasks whose answers are intents."
    )
    files: list[str] = field(
        default_factory=lambda: ["home_intent", "support_topic", "news_topic"], metadata={"help": "Which of its tasks."}
    )
    output_dir: str = HfArg(default="outputs/tenants", help="Where the tenants and what was trained go.")
    trades: int = HfArg(default=4, help="Trades.")
    tenants: int = HfArg(default=5, help="Tenants of each trade.")
    queues: int = HfArg(default=4, help="Queues of each tenant.")
    differs: float = HfArg(default=0.15, help="Share of the intents that a tenant sends elsewhere than its trade.")
    fewest: int = HfArg(default=16, help="Fewest messages that a tenant shows.")
    most: int = HfArg(default=64, help="Most messages that a tenant shows; spread evenly in their logarithm.")
    tested: int = HfArg(default=60, help="Messages of each tenant that are tested.")
    epochs: float = HfArg(default=8, help="Passes over the training rows.")
    rates: list[float] = field(
        default_factory=lambda: [3e-3], metadata={"help": "Learning rates; each method takes its best one."}
    )
    seeds: int = HfArg(default=1, help="Runs of each method.")
    blocks: int = HfArg(default=1, help="Adapt so many of the encoder's last blocks; 0 for all.")


@dataclass(frozen=True)
class Message:
    """A text, what it is about, and whether it is of those that are tested."""

    text: str
    intent: str
    tested: bool


def read_messages(folder: Path, files: list[str]) -> list[Message]:
    """The texts of some tasks; an intent is an answer of one of them."""
    texts = [(folder / f"{name}.jsonl").read_text(encoding="utf-8") for name in files]
    rows = [json.loads(line) for text in texts for line in text.strip().split("\n")]
    return [Message(row["input"], f"{row['task']} {row['output']}", row["split"] == "test") for row in rows]


def make_tenants(messages: list[Message], args: Arguments, seed: int = 0) -> dict[str, list[dict]]:
    """Rows of each tenant, as a comparison reads them."""
    intents = sorted({message.intent for message in messages})
    tenants = {}
    for trade in range(args.trades):
        random = Random(f"trade {trade} {seed}")
        queues = {intent: random.randrange(args.queues) for intent in intents}
        for number in range(args.tenants):
            name = f"tenant {trade * args.tenants + number + 1}"
            tenants[name] = rows_of_tenant(name, queues, messages, args, Random(f"{name} {seed}"))
    return tenants


def rows_of_tenant(
    name: str, of_trade: dict[str, int], messages: list[Message], args: Arguments, random: Random
) -> list[dict]:
    """The messages that a tenant shows, and those that it is tested on."""
    queues = dict(of_trade)
    for intent in random.sample(sorted(queues), round(args.differs * len(queues))):
        queues[intent] = (queues[intent] + random.randrange(1, args.queues)) % args.queues
    shown = round(math.exp(random.uniform(math.log(args.fewest), math.log(args.most))))
    options, rows = [f"queue {queue + 1}" for queue in range(args.queues)], []
    for split, number in (("train", shown), ("test", args.tested)):
        found = [message for message in messages if message.tested == (split == "test")]
        for message in random.sample(found, min(number, len(found))):
            answer = {"output": options[queues[message.intent]], "options": options, "split": split}
            rows.append({"task": name, "input": message.text, **answer})
    return rows


def write(tenants: dict[str, list[dict]], folder: Path) -> None:
    """A file for each tenant, and no other."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.jsonl"):
        old.unlink()
    for name, rows in tenants.items():
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name.replace(' ', '_')}.jsonl").write_text(text, encoding="utf-8")


def main(argv: list[str]) -> None:
    start = time.time()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # PEFT's calls, not the user's
    parser = HfArgumentParser(Arguments, description=__doc__, formatter_class=HelpFormatter)
    args = parser.parse_args_into_dataclasses(argv)[0]
    output = Path(args.output_dir)
    try:
        write(make_tenants(read_messages(Path(args.data), args.files), args), output / "data")
        settings = Settings(epochs=args.epochs, rates=tuple(args.rates), seeds=args.seeds, blocks=args.blocks)
        found = compare_methods(output / "data", args.model or default_encoder(), output, settings, console.print)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    console.print(comparison_table(found))
    console.print(verdict(found))
    console.print(f"{time.time() - start:.0f} seconds in all.")


if __name__ == "__main__":
    main(sys.argv[1:])
