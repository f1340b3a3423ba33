"""How a voter tells what happens: this module alone forms its log lines.

An event has a name, ``part.noun.verb``, and fields. JSON lines when nobody watches, so that a
machine can read them; ``__main__`` chooses Rich when standard error is a terminal.
"""

from __future__ import annotations

import json
import logging
import time
from typing import Final

LOG: Final = logging.getLogger("trex.voter")


def log(level: int, event: str, **fields: object) -> None:
    """Log ``event`` with its fields at a level of :mod:`logging`."""
    if LOG.isEnabledFor(level):
        LOG.log(level, event, extra={"trex_fields": fields})


def fields_of(record: logging.LogRecord) -> dict[str, object]:
    """The fields given to :func:`log`."""
    fields = getattr(record, "trex_fields", {})
    return fields if isinstance(fields, dict) else {}


class JsonLines(logging.Formatter):
    """One JSON object a line: time (UTC), level, event, then the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname,
            "event": record.getMessage(),
            **fields_of(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


class TextLines(logging.Formatter):
    """``event key=value ...`` for people."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of one record."""
        words = [record.getMessage()]
        words += [f"{key}={value}" for key, value in fields_of(record).items()]
        text = " ".join(words)
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return text
