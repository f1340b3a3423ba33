"""The words of the SQL prompt: this module alone takes a query apart, completes and remembers it.

No Textual and no database: what may be completed is a :class:`Schema` somebody asked for.  The two
names that the prompt knows besides SQL's are ``$slot``, the slot that the slider shows, and
``$now``, the newest stored one; both become plain numbers, nowhere but where SQL takes a number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from dashboard.tables import visible

HISTORY_MAX: Final = 500
"""So many queries are remembered."""
HISTORY_BYTES_MAX: Final = 1 << 20
"""Of a longer history file only the end is read."""
COMPLETE_CHARS_MAX: Final = 8_000
"""In a longer query nothing is completed."""
CANDIDATES_MAX: Final = 40
"""Most completions offered at once."""
FUNCTION_CHARS: Final = 2
"""Functions are many: they are offered from so many typed characters on."""
LINE_CHARS_MAX: Final = 4_000
"""Of a longer value a line has only the beginning."""
VALUE_CHARS_MAX: Final = 100_000
"""Of a longer value only the beginning is shown and copied: terminals take no more either."""

_KEYWORDS: Final = """
    ALL AND ANY AS ASC BETWEEN BY CASE CAST CROSS DESC DISTINCT ELSE END EXCEPT EXISTS FALSE FILTER
    FIRST FROM FULL GROUP HAVING ILIKE IN INNER INTERSECT INTERVAL IS JOIN LAST LATERAL LEFT LIKE
    LIMIT NOT NULL NULLS OFFSET ON OR ORDER OUTER OVER PARTITION QUALIFY RECURSIVE RIGHT SELECT
    SHOW TABLES THEN TRUE UNION UNNEST USING VALUES WHEN WHERE WINDOW WITH
