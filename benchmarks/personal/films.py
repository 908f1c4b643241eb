"""Users as tasks: does a user like a film more than their own mean? MovieLens-100k, as the package recbole has it.

The ratings are of GroupLens (F. M. Harper, J. A. Konstan, ACM TiiS 5, 4, 2015), for research, not to be redistributed
without permission: they are read from where pip has put them, and nothing of them is kept here.
"""

from __future__ import annotations

import csv
import importlib.util
from collections import defaultdict
from pathlib import Path
from random import Random
from statistics import fmean

from .problem import Example, Problem

__all__ = ["all_users", "folder", "many_ratings"]

TESTED, POOL = 60, 100  # of a user's ratings: for the test, and to train on at most
USERS = 150  # of those with as many ratings; the others are the new ones


def folder() -> Path:
    """Where pip has put the ratings.

    Raises:
        SystemExit: the package is not installed.
    """
    package = importlib.util.find_spec("recbole")  # not imported: it would need much that is not installed
    if package is None or package.origin is None:
        raise SystemExit("Run `pip install --no-deps recbole`, which carries MovieLens-100k, or `make bench-personal`.")
    return Path(package.origin).parent / "dataset_example" / "ml-100k"


def _ratings(where: Path) -> dict[str, list[Example]]:
    """The examples of each user, in an order drawn by the user's name."""
    films = {row["item_id"]: f"{row['movie_title']} ({row['release_year']}). {row['class']}" for row in
             _rows(where / "ml-100k.item")}  # fmt: skip
    found: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for row in _rows(where / "ml-100k.inter"):
        found[row["user_id"]].append((films[row["item_id"]], float(row["rating"])))
    ratings = {}
    for user in sorted(found, key=int):
        mean, name = fmean(rating for _, rating in found[user]), f"user {user}"
        rows = [Example(name, text, int(rating > mean)) for text, rating in sorted(found[user])]
        ratings[name] = Random(name).sample(rows, len(rows))
    return ratings


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        names = [column.partition(":")[0] for column in next(file).rstrip("\n").split("\t")]
        return [dict(zip(names, line, strict=True)) for line in csv.reader(file, delimiter="\t", quotechar=None,
                                                                           quoting=csv.QUOTE_NONE)]  # fmt: skip


def many_ratings(where: Path) -> Problem:
    """The users with 160 ratings or more: 150 of them, the other 59 as new ones; up to 100 ratings of each to train."""
    long = {user: rows for user, rows in _ratings(where).items() if len(rows) >= TESTED + POOL}
    known = sorted(Random("users").sample(sorted(long), USERS))
    new = [user for user in long if user not in known]
    test = {user: long[user][:TESTED] for user in long}
    pool = {user: long[user][TESTED : TESTED + POOL] for user in long}

    def of(part: dict[str, list[Example]], users: list[str]) -> dict[str, list[Example]]:
        return {user: part[user] for user in users}

    return Problem(2, of(pool, known), of(test, known), of(pool, new), of(test, new))


def all_users(where: Path, train: int = 10) -> Problem:
    """All 943 users: `train` ratings of each to train, up to 60 of the others to test."""
    ratings = _ratings(where)
    return Problem(
        2,
        {user: rows[:train] for user, rows in ratings.items()},
        {user: rows[train : train + TESTED] for user, rows in ratings.items()},
        {},
        {},
    )
