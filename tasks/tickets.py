"""The embedded default data: customer-support tickets, generated from the seed. `python -m tasks.run tickets`.

A prompt states customer, order, item, problem, offer, deadline and signer in one of many wordings, in at most 64
tokens of SmolLM2's tokenizer (measured: 50 at most in the default data, 35 on average). Ticket number i
depends on the seed and i alone, so a larger `tickets.count` appends tickets and leaves the first ones as they were.
Every ticket has an order number of its own, which makes every prompt distinct.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from tasks.datasets import RawTicket, Ticket, write_rows
from tasks.stage import Stage, UserError

HOME = (
    "lamp", "desk", "chair", "rug", "mirror", "kettle", "teapot", "vase", "blanket", "pillow", "bookshelf", "clock",
    "frying pan", "garden hose", "tent", "guitar", "suitcase", "water bottle", "bike helmet", "board game",
)  # fmt: skip
ELECTRIC = (
    "toaster", "blender", "printer", "keyboard", "speaker", "radio", "heater", "vacuum", "camera", "router", "monitor",
    "coffee maker", "hair dryer", "tablet", "drone", "projector",
)  # fmt: skip
WORN = (
    "jacket", "sweater", "scarf", "hat", "belt", "dress", "raincoat", "ring", "wool coat", "shirt", "backpack", "vest",
)  # fmt: skip
ITEMS = HOME + ELECTRIC + WORN

CUSTOMERS = (
    "Adam", "Alice", "Amanda", "Amy", "Andrea", "Angela", "Anna", "Anthony", "Barbara", "Ben", "Beth", "Brian",
    "Carl", "Carlos", "Carol", "Catherine", "Charles", "Chloe", "Chris", "Claire", "Daniel", "David", "Diana", "Donald",
    "Dora", "Edward", "Elena", "Elizabeth", "Emily", "Emma", "Eric", "Eva", "Felix", "Fiona", "Frank", "Gary",
    "George", "Grace", "Greg", "Hannah", "Harry", "Helen", "Henry", "Ian", "Isaac", "Jack", "Jacob", "James",
    "Jane", "Jason", "Jennifer", "Jessica", "Joan", "John", "Joseph", "Julia", "Karen", "Karl", "Kate", "Kelly",
    "Kevin", "Laura", "Leo", "Linda", "Lisa", "Louis", "Lucy", "Luke", "Marco", "Maria", "Mark", "Martha",
    "Martin", "Mary", "Matthew", "Max", "Michael", "Michelle", "Mike", "Monica", "Nancy", "Nathan", "Nick", "Nina",
    "Nora", "Oliver", "Oscar", "Pamela", "Patrick", "Paul", "Peter", "Philip", "Rachel", "Rebecca", "Richard", "Robert",
    "Roger", "Rosa", "Ryan", "Samuel", "Sandra", "Sarah", "Simon", "Sofia", "Stephen", "Susan", "Teresa", "Thomas",
    "Victor", "Walter", "William",
)  # fmt: skip
SIGNERS = (
    "Tom", "Rita", "Alex", "Joe", "Kim", "Bob", "Sue", "Pat", "Dan", "Liz", "Sam", "Jill", "Ray", "Ann", "Tim", "Lee",
    "Ruth", "Dean", "Ivy", "Ross", "Gina", "Hugh", "Mia", "Neil",
)  # fmt: skip

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of problem: what customers say of the item, what the shop may offer, and which items it can befall."""

    problems: tuple[str, ...]
    remedies: tuple[str, ...]
    items: tuple[str, ...] = ITEMS


KINDS = {
    "late": Kind(
        ("arrived late", "came a week late", "was delivered late"),
        ("a 10% discount", "store credit", "a partial refund", "a gift card"),
    ),
    "lost": Kind(("never arrived", "got lost in the post"), ("a full refund", "a replacement", "a new delivery")),
    "broken": Kind(("arrived broken", "came in pieces"), ("a replacement", "a full refund", "a free repair")),
    "scratched": Kind(
        ("arrived scratched", "has a bad scratch"), ("a 20% discount", "a partial refund", "a replacement")
    ),
    "wrong_color": Kind(
        ("is the wrong color", "came in the wrong color"), ("an exchange", "a full refund", "a 15% discount")
    ),
    "wrong_size": Kind(("is too small", "is too big"), ("an exchange", "a full refund", "store credit"), WORN),
    "wrong_item": Kind(
        ("is not what was ordered", "is a different model"), ("an exchange", "a full refund", "a new delivery")
    ),
    "incomplete": Kind(
        ("came incomplete", "lacks a screw"), ("a spare part", "a replacement", "a partial refund"), HOME + ELECTRIC
    ),
    "dead": Kind(
        ("stopped working", "will not turn on"), ("a free repair", "a replacement", "a full refund"), ELECTRIC
    ),
    "setup": Kind(
        ("will not connect", "shows an error"), ("a support call", "a free repair", "a replacement"), ELECTRIC
    ),
    "billed_twice": Kind(("was charged twice", "was billed twice"), ("a full refund", "store credit")),
    "overpriced": Kind(
        ("was charged too high", "cost more than agreed"), ("a partial refund", "store credit", "a gift card")
    ),
    "dirty": Kind(("came stained", "arrived dirty"), ("a replacement", "a 20% discount", "an exchange")),
    "used": Kind(("looks used", "came already opened"), ("a replacement", "a full refund", "a 25% discount")),
    "wrong_address": Kind(
        ("went to the wrong address", "was left at the wrong door"), ("a new delivery", "a full refund")
    ),
    "cancelled": Kind(
        ("was sent though cancelled", "came after being cancelled"), ("a return label", "a full refund", "store credit")
    ),
    "worn_out": Kind(("fell apart", "wore out fast"), ("a free repair", "a replacement", "store credit")),
}

