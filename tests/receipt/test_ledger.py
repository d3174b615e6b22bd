"""The ledger: sums are exact, nothing counts twice however ledgers are put together, and no file can harm."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lowvram.errors import LowVRAMError
from lowvram.receipt import ledger
from lowvram.receipt.ledger import NAME, Receipt, Session, totals

SESSION = Session(
    id="0" * 32,
    contributor="Ann",
    machine="RTX 3060",
    cards=1,
    begun="2026-03-01T12:00:00+00:00",
    ended="2026-03-01T13:00:00+00:00",
    first_image=0,
    last_image=1000,
    seconds=3600.0,
    joules=3.6e5,
    energy_by="NVML",
    per_hour=0.0,
    per_kwh=0.3,
    grams_per_kwh=400.0,
    currency="",
    version="0.1.0",
    torch="2.11",
    vram="6GB",
)


def session(number: int, **values: Any) -> Session:
    return replace(SESSION, id=f"{number:032x}", **values)


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    """Records of a few sessions, each seen at several times."""
    first = draw(st.integers(0, 3000))
    return session(
        draw(st.integers(0, 5)),
        contributor=draw(st.sampled_from(["", "Ann", "Bob"])),
        cards=draw(st.integers(1, 8)),
        begun=f"2026-03-0{draw(st.integers(1, 9))}T12:00:00+00:00",
        first_image=first,
        last_image=first + draw(st.integers(0, 3000)),
        seconds=draw(st.floats(0, 1e6)),
        joules=draw(st.floats(0, 1e9)),
        per_hour=draw(st.sampled_from([0.0, 0.1, 0.4])),
        currency=draw(st.sampled_from(["", "$", "EUR"])),
    )


RECORDS = st.lists(sessions(), max_size=12)


@given(one=RECORDS, other=RECORDS, third=RECORDS)
def test_ledgers_join_in_any_order_and_nothing_counts_twice(
    one: list[Session], other: list[Session], third: list[Session]
) -> None:
    a, b, c = (Receipt().joined(records) for records in (one, other, third))
    joined = a.joined(b.sessions).joined(c.sessions)
    assert joined == c.joined(b.sessions).joined(a.sessions) == a.joined(b.joined(c.sessions).sessions)
    assert joined == joined.joined(joined.sessions) == joined.joined(b.sessions)
    assert len({s.id for s in joined.sessions}) == len(joined.sessions)
    for kept in joined.sessions:
        assert kept.seconds == max(s.seconds for s in (*one, *other, *third) if s.id == kept.id)


@given(records=RECORDS)
def test_sums_are_exact_in_any_order_and_by_contributor(records: list[Session]) -> None:
    kept = Receipt().joined(records)
    sums = kept.totals()
    assert sums == replace(totals(kept.sessions[::-1]), energy_by=sums.energy_by, money=sums.money)
    parts = kept.by_contributor().values()
    assert sum(part.images for part in parts) == sums.images
    assert sum(part.sessions for part in parts) == sums.sessions == len(kept.sessions)
    assert sum(part.kwh for part in parts) == pytest.approx(sums.kwh)
    assert sum(part.card_hours for part in parts) == pytest.approx(sums.card_hours)


@given(records=RECORDS)
def test_what_is_written_is_read(records: list[Session]) -> None:
    kept = Receipt().joined(records)
    assert Receipt.of(json.loads(json.dumps(kept.plain()))) == kept


def test_totals_of_two_machines(tmp_path: Path) -> None:
    rented = session(1, contributor="Bob", cards=2, per_hour=0.5, per_kwh=0.0, currency="$", first_image=800)
    receipt = Receipt().joined([SESSION, rented])
    receipt.write(tmp_path)
    sums = Receipt.read(tmp_path).totals()
    assert (sums.sessions, sums.card_hours, sums.images, sums.first_image) == (2, 3.0, 1200, 0)
    assert sums.kwh == pytest.approx(0.2) and sums.images_per_kwh == pytest.approx(6000)
    assert sums.money == {"": pytest.approx(0.03), "$": pytest.approx(1.0)}
    assert sums.co2_grams == pytest.approx(80)
    assert not list(tmp_path.glob("*.partial"))


def test_currencies_in_which_nothing_was_paid_are_left_out() -> None:
    free = session(1, per_kwh=0.0)
    paid = session(2, per_hour=1.0, per_kwh=0.0, currency="$")
    assert totals([free, paid]).money == {"$": pytest.approx(1.0)}
    assert totals([free]).money == {"": 0.0}
    assert totals([]).money == {} and totals([]).images_per_kwh is None


def test_no_receipt_is_an_empty_one(tmp_path: Path) -> None:
    assert Receipt.read(tmp_path) == Receipt()


HOSTILE = [
    b"",
    b"\xff\xfe",
    b"[" * 100_000,
    b"[]",
    b"null",
    b'{"version": 2, "sessions": []}',
    b'{"version": 1}',
    b'{"version": 1, "sessions": {}}',
    b'{"version": 1, "sessions": "text"}',
    b'{"version": 1, "sessions": [null]}',
    b'{"version": 1, "sessions": [' + b"9" * 5000 + b"]}",
]


@pytest.mark.parametrize("content", HOSTILE, ids=range(len(HOSTILE)))
def test_a_file_of_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / NAME).write_bytes(content)
    with pytest.raises(LowVRAMError, match="can't be read"):
        Receipt.read(tmp_path)


@pytest.mark.parametrize(
    "values",
    [
        {"seconds": float("nan")},
        {"seconds": float("inf")},
        {"joules": -1.0},
        {"joules": 10**400},
        {"seconds": True},
        {"cards": 0},
        {"cards": 1.5},
        {"cards": True},
        {"last_image": -5},
        {"first_image": 2000},
        {"id": "x" * 32},
        {"id": "0" * 31},
        {"begun": "yesterday"},
        {"ended": "2026-03-01T12:00:00"},
        {"contributor": "A" * 1000},
        {"contributor": "\x1b[2Jgone"},
        {"machine": 5},
        {"currency": None},
    ],
    ids=str,
)
def test_a_session_of_something_else_is_refused(values: dict[str, Any]) -> None:
    plain = Receipt((SESSION,)).plain()
    assert Receipt.of(plain) == Receipt((SESSION,))
    with pytest.raises(ValueError, match="session"):
        Receipt.of([{**plain[0], **values}])


def test_a_session_twice_in_a_file_counts_once() -> None:
    (plain,) = Receipt((SESSION,)).plain()
    assert Receipt.of([plain, plain, {**plain, "seconds": 1}]) == Receipt((SESSION,))


def test_too_large_a_file_and_too_many_sessions_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Receipt((SESSION,)).plain()
    monkeypatch.setattr(ledger, "_MOST_SESSIONS", 2)
    with pytest.raises(ValueError, match="too long"):
        Receipt.of(plain * 3)
    Receipt((SESSION,)).write(tmp_path)
    monkeypatch.setattr(ledger, "_MOST_BYTES", 100)
    with pytest.raises(LowVRAMError, match="100 bytes"):
        Receipt.read(tmp_path)
