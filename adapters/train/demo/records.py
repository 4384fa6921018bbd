"""Makes the data of records.yaml: support tickets and the JSON record that a desk would file for each.

    python -m adapters.train.demo.records

writes records.jsonl (trained) and records_held_out.jsonl (never trained). The same seed gives the same bytes. Tickets
of the two files are put together from the same phrases, but no ticket is in both.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
TRAINED, HELD_OUT = HERE / "records.jsonl", HERE / "records_held_out.jsonl"
INSTRUCTION = (
    "Read the support ticket and answer with one line of JSON, with these keys in this order: "
    '"category" (billing, shipping, account or technical), "product", "order" (the number, or null), '
    '"urgent" (true or false).'
)
PRODUCTS = ("desk lamp", "kettle", "headphones", "backpack", "printer", "office chair", "router", "keyboard")
PROBLEMS = {
    "billing": (
        "I was charged twice for the {product}",
        "The invoice for my {product} shows the wrong amount",
        "I still wait for my refund for the {product}",
        "You took the money for the {product} but I cancelled it",
        "My discount was not applied to the {product}",
    ),
    "shipping": (
        "My {product} has not arrived",
        "The {product} was delivered to the wrong address",
        "The box with the {product} was empty",
        "Tracking for my {product} has not moved for days",
        "You sent a {product} in the wrong colour",
    ),
    "account": (
        "I cannot log in to register my {product}",
        "Please change the email address on the account with the {product}",
        "I forgot the password that I set when I bought the {product}",
        "Delete my account, I have returned the {product}",
        "The code to confirm my account for the {product} never comes",
    ),
    "technical": (
        "The {product} does not turn on",
        "My {product} makes a strange noise",
        "The {product} stopped working after a week",
        "One part of the {product} is broken",
        "I cannot find out how to set up the {product}",
    ),
}
URGENT = ("I need this solved today.", "This is urgent!", "Please answer at once.", "It cannot wait.")
CALM = ("No hurry.", "Whenever you have time.", "Thank you in advance.", "Just so that you know.")
OPENINGS = ("", "Hello, ", "Hi there, ", "Good morning. ", "Dear team, ")
ORDERS = (" (order {order}).", ". Order {order}.", ", order number {order}.")
TRAIN_ROWS, HELD_OUT_ROWS, SEED = 320, 60, 20


def tickets(seed: int = SEED) -> tuple[list[str], list[str]]:
    """JSON lines to train and to hold out, without a ticket that is in both."""
    dice, seen, rows = random.Random(seed), set[str](), list[str]()
    while len(rows) < TRAIN_ROWS + HELD_OUT_ROWS:
        text, record = _ticket(dice)
        if text not in seen:
            seen.add(text)
            rows.append(_row(text, record))
    return rows[:TRAIN_ROWS], rows[TRAIN_ROWS:]


def _ticket(dice: random.Random) -> tuple[str, dict[str, str | bool | None]]:
    category, product = dice.choice(sorted(PROBLEMS)), dice.choice(PRODUCTS)
    urgent = dice.random() < 0.5
    order = f"{dice.choice('ABKT')}-{dice.randrange(1000, 10000)}" if dice.random() < 0.7 else None
    problem = dice.choice(PROBLEMS[category]).format(product=product)
    opening = dice.choice(OPENINGS)
    if opening.endswith(", ") and not problem.startswith("I "):
        problem = problem[0].lower() + problem[1:]
    named = dice.choice(ORDERS).format(order=order) if order else "."
    text = f"{opening}{problem}{named} {dice.choice(URGENT if urgent else CALM)}"
    return text, {"category": category, "product": product, "order": order, "urgent": urgent}


def _row(text: str, record: dict[str, str | bool | None]) -> str:
    messages = [
        {"role": "system", "content": INSTRUCTION},
        {"role": "user", "content": text},
        {"role": "assistant", "content": json.dumps(record)},
    ]
    return json.dumps({"messages": messages})


def write() -> None:
    for path, rows in zip((TRAINED, HELD_OUT), tickets(), strict=True):
        path.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write()