# Wordings differ in the order of the facts and in manner: an order to a clerk, a form, a customer's message with notes.
WORDINGS = (
    "Write a short reply to {customer}: the {item} in order {order} {problem}. We offer {remedy} by {deadline}. "
    "Sign as {signer}.",
    "Customer: {customer}\nOrder: {order}\nItem: {item}\nProblem: {problem}\nOffer: {remedy}\nBy: {deadline}\n"
    "Signer: {signer}\nReply:",
    "Hello, my {item} {problem}. My order is {order}. {customer}\nAnswer as {signer}, offering {remedy} by {deadline}.",
    "You are {signer} at a shop. {customer} says the {item} {problem}, order {order}. Reply and offer {remedy} by "
    "{deadline}.",
    "Order {order}, {item}. {customer} writes that it {problem}. Draft an answer from {signer} with {remedy}, due "
    "{deadline}.",
    "We can give {remedy} by {deadline}. Tell {customer}, whose {item} {problem}. Order {order}, signed {signer}.",
    "Ticket: {item} {problem}. From {customer}, order {order}. Action: {remedy} until {deadline}. Agent {signer}, "
    "please answer.",
    "{signer}, please answer {customer} about order {order}. The {item} {problem}. We promise {remedy} by {deadline}.",
    "Deadline {deadline}. Remedy {remedy}. Order {order}. Item {item}, which {problem}. Customer {customer}. "
    "Write the reply of {signer}.",
    "{customer} is upset: \"My {item} {problem}!\" It is order {order}. As {signer}, reply; {remedy} is possible by "
    "{deadline}.",
    "Compose a support email from {signer} to {customer}. Order {order}: {item} {problem}. Solution: {remedy}, "
    "{deadline} at the latest.",
    "Dear shop, the {item} I bought {problem}. Order {order}. Regards, {customer}\n\nReply for {signer}. "
    "Allowed: {remedy}, by {deadline}.",
    "What should {signer} write to {customer}? Order {order}, the {item} {problem}. We decided on {remedy} before "
    "the end of {deadline}.",
    "by={deadline}; offer={remedy}; item={item}; issue={problem}; order={order}; to={customer}; from={signer}. "
    "Write the message.",
    "Answer this complaint. {customer}, order no. {order}: \"the {item} {problem}\". Until {deadline} we can do "
    "{remedy}. Sign {signer}.",
    "Support note by {signer}: {customer} gets {remedy} by {deadline} since the {item} {problem}. See order {order}. "
    "Now write to {customer}.",
)  # fmt: skip

SHORT_ORDERS = range(100, 10_000)  # each digit is a token, so these are used up first
LONG_ORDERS = range(10_000, 100_000)


def run(stage: Stage) -> None:
    tickets = generate(stage.params.seed, stage.params.tickets.count)
    write_rows(stage.out("data/tickets") / "tickets.jsonl", tickets)
    stage.tracker.table("tickets", [{"prompt": row.prompt, **row.ticket.model_dump()} for row in tickets[:20]])


def generate(seed: int, count: int) -> list[RawTicket]:
    """The first `count` tickets of the seed."""
    most = len(SHORT_ORDERS) + len(LONG_ORDERS)
    if count > most:
        raise UserError(
            f"tickets.count is {count}, and there are order numbers for {most} distinct tickets only. "
            "Lower tickets.count in params.yaml."
        )
    return [draw_ticket(seed, index, order) for index, order in enumerate(islice(orders(seed), count))]


def orders(seed: int) -> Iterator[int]:
    """All order numbers, each once, in the seed's order."""
    rng = random.Random(f"{seed}|orders")
    for numbers in (SHORT_ORDERS, LONG_ORDERS):
        yield from rng.sample(numbers, len(numbers))


def draw_ticket(seed: int, index: int, order: int) -> RawTicket:
    rng = random.Random(f"{seed}|ticket|{index}")
    name = rng.choice(list(KINDS))
    kind = KINDS[name]
    ticket = Ticket(
        kind=name,
        customer=rng.choice(CUSTOMERS),
        order=str(order),
        item=rng.choice(kind.items),
        problem=rng.choice(kind.problems),
        remedy=rng.choice(kind.remedies),
        deadline=draw_deadline(rng),
        signer=rng.choice(SIGNERS),
    )
    return RawTicket(prompt=rng.choice(WORDINGS).format(**ticket.model_dump()), ticket=ticket)


def draw_deadline(rng: random.Random) -> str:
    """A weekday, "14 March" or "March 14". Days end at 28, which every month has."""
    form = rng.choice(("weekday", "weekday", "day month", "month day"))
    if form == "weekday":
        return rng.choice(DAYS)
    day, month = rng.randint(1, 28), rng.choice(MONTHS)
    return f"{day} {month}" if form == "day month" else f"{month} {day}"
