"""The ledger of a run: what each session of training took, on whose machine. It is `receipt.json` in the run folder.

A session is one process' training between its start and its end, interrupted or not. What it took counts even where its
last steps were lost. Each has an id of its own, so that ledgers of one run that was moved, copied or branched can be
put together without counting anything twice; every checkpoint holds the ledger up to its step.
"""

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.receipt.rates import Rates

NAME = "receipt.json"
_VERSION = 1
_MOST_BYTES = 32 * 2**20
_MOST_SESSIONS = 20_000
_MOST_TEXT = 200
_MOST_NUMBER = 1e15
_REMEDY = "Restore it, or remove it: the costs up to now are then lost."


@dataclass(frozen=True, kw_only=True)
class Session:
    """What one session took, up to its last line of metrics.

    id: 32 hexadecimal digits, of this session alone. contributor: who lent the machine, "" if nobody is named. machine:
    a card's name, or a processor's. cards: processes that trained together. begun, ended: UTC, ISO 8601. first_image,
    last_image: images seen at its begin and end. seconds: of preparing and training. joules: of all its cards or
    processors. energy_by: "NVML", "RAPL", or "estimate". per_hour, per_kwh, grams_per_kwh, currency: as in Rates.
    version, torch: of the libraries. vram: the budget, "" if none.
    """

    id: str
    contributor: str
    machine: str
    cards: int
    begun: str
    ended: str
    first_image: int
    last_image: int
    seconds: float
    joules: float
    energy_by: str
    per_hour: float
    per_kwh: float
    grams_per_kwh: float
    currency: str
    version: str
    torch: str
    vram: str

    @property
    def rates(self) -> Rates:
        """What was paid."""
        return Rates(
            per_hour=self.per_hour,
            per_kwh=self.per_kwh,
            grams_per_kwh=self.grams_per_kwh,
            currency=self.currency,
        )

    @property
    def card_hours(self) -> float:
        """Hours of all its cards together."""
        return self.seconds * self.cards / 3600

    @property
    def kwh(self) -> float:
        """Its energy in kilowatt hours."""
        return self.joules / 3.6e6


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over sessions.

    money: by currency; of several, those in which something was paid. images: trained, those of steps that were lost or
    repeated included. first_image: what the sums begin at; above 0 where the costs before it are not known.
    """

    sessions: int
    seconds: float
    card_hours: float
    kwh: float
    money: Mapping[str, float]
    co2_grams: float
    images: int
    first_image: int
    energy_by: tuple[str, ...]

    @property
    def images_per_kwh(self) -> float | None:
        """None where no energy is known."""
        return self.images / self.kwh if self.kwh > 0 else None


def object_of(path: Path) -> dict[str, Any]:
    """The JSON object in a file of 32 MiB at most. Raises OSError, ValueError or RecursionError for another."""
    if not path.is_file():  # of a pipe, reading would never end
        raise ValueError("is no file")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"has more than {_MOST_BYTES} bytes")
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("is no object")
    return content


@dataclass(frozen=True)
class Receipt:
    """The sessions of a run, in the order of their begin."""

    sessions: tuple[Session, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> "Receipt":
        """That of a run folder; empty where there is none, as in folders of older versions.

        Raises:
            LowVRAMError: it can't be read, or holds something else.
        """
        path = folder / NAME
        if not path.exists():
            return cls()
        try:
            content = object_of(path)
            if content.get("version") != _VERSION:
                raise ValueError(f"is not of version {_VERSION}")
            return cls.of(content.get("sessions"))
        except (OSError, ValueError, RecursionError) as error:
            raise LowVRAMError(f"{path} can't be read: {error}.", _REMEDY) from error

    @classmethod
    def of(cls, values: Any) -> "Receipt":
        """From plain values, as `plain` gives them and a checkpoint keeps them. Raises ValueError for anything else."""
        if not isinstance(values, list) or len(values) > _MOST_SESSIONS:
            raise ValueError("sessions is no list, or too long a one")
        return cls().joined(_session(one) for one in values)

    def plain(self) -> list[dict[str, Any]]:
        """As JSON holds it."""
        return [asdict(session) for session in self.sessions]

    def write(self, folder: Path) -> None:
        """Write receipt.json, whole or not at all. Raises OSError for a full disk."""
        path = folder / NAME
        partial = path.with_name(path.name + ".partial")
        content = json.dumps({"version": _VERSION, "sessions": self.plain()}, indent=1, ensure_ascii=False)
        partial.write_text(content, encoding="utf-8")
        partial.replace(path)

    def joined(self, others: Iterable[Session]) -> "Receipt":
        """With other sessions; of two records of one session the one that goes further holds."""
        found = {session.id: session for session in self.sessions}
        for other in others:
            own = found.get(other.id)
            if own is None or _reach(other) > _reach(own):
                found[other.id] = other
        return Receipt(_in_order(found.values()))

    def totals(self) -> Totals:
        """Sums over all sessions."""
        return totals(self.sessions)

    def by_contributor(self) -> dict[str, Totals]:
        """Sums by who lent the machine, in the order of their first session."""
        names = dict.fromkeys(session.contributor for session in self.sessions)
        return {name: totals([s for s in self.sessions if s.contributor == name]) for name in names}


def totals(sessions: Sequence[Session]) -> Totals:
    """Sums over sessions; exact, in whatever order they come."""
    paid = {session: session.rates.money(session.card_hours, session.kwh) for session in sessions}
    currencies = dict.fromkeys(s.currency for s in sessions if paid[s]) or dict.fromkeys(s.currency for s in sessions)
    return Totals(
        sessions=len(sessions),
        seconds=math.fsum(s.seconds for s in sessions),
        card_hours=math.fsum(s.card_hours for s in sessions),
        kwh=math.fsum(s.kwh for s in sessions),
        money={name: math.fsum(paid[s] for s in sessions if s.currency == name) for name in currencies},
        co2_grams=math.fsum(s.rates.co2_grams(s.kwh) for s in sessions),
        images=sum(s.last_image - s.first_image for s in sessions),
        first_image=min((s.first_image for s in sessions), default=0),
        energy_by=tuple(dict.fromkeys(s.energy_by for s in sessions)),
    )


def _in_order(sessions: Iterable[Session]) -> tuple[Session, ...]:
    return tuple(sorted(sessions, key=lambda session: (session.begun, session.id)))


def _is_moment(text: str) -> bool:
    try:
        return datetime.fromisoformat(text).tzinfo is not None
    except ValueError:
        return False


def _reach(session: Session) -> tuple[Any, ...]:
    """How far a record of a session goes; never the same for two that differ."""
    return (session.seconds, session.last_image, session.joules, astuple(session))


def _session(values: Any) -> Session:
    """A checked session. Raises ValueError."""
    if not isinstance(values, dict):
        raise ValueError("a session is no mapping")
    found: dict[str, Any] = {}
    for item in fields(Session):
        value: Any = values.get(item.name)
        if item.type is float and type(value) is int and abs(value) < _MOST_NUMBER:
            value = float(value)
        good = type(value) is item.type
        if isinstance(value, str):  # which is shown in terminals and pages
            good = good and len(value) <= _MOST_TEXT and value.isprintable()
        elif good:
            good = 0 <= value < _MOST_NUMBER  # and so finite
        if not good:
            raise ValueError(f"{item.name} of a session is {repr(value)[:80]}")
        found[item.name] = value
    if not re.fullmatch(r"[0-9a-f]{32}", found["id"]):
        raise ValueError(f"id of a session is {found['id'][:80]!r}")
    for name in ("begun", "ended"):
        if not _is_moment(found[name]):
            raise ValueError(f"{name} of a session is {found[name][:80]!r}")
    if found["cards"] < 1:
        raise ValueError("a session has no cards")
    if found["last_image"] < found["first_image"]:
        raise ValueError(f"a session ends at image {found['last_image']}, before its begin")
    return Session(**found)