"""
KEYWORDS: Final = frozenset(_KEYWORDS.split())
"""What is shown as a keyword, and completed to."""
_FROM: Final = frozenset({"FROM", "JOIN"})
_CLAUSES: Final = frozenset(
    {"SELECT", "FROM", "WHERE", "GROUP", "ORDER", "HAVING", "LIMIT", "ON", "QUALIFY", "WINDOW"}
)

_TOKENS: Final = re.compile(
    r"""
    (?P<comment>--[^\n]*|/\*.*?(?:\*/|\Z))
    |(?P<string>[eE]'(?:[^'\\]|''|\\.)*(?:'|\Z)|'(?:[^']|'')*(?:'|\Z)
        |\$(?P<tag>\w*)\$.*?(?:\$(?P=tag)\$|\Z))
    |(?P<quoted>"(?:[^"]|"")*(?:"|\Z))
    |(?P<variable>\$[A-Za-z_]\w*)
    |(?P<number>\d[\w.]*)
    |(?P<word>[^\W\d]\w*)
    |(?P<mark>[^\s])
    """,
    re.VERBOSE | re.DOTALL,
)


class Token(msgspec.Struct, frozen=True):
    """A piece of a query: ``kind`` is "comment", "string", "quoted" (a name), "variable",
    "number", "keyword", "word" or "mark"; ``start`` its offset."""

    kind: str
    text: str
    start: int

    @property
    def end(self) -> int:
        """The offset after it."""
        return self.start + len(self.text)


def tokens(sql: str) -> Iterator[Token]:
    """The pieces of ``sql``, in order, without the space between them. Total."""
    for match in _TOKENS.finditer(sql):
        kind = next(
            name for name, text in match.groupdict().items() if text is not None and name != "tag"
        )
        text = match[0]
        if kind == "word" and text.upper() in KEYWORDS:
            kind = "keyword"
        yield Token(kind, text, match.start())


# --- $slot and $now ---------------------------------------------------------------------------


def uses_slot(sql: str) -> bool:
    """Whether the answer depends on where the slider is."""
    return any(each.kind == "variable" and each.text.lower() == "$slot" for each in tokens(sql))


def filled(sql: str, slot: int, now: int) -> str:
    """``sql`` with numbers for ``$slot`` and ``$now``, but in texts, names and comments."""
    parts, at = [], 0
    for each in tokens(sql):
        if each.kind == "variable" and each.text.lower() in ("$slot", "$now"):
            parts += [sql[at : each.start], str(slot if each.text.lower() == "$slot" else now)]
            at = each.end
    return "".join((*parts, sql[at:]))


# --- completion -------------------------------------------------------------------------------


class Schema(msgspec.Struct, frozen=True):
    """What there is to ask for. ``columns`` are those of each table, view and table macro;
    ``macros`` the parameters of each table macro."""

    columns: Mapping[str, tuple[str, ...]] = {}
    macros: Mapping[str, tuple[str, ...]] = {}
    functions: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[str, ...]:
        """What may stand after FROM, as it is typed."""
        tables = (name for name in self.columns if name not in self.macros)
        return (*sorted(tables), *(f"{name}(" for name in sorted(self.macros)))


class Completion(msgspec.Struct, frozen=True):
    """What the word that begins at ``start`` may become, the likeliest first."""

    start: int
    candidates: tuple[str, ...] = ()


def complete(schema: Schema, sql: str, at: int) -> Completion:
    """What may stand at offset ``at`` of ``sql``, where the cursor is."""
    if len(sql) > COMPLETE_CHARS_MAX:
        return Completion(at)
    every = list(tokens(sql))
    before = [each for each in every if each.end <= at]
    if any(
        each.start < at < each.end
        or (each.end == at and each.kind in ("comment", "string") and _open(each))
        for each in every
    ):
        return Completion(at)
    typed = ""
    if before and before[-1].end == at:
        last = before[-1]
        if last.kind in ("word", "keyword", "variable") or last.text == "$":
            typed = last.text
            before.pop()
    start = at - len(typed)
    offered = _offered(schema, every, before, typed)
    wanted = typed.lower()
    found = [each for each in dict.fromkeys(offered) if each.lower().startswith(wanted)]
    if not wanted and not _asks(before):
        found = []
    if any(each.lower() == wanted for each in found):
        found = []
    if typed.islower():
        found = [each.lower() if each in KEYWORDS else each for each in found]
    return Completion(start, tuple(found[:CANDIDATES_MAX]))


def _open(token: Token) -> bool:
    """Whether what is typed next still belongs to it."""
    if token.text.startswith("--"):
        return True
    if token.kind == "comment":
        return len(token.text) < 4 or not token.text.endswith("*/")
    body = token.text.lstrip("eE")
    if body.startswith("$"):
        tag = body[: body.index("$", 1) + 1]
        return len(body) < 2 * len(tag) or not body.endswith(tag)
    return len(body) < 2 or not body.endswith("'")


def _asks(before: list[Token]) -> bool:
    """Whether even nothing typed has completions worth showing: after FROM, JOIN and a dot."""
    return bool(before) and (before[-1].text.upper() in _FROM or before[-1].text == ".")


def _in_from(before: list[Token]) -> bool:
    """Whether a table comes here: right after FROM or JOIN, or after a comma of the FROM list."""
    if not before:
        return False
    if before[-1].text.upper() in _FROM:
        return True
    if before[-1].text != ",":
        return False
    depth = 0
    for each in reversed(before):
        depth += {")": 1, "(": -1}.get(each.text, 0)
        if depth < 0:
            return False
        if depth == 0 and each.text.upper() in _CLAUSES:
            return each.text.upper() == "FROM"
    return False


def _offered(schema: Schema, every: list[Token], before: list[Token], typed: str) -> Iterator[str]:
    if typed.startswith("$"):
        yield from ("$slot", "$now")
        return
    if before and before[-1].text.upper() == "AS":
        return  # a name of one's own
    named = _named(schema, every)
    if before and before[-1].text == ".":
        owner = before[-2].text.strip('"').lower() if len(before) > 1 else ""
        yield from named.get(owner) or schema.columns.get(owner, ())
        return
    if _in_from(before):
        yield from schema.sources
        return
    if before:
        for columns in named.values() if named else schema.columns.values():
            yield from columns
    yield from sorted(KEYWORDS, key=lambda word: (word not in _CLAUSES, word))
    if before and len(typed) >= FUNCTION_CHARS:
        yield from (f"{name}(" for name in schema.functions)


def _named(schema: Schema, every: list[Token]) -> dict[str, tuple[str, ...]]:
    """The columns of what the query reads from, by its name and by its alias."""
    named: dict[str, tuple[str, ...]] = {}
    for at, each in enumerate(every):
        name = each.text.strip('"').lower()
        if each.kind not in ("word", "quoted") or name not in schema.columns:
            continue
        if not _in_from(every[:at]):
            continue
        named[name] = schema.columns[name]
        after = at + 1
        if after < len(every) and every[after].text == "(":
            depth = 0
            while after < len(every):
                depth += {"(": 1, ")": -1}.get(every[after].text, 0)
                after += 1
                if depth == 0:
                    break
        if after < len(every) and every[after].text.upper() == "AS":
            after += 1
        if after < len(every) and every[after].kind in ("word", "quoted"):
            named[every[after].text.strip('"').lower()] = schema.columns[name]
    return named


# --- values -----------------------------------------------------------------------------------


def whole(value: object, sql_type: str = "") -> tuple[str, int]:
    """A value of a result as text, and how many characters beyond VALUE_CHARS_MAX are left out:
    bytes in hex, JSON and nested values compact, what would steer a terminal spelled out; lines
    remain lines."""
    text = _text(value, sql_type)
    return visible(text[:VALUE_CHARS_MAX]), max(0, len(text) - VALUE_CHARS_MAX)


def one_line(value: object, sql_type: str = "") -> str:
    """As :func:`whole`, on one line and cut to LINE_CHARS_MAX: what a cell shows."""
    text = _text(value, sql_type)
    if len(text) > LINE_CHARS_MAX:
        text = text[:LINE_CHARS_MAX] + "…"
    return text if text.isprintable() else visible(text).replace("\n", "\\n")


def _text(value: object, sql_type: str) -> str:
    match value:
        case None:
            return "NULL"
        case bool():
            return "true" if value else "false"
        case str():
            return _compact(value) if sql_type == "JSON" else value
        case bytes() | bytearray() | memoryview():
            return f"0x{bytes(value).hex()}"
        case float():
            return f"{value:.15g}"
        case datetime():
            shown = "microseconds" if value.microsecond % 1000 else "milliseconds"
            return value.isoformat(" ", shown if value.microsecond else "seconds")
        case list() | tuple() | dict():
            return _json(value)
        case _:
            return str(value)


def _compact(text: str) -> str:
    try:
        return msgspec.json.format(text, indent=-1)
    except (msgspec.DecodeError, UnicodeEncodeError, RecursionError):
        return text


def _json(value: object) -> str:
    try:
        return msgspec.json.encode(value, enc_hook=_strange).decode()
    except (TypeError, ValueError, OverflowError, RecursionError, UnicodeEncodeError):
        return str(value)


def _strange(value: Any) -> str:  # noqa: ANN401 - whatever a database holds
    return str(value)


# --- history ----------------------------------------------------------------------------------


def history_path() -> Path:
    """Where the queries of this user are remembered, by the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME", "")
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "trex" / "sql_history"


class History:
    """The queries typed, the oldest first; ``trouble`` says in words why they are not kept on disk
    ("": they are).

    In the file each line is a query as a JSON string, so a query may have lines. It is its user's
    alone (0600, in a directory made 0700); what is in it that is no query is passed over.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._entries: list[str] = []
        self._at: int | None = None
        self._draft = ""
        self.trouble = ""

    @property
    def entries(self) -> tuple[str, ...]:
        """What is remembered."""
        return tuple(self._entries)

    def load(self) -> None:
        """Read the file; blocking. Never raises."""
        if self._path is None:
            return
        try:
            self._load(self._path)
        except OSError as error:
            self._excuse(error)

    def _load(self, path: Path) -> None:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except FileNotFoundError:
            return
        with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor
            size = os.fstat(descriptor).st_size
            file.seek(max(0, size - HISTORY_BYTES_MAX))
            lines = file.read(HISTORY_BYTES_MAX).split(b"\n")
        found = [query for line in lines if (query := _query_of(line))]
        self._entries = [*found[-HISTORY_MAX:], *self._entries][-HISTORY_MAX:]
        if len(lines) > 2 * HISTORY_MAX or size > HISTORY_BYTES_MAX:
            beside = path.with_name(f"{path.name}.{os.getpid()}")
            self._append(beside, found[-HISTORY_MAX:])
            beside.replace(path)

    def add(self, query: str) -> bool:
        """Remember ``query``, in memory; whether it is new: :meth:`save` it then."""
        self._at = None
        if not query.strip() or (self._entries and self._entries[-1] == query):
            return False
        self._entries = [*self._entries, query][-HISTORY_MAX:]
        return True

    def save(self, query: str) -> None:
        """Append ``query`` to the file; blocking. Never raises."""
        if self._path is None or self.trouble:
            return
        try:
            self._append(self._path, [query])
        except OSError as error:
            self._excuse(error)

    def _append(self, path: Path, queries: list[str]) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o600)
        with open(descriptor, "ab", buffering=0) as file:  # noqa: PTH123 - a descriptor
            os.fchmod(descriptor, 0o600)
            file.write(b"".join(msgspec.json.encode(query) + b"\n" for query in queries))

    def _excuse(self, error: OSError) -> None:
        why = error.strerror or type(error).__name__
        self.trouble = f"history is kept until you leave only: {self._path}: {why}"

    def older(self, draft: str) -> str | None:
        """The query before the one shown; None at the oldest. ``draft`` is what is typed now."""
        at = len(self._entries) if self._at is None else self._at
        if at == 0:
            return None
        if self._at is None:
            self._draft = draft
        self._at = at - 1
        return self._entries[self._at]

    def newer(self) -> str | None:
        """The query after the one shown, at last the draft; None if that is shown."""
        if self._at is None:
            return None
        self._at += 1
        if self._at < len(self._entries):
            return self._entries[self._at]
        self._at = None
        return self._draft


def _query_of(line: bytes) -> str:
    """The query of a line of the file, nothing in it but what can be typed; "" if it holds none."""
    try:
        query = msgspec.json.decode(line, type=str)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return typeable(query).strip()


def typeable(text: str) -> str:
    """``text`` less what nobody types: control characters; tabs are spaces."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
    if text.isprintable():
        return text
    return "".join(each for each in text if each.isprintable() or each == "\n")
