"""Writes the stations data set: facts about invented railway stations, and texts about them.

    python examples/stations/make.py        # rewrites train.jsonl, dev.jsonl and test.jsonl

The seed is fixed, so the files change only with this script. Every text is written in one of two
manners, "A" and "B", which share the house style and the order of the facts (history and place,
platforms and access, services) and differ in wording.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SEED = 1830
STATIONS = {"train": 240, "dev": 40, "test": 40}
TOLD_TWICE = {"train": 60, "dev": 40, "test": 40}  # stations with a text in each manner

FIRST = (
    "Alder Amber Badger Beacon Bramble Bracken Brindle Candle Chalk Clover Copper Crane Drover "
    "Ember Falcon Fiddler Garnet Harrow Heron Hollow Ivory Juniper Kestrel Lantern Lark Linnet "
    "Mallow Marten Meadow Orchard Otter Pewter Plover Quarry Raven Saffron Sorrel Swallow Thistle "
    "Wren"
).split()
SECOND = "Cross Ferry Gate Green Heath Hill Lane Mill Park Quay Road Street".split()
TOWNS = (
    "Aldermouth Barrowmere Brackenford Brindleton Carrowby Dunmarsh Eastermouth Fallowmere "
    "Garrowdale Greywater Hartsmoor Hollinbay Kelderby Larkhaven Millbeck Northwold Oakmouth "
    "Pennystone Ravensmere Redmarsh Saltmere Silverbeck Stonemouth Tarnfield Thornbeck Underhallow "
    "Westermoor Whitmarsh Wolverdale Yarrowdale"
).split()
LINES = (
    "Abbey Border Castle Coast Forest Granite Harbour Highland Island Lakes Marsh Moorland Orchard "
    "Valley"
).split()
BY_STEPS = "reached by steps"
NUMBERS = {1: "a single", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"}

Record = dict[str, str | list[str]]


@dataclasses.dataclass(frozen=True)
class Station:
    """The known facts of a station; None for unknown ones."""

    name: str
    town: str | None = None
    line: str | None = None
    opened: int | None = None
    platforms: int | None = None
    step_free: bool | None = None
    cafe: bool | None = None
    parking: int | None = None  # spaces; 0 for no car park

    def facts(self) -> str:
        """The input of the model: "name[Wren Hill], opened[1874], café[no]"."""
        yes_no = {True: "yes", False: "no", None: None}
        values = {
            "name": self.name,
            "town": self.town,
            "line": self.line,
            "opened": self.opened,
            "platforms": self.platforms,
            "step-free": yes_no[self.step_free],
            "café": yes_no[self.cafe],
            "parking": self.parking or (None if self.parking is None else "none"),
        }
        return ", ".join(f"{field}[{value}]" for field, value in values.items() if value)

    def text(self, manner: str) -> str:
        """The target of the model, in manner "A" or "B"."""
        access = self.platforms is not None or self.step_free is not None
        services = self._services()
        if manner == "B":
            join = ". It" if access and services else " and" if access or self._serves() else " but"
            return f"{self._opening_b()}{join} {self._predicate()}."
        if not self.town and not self.line:
            return f"Opened in {self.opened}, {self.name} {self._predicate()}."
        if access and services:
            return f"{self._opening_a()}. {self._clauses()}."
        if access:
            return f"{self._opening_a()} {self._access()}."
        return f"{self._opening_a()}{', with' if self._serves() else ' but has'} {services}."

    def _opening_a(self) -> str:
        """History, name and place: "Opened in 1874, Wren Hill serves the town of Millbeck"."""
        history = f"Opened in {self.opened}, " if self.opened else ""
        serves = f"serves {self._place()}" if self.town else f"is a stop on the {self.line} Line"
        return f"{history}{self.name} {serves}"

    def _opening_b(self) -> str:
        """Name, place and history: "Wren Hill has served the town of Millbeck since 1874"."""
        if self.opened:
            if self.town:
                return f"{self.name} has served {self._place()} since {self.opened}"
            if self.line:
                return f"{self.name} has been a stop on the {self.line} Line since {self.opened}"
            return f"{self.name} dates from {self.opened}"
        if self.town and self.line:
            return f"{self.name} is {self.town}'s stop on the {self.line} Line"
        if self.town:
            return f"{self.name} is the station for {self.town}"
        return f"{self.name} lies on the {self.line} Line"

    def _place(self) -> str:
        return f"{self.town} on the {self.line} Line" if self.line else f"the town of {self.town}"

    def _access(self) -> str:
        """Platforms and access as the end of an opening: "from two step-free platforms"."""
        if self.platforms is None:
            return "and is step-free throughout" if self.step_free else f"and is {BY_STEPS}"
        platforms = count(self.platforms, "step-free " if self.step_free else "")
        by_steps = f" {BY_STEPS}" if self.step_free is False else ""
        return f"{'from' if self.town else 'with'} {platforms}{by_steps}"

    def _clauses(self) -> str:
        """Access and services: "Both platforms are step-free, and there is a café"."""
        access = "step-free" if self.step_free else BY_STEPS
        if self.platforms is None:
            clause = f"It is {access}{' throughout' if self.step_free else ''}"
        elif self.step_free is None:
            clause = f"It has {count(self.platforms)}"
        elif self.platforms == 1:
            clause = f"Its single platform is {access}"
        else:
            which = "Both" if self.platforms == 2 else f"All {NUMBERS[self.platforms]}"
            clause = f"{which} platforms are {access}"
        return f"{clause}, {self._and_or_but()} there is {self._services()}"

    def _predicate(self) -> str:
        """The same with the station as subject: "has two platforms, both step-free, and a café"."""
        services = self._services()
        if self.platforms is None:
            if self.step_free is None:
                return f"has {services}"
            access = "is step-free throughout" if self.step_free else f"is {BY_STEPS}"
            return f"{access} {self._and_or_but()} has {services}" if services else access
        if self.step_free and self.platforms == 1:
            access = f"has {count(1, 'step-free ')}"
        elif self.step_free is None:
            access = f"has {count(self.platforms)}"
        else:
            each = {1: "", 2: "both "}.get(self.platforms, "all ")
            step_free = "step-free" if self.step_free else BY_STEPS
            access = f"has {count(self.platforms)}, {each}{step_free}"
        if not services:
            return access
        comma = "," if ", " in access else ""
        if not self._serves():
            return f"{access}{comma} {'and' if self.step_free is False else 'but'} {services}"
        if self.cafe and self.parking:
            return f"{access}, {'as well as ' if comma else ''}{services}"
        return f"{access}{comma} and {services}"

    def _services(self) -> str:
        """Café and car park as a noun phrase, empty where nothing is known of either."""
        parking = f"parking for {self.parking} cars" if self.parking else "no parking"
        if self.parking is None:
            return {True: "a café", False: "no café", None: ""}[self.cafe]
        if self.cafe is None:
            return parking
        if self.cafe:
            return f"a café {'and' if self.parking else 'but'} {parking}"
        return f"{parking} but no café" if self.parking else "neither a café nor parking"

    def _serves(self) -> bool:
        """True if there is a café or parking."""
        return bool(self.cafe or self.parking)

    def _and_or_but(self) -> str:
        """Joins access and services: "but" if one is good news and the other is not."""
        if "but" in self._services():
            return "and"
        return "but" if self.step_free is not None and self.step_free != self._serves() else "and"


def count(platforms: int, adjective: str = "") -> str:
    """Two accessible platforms, say."""
    return f"{NUMBERS[platforms]} {adjective}platform{'s' if platforms > 1 else ''}"


def stations(rng: random.Random) -> Iterator[Station]:
    """Stations of different names, each with four to six of the eight facts."""
    names = [f"{first} {second}" for first in FIRST for second in SECOND]
    rng.shuffle(names)
    situation = ("town", "line", "opened")
    facilities = ("platforms", "step_free", "cafe", "parking")
    for name in names:
        known: list[str] = []
        while not set(known) & set(situation) or not set(known) & set(facilities):
            known = rng.sample(situation + facilities, k=rng.choice((3, 4, 4, 5, 5)))
        station = Station(
            name=name,
            town=rng.choice(TOWNS),
            line=rng.choice(LINES),
            opened=rng.randint(1836, 1998),
            platforms=rng.choice((1, 2, 2, 3, 3, 4, 5, 6)),
            step_free=rng.random() < 0.6,
            cafe=rng.random() < 0.55,
            parking=rng.choice((0, 0, 0, 12, 18, 25, 30, 40, 45, 50, 60, 75, 80, 90)),
        )
        unknown: dict[str, Any] = dict.fromkeys(set(situation + facilities) - set(known))
        yield dataclasses.replace(station, **unknown)


def records() -> dict[str, list[Record]]:
    """The records of every split, in the order of the files."""
    rng = random.Random(SEED)
    supply = stations(rng)
    splits: dict[str, list[Record]] = {}
    for split, count in STATIONS.items():
        splits[split] = []
        for i in range(count):
            station = next(supply)
            manners = "AB" if i < TOLD_TWICE[split] else rng.choice("AB")
            texts = [station.text(manner) for manner in manners]
            splits[split].append({"facts": station.facts(), "text": texts})
    return splits


def render(split: list[Record]) -> str:
    """The content of a file: one JSON record per line."""
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in split)


if __name__ == "__main__":
    for split, split_records in records().items():
        path = Path(__file__).with_name(f"{split}.jsonl")
        path.write_text(render(split_records), encoding="utf-8")
