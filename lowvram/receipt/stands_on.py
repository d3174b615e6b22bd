"""The run that another stands on, such as that of its autoencoder: what it was, and what it took.

It is `stands_on.json` in the folder of the run that stands on it, which keeps a copy of what it uses and can be moved
alone: whoever goes on with it, days later or elsewhere, is told too.
"""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from lowvram.errors import LowVRAMError
from lowvram.receipt.ledger import Receipt, object_of

NAME = "stands_on.json"
_MOST_TEXT = 200


@dataclass(frozen=True, kw_only=True)
class StandsOn:
    """run: its folder's name. recipe: its recipe's. checkpoint: "sha256:..." of the weights that were taken of it.
    receipt: its own, up to then; no part of that of the run that stands on it.
    """

    run: str
    recipe: str
    checkpoint: str
    receipt: Receipt

    @classmethod
    def read(cls, folder: Path) -> "StandsOn | None":
        """That of a run folder; None where there is none.

        Raises:
            LowVRAMError: it can't be read, or holds something else.
        """
        path = folder / NAME
        if not path.exists():
            return None
        try:
            if path.is_symlink():
                raise ValueError("is no file")
            content = object_of(path)
            texts = {item.name: _text(content, item.name) for item in fields(cls) if item.name != "receipt"}
            return cls(**texts, receipt=Receipt.of(content.get("sessions")))
        except (OSError, ValueError, RecursionError) as error:
            remedy = "Restore it, or remove it: what the run stands on is then not told."
            raise LowVRAMError(f"{path} can't be read: {error}.", remedy) from error

    def write(self, folder: Path) -> None:
        """Write stands_on.json, whole or not at all. Raises OSError for a full disk."""
        partial = folder / f"{NAME}.partial"
        texts = {item.name: getattr(self, item.name) for item in fields(self) if item.name != "receipt"}
        content = json.dumps({**texts, "sessions": self.receipt.plain()}, indent=1, ensure_ascii=False)
        partial.write_text(content, encoding="utf-8")
        partial.replace(folder / NAME)

    def name(self) -> str:
        """The run and the weights of it, in words."""
        return f"{self.run} (recipe {self.recipe}, {self.checkpoint})"


def shown(text: str) -> str:
    """What is kept of a text: it is shown in terminals and pages."""
    return "".join(letter for letter in text if letter.isprintable())[:_MOST_TEXT]


def _text(content: dict[str, Any], name: str) -> str:
    value = content.get(name)
    if not isinstance(value, str) or value != shown(value):
        raise ValueError(f"{name} is {repr(value)[:80]}")
    return value
