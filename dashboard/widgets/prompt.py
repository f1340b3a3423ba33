"""Where SQL is typed: this widget alone edits, completes and remembers queries."""

from __future__ import annotations

from typing import ClassVar, Final

from rich.text import Text
from textual import events, on
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.widgets import TextArea
from textual.widgets.text_area import EditResult, Location

from dashboard.sqltext import Completion, History, Schema, complete, tokens, typeable


class Prompt(TextArea):
    """Where SQL is typed: Enter runs it, Ctrl+J makes a new line, Tab completes."""

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "prompt--keyword",
        "prompt--string",
        "prompt--variable",
        "prompt--comment",
    }
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "older", "Older", show=False),
        Binding("down", "newer", "Newer", show=False),
        Binding("tab", "complete", "Complete", show=False),
        Binding("ctrl+j,shift+enter,alt+enter", "new_line", "New line", show=False),
    ]

    class Submitted(Message):
        """Enter was pressed: run ``sql``."""

        def __init__(self, sql: str) -> None:
            super().__init__()
            self.sql: Final = sql

    class Hinted(Message):
        """What the word at the cursor may become, changed. ``chosen`` is the one just inserted,
        -1: none."""

        def __init__(self, candidates: tuple[str, ...], chosen: int) -> None:
            super().__init__()
            self.candidates: Final = candidates
            self.chosen: Final = chosen

    def __init__(self, past: History) -> None:
        super().__init__(
            id="sql-prompt",
            compact=True,
            highlight_cursor_line=False,
            placeholder="SELECT …     Enter runs it, Tab completes, F2 has ready-made questions",
        )
        self.past: Final = past
        self.schema = Schema()
        self._cycle: tuple[Completion, int, Location] | None = None
        """The completion that Tab goes through, which of it is inserted, and where that ends."""
        self._hinted: tuple[tuple[str, ...], int] = ((), -1)
        self._quiet = ""
        """This text was not typed, or was run: nothing is offered until it changes."""
        self._coloured: tuple[str, tuple[tuple[int, int, str], ...]] = ("", ())

    # --- what is typed

    def put(self, sql: str) -> None:
        """Replace what is typed."""
        self.load_text(typeable(sql))
        self.move_cursor(self.document.end)
        self._quiet = self.text
        self.refresh(layout=True)

    def replace(
        self,
        insert: str,
        start: Location,
        end: Location,
        *,
        maintain_selection_offset: bool = True,
    ) -> EditResult:
        """As of any text area, but nothing gets in that steers a terminal."""
        return super().replace(
            typeable(insert), start, end, maintain_selection_offset=maintain_selection_offset
        )

    async def on_key(self, event: events.Key) -> None:
        """Enter runs the query. Keys of our own take effect here, not once they have bubbled to
        the application: typed in one burst, they would be overtaken by the characters after them.
        """
        if event.key == "enter":
            self._quiet = self.text
            self._look()
            self.post_message(self.Submitted(self.text))
        elif event.key in self._bindings.key_to_bindings:
            for binding in self._bindings.key_to_bindings[event.key]:
                await self.run_action(binding.action)
        else:
            return
        event.stop()
        event.prevent_default()

    def action_new_line(self) -> None:
        """Begin a new line."""
        start, end = self.selection
        self.replace("\n", start, end, maintain_selection_offset=False)

    def action_older(self) -> None:
        """A line up; on the first one the query before."""
        if not self.cursor_at_first_line:
            self.action_cursor_up()
        elif (query := self.past.older(self.text)) is not None:
            self.put(query)

    def action_newer(self) -> None:
        """A line down; on the last one the query after."""
        if not self.cursor_at_last_line:
            self.action_cursor_down()
        elif (query := self.past.newer()) is not None:
            self.put(query)

    # --- completion

    def action_complete(self) -> None:
        """Complete the word at the cursor; again: the next possibility. With nothing to complete,
        Tab leaves the prompt."""
        if self._cycle is not None:
            completion, chosen, _ = self._cycle
            chosen = (chosen + 1) % len(completion.candidates)
        else:
            completion, chosen = self._completion(), 0
            if not completion.candidates:
                self.screen.focus_next()
                return
        row, column = self.cursor_location
        typed = self._at() - completion.start if self._cycle is None else len(self._inserted())
        start = (row, column - typed)
        text = completion.candidates[chosen]
        self.replace(text, start, (row, column), maintain_selection_offset=False)
        self.move_cursor((start[0], start[1] + len(text)))
        if len(completion.candidates) > 1:
            self._cycle = (completion, chosen, self.cursor_location)
        self._look()

    def _completion(self) -> Completion:
        if not self.selection.is_empty:
            return Completion(0)
        return complete(self.schema, self.text, self._at())

    def _at(self, row: int | None = None) -> int:
        """The offset in the text of the cursor, or of where line ``row`` begins."""
        line, column = self.cursor_location if row is None else (row, 0)
        return sum(len(self.document.get_line(each)) + 1 for each in range(line)) + column

    def _inserted(self) -> str:
        """What Tab inserted last."""
        return "" if self._cycle is None else self._cycle[0].candidates[self._cycle[1]]

    @on(TextArea.SelectionChanged)
    @on(TextArea.Changed)
    def _typed(self) -> None:
        self._look()

    def _look(self) -> None:
        """Tell what the word at the cursor may become."""
        if self._cycle is not None and self._cycle[2] != self.cursor_location:
            self._cycle = None
        hinted: tuple[tuple[str, ...], int] = ((), -1)
        if self.text == self._quiet or not self.has_focus:
            self.suggestion = ""
        elif self._cycle is not None:
            hinted = (self._cycle[0].candidates, self._cycle[1])
            self.suggestion = ""
        else:
            self._quiet = ""
            completion = self._completion()
            hinted = (completion.candidates, -1)
            at_end = self.cursor_at_end_of_line
            self.suggestion = ""
            if completion.candidates and at_end:
                self.suggestion = completion.candidates[0][self._at() - completion.start :]
        if hinted != self._hinted:
            self._hinted = hinted
            self.post_message(self.Hinted(*hinted))

    def on_focus(self) -> None:
        """Offer completions again."""
        self._look()

    def on_blur(self) -> None:
        """Nothing is offered to who is elsewhere."""
        self._look()

    # --- colours

    def get_line(self, line_index: int) -> Text:
        """A line of the query, with its keywords, texts and variables told apart."""
        line = super().get_line(line_index)
        start = self._at(line_index)
        end = start + len(line)
        for first, last, name in self._colours():
            if first < end and last > start:
                style = self.get_component_rich_style(f"prompt--{name}", partial=True)
                line.stylize(style, max(0, first - start), min(end, last) - start)
        return line

    def _colours(self) -> tuple[tuple[int, int, str], ...]:
        if self._coloured[0] != self.text:
            told = {"keyword", "string", "variable", "comment"}
            self._coloured = (
                self.text,
                tuple((t.start, t.end, t.kind) for t in tokens(self.text) if t.kind in told),
            )
        return self._coloured[1]
