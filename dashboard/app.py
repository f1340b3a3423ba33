"""The dashboard's frame: this module alone holds the view, folds the feed into it and shows it.

What a view means is ``advice``'s, what a tab draws its pane's, what is done to the cluster
``actions``'.  The feed is taken from four times a second and only the visible pane is shown the
view; nothing here waits for the cluster.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path
from typing import ClassVar, Final, TypeAlias

from textual import events
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import ContentSwitcher, Footer, Static
from textual.worker import Worker, WorkerCancelled, WorkerFailed, WorkerState

from dashboard import actions, advice
from dashboard.feed import Feed
from dashboard.tables import visible
from dashboard.view import Did, Event, View, reduce
from dashboard.widgets import confirm
from dashboard.widgets.explain import GoTo, Words, explain
from dashboard.widgets.header import (
    Tabs,
    Top,
    Trouble,
    replay_words,
    right_sides,
    told_picture,
    verdict_picture,
)
from dashboard.widgets.listeners import ListenersPane
from dashboard.widgets.members import MembersPane
from dashboard.widgets.overview import Overview
from dashboard.widgets.pane import Pane, Subject
from dashboard.widgets.sql import SqlPane
from trex_core.cluster import ClusterConfig, ConfigError
from voters.driver import TrexError

OpenFeed: TypeAlias = Callable[[], AbstractAsyncContextManager[Feed]]

FOLD_S: Final = 0.25
"""So often the feed is taken from, in seconds."""
STALE_MS: Final = 3_000
"""If the newest tip is older than this, in milliseconds, all that is shown is stale: the leader
sends one each 80 ms, every other voter each 900 ms."""
QUIT_S: Final = 0.7
"""So long the feed may take to close when the operator leaves, in seconds."""
WIDTH_MIN: Final = 80
HEIGHT_MIN: Final = 24
SPEEDS: Final = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
"""Of a replay, times real time."""
PANES: Final[tuple[Callable[[], Pane], ...]] = (Overview, ListenersPane, MembersPane, SqlPane)
"""The tabs, in order."""
READ_ONLY: Final = "read-only: start with --admin to do this"
A_RECORDING: Final = "this is a recording: nothing can be done to what it shows"

KEYS: Final = """
| Key | |
|---|---|
| 1 2 3 4 | the tabs (or click) |
| tab, arrows | move; what is selected is what Explain explains |
| e, Enter | explain what is selected, or the cluster |
| g | explain a ballot, slot or voter by name |
| ctrl+p | every command by name |
| h, s | hand over leadership, take a snapshot (with --admin) |
| space, +, - | in a replay: pause, faster, slower |
| ? | this help |
| q | quit |
"""
LEGEND: Final = """
| Sign | |
|---|---|
| ✓ · ! ✗ | well · worth knowing · less is left to lose · does not work |
| ━ ▒ ░ · ╳ | leads · stands · polls (asks whether others hear a leader) · follows · was not heard |
| ○ ◔ ◑ ◕ ● | slot: proposed · accepted by few, half, most voters · fixed |
| STALE | nothing new was heard: what is shown was so when it was heard |
"""


class DashApp(App[None]):
    """``trex-dash``. ``open_feed`` makes what it draws from; without ``admin`` nothing can be done
    to the cluster; ``act`` does what the operator confirmed."""

    CSS_PATH = Path(__file__).with_name("trex.tcss")
    TITLE = "trex-dash"
    ENABLE_COMMAND_PALETTE = True
    BINDINGS: ClassVar[list[BindingType]] = [
        *(Binding(str(at + 1), f"tab({at})", show=False) for at in range(4)),
        Binding("e", "explain", "Explain"),
        Binding("enter", "explain", show=False),
        Binding("question_mark", "help", "Help", key_display="?"),
        Binding("g", "go_to", "Go to"),
        Binding("space", "pause", "Pause"),
        Binding("plus,equals_sign", "speed(1)", "Faster", key_display="+"),
        Binding("minus", "speed(-1)", "Slower", key_display="-"),
        Binding("q", "quit", "Quit"),
    ]

    def __init__(
        self,
        open_feed: OpenFeed,
        *,
        admin: bool = False,
        act: actions.Act | None = None,
        theme: str = "textual-dark",
    ) -> None:
        super().__init__()
        self.view = View()
        self.feed: Feed | None = None
        self.failure: BaseException | None = None
        """What the feed failed of, if it did."""
        self._open_feed = open_feed
        self._admin = admin
        self._act = act
        self._leaving = asyncio.Event()
        self._speed = 1.0
        self._live: Worker[None] | None = None
        self.theme = theme
        self.bind("h", "hand_over", description="Hand over", show=admin)
        self.bind("s", "snapshot", description="Snapshot", show=admin)

    # --- the frame ------------------------------------------------------------------------------

    def compose(self) -> ComposeResult:
        """The verdict, the tabs, the panes, the keys."""
        panes = tuple(make() for make in PANES)
        yield Top(id="top")
        yield Trouble(id="trouble")
        yield Tabs(tuple(pane.TITLE for pane in panes), id="tabs")
        for at, pane in enumerate(panes):
            pane.id = f"pane-{at}"
        with ContentSwitcher(initial="pane-0", id="panes"):
            yield from panes
        yield Footer(show_command_palette=True)
        yield Static(id="small")

    def on_mount(self) -> None:
        """Open the feed, and begin to take from it."""
        self._live = self.run_worker(self._follow(), name="feed", exit_on_error=False)
        self.set_interval(FOLD_S, self.fold)
        self.show()

    def on_resize(self, event: events.Resize) -> None:
        """Below the smallest size, say so instead of drawing rubbish."""
        width, height = event.size
        small = width < WIDTH_MIN or height < HEIGHT_MIN
        self._main.set_class(small, "-small")
        if small:
            words = (
                f"this window is {width} × {height}\n"
                f"make it at least {WIDTH_MIN} × {HEIGHT_MIN}, or the letters smaller\nq leaves"
            )
            self._main.query_one("#small", Static).update(words)
        self.call_after_refresh(self.show)

    @property
    def pane(self) -> Pane:
        """The visible one."""
        return self._panes()[self._tabs.active]

    @property
    def _main(self) -> Screen[None]:
        """Under whatever lies over it."""
        return self.screen_stack[0]

    @property
    def _tabs(self) -> Tabs:
        return self._main.query_one(Tabs)

    def _panes(self) -> tuple[Pane, ...]:
        return tuple(self._main.query_one("#panes").query_children(Pane))

    # --- the feed -------------------------------------------------------------------------------

    async def _follow(self) -> None:
        async with self._open_feed() as feed:
            self.feed = feed
            self.refresh_bindings()
            self.fold()
            await self._leaving.wait()
            self.feed = None

    def on_worker_state_changed(self, event: Worker.StateChanged) -> None:
        """A feed that cannot be opened, or breaks, ends the dashboard: ``run`` says of what."""
        if event.worker is self._live and event.state is WorkerState.ERROR:
            self.feed = None
            self.failure = event.worker.error
            self.exit(return_code=1)

    def fold(self) -> None:
        """Take what the feed heard, and show it."""
        if self.feed is None:
            return
        for event in self.feed.take():
            self.view = reduce(self.view, event)
        self.show()

    def tell(self, event: Event) -> None:
        """Fold an event of our own."""
        self.view = reduce(self.view, event)
        self.show()

    def show(self) -> None:
        """Draw the view: the frame and the visible pane."""
        feed, view = self.feed, self.view
        if self._leaving.is_set() or not self.screen_stack or not self._main.query(Top):
            return  # nothing is drawn yet, or nothing any more
        top, trouble = self._main.query_one(Top), self._main.query_one(Trouble)
        width = max(20, self.size.width)
        if feed is None:
            top.put(told_picture("note", "opening: joining the stream of the voters …", width))
            self._tabs.show(())
            return
        verdict = advice.verdict(view)
        top.put(verdict_picture(verdict, width))
        trouble.set_class(bool(view.trouble), "-so")
        if view.trouble:
            trouble.put(told_picture("bad", f"here: {visible(view.trouble)}", width))
        heard_ms = max((each.heard_ms for each in view.voters if each.heard_ms), default=None)
        age_ms = None if heard_ms is None else max(0, view.now_ms - heard_ms)
        stale = age_ms is not None and age_ms > STALE_MS
        self._main.set_class(stale, "-stale")
        progress = feed.progress
        replay = () if progress is None else replay_words(feed.source, progress, feed.speed)
        cluster = visible(view.cluster)
        self._tabs.show(right_sides(cluster, age_ms, stale=stale, replay=replay))
        self.pane.show(view, feed)

    # --- keys -----------------------------------------------------------------------------------

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Under an open box only leaving is possible; of a replay's keys a live screen has none."""
        if action in ("pause", "speed"):
            return self.feed is not None and self.feed.progress is not None
        if action in ("tab", "explain", "help", "go_to", "hand_over", "snapshot"):
            return len(self.screen_stack) == 1
        return super().check_action(action, parameters)

    def action_tab(self, at: int) -> None:
        """To tab ``at``, from 0."""
        panes = self._panes()
        if at >= len(panes) or at == self._tabs.active:
            return
        self._tabs.active = at
        self._main.query_one(ContentSwitcher).current = panes[at].id
        self._main.set_focus(None)
        self._main.focus_next(f"#{panes[at].id} *")
        self.show()
        self.call_after_refresh(self.show)

    def on_tabs_chosen(self, event: Tabs.Chosen) -> None:
        """A tab was clicked."""
        self.action_tab(event.at)

    def action_explain(self) -> None:
        """Explain what is selected."""
        self.explain(self.pane.subject())

    def explain(self, subject: Subject | None) -> None:
        """Explain ``subject``, by what the tab knows of it or by the view; None: the cluster."""
        pane = self.pane

        def words() -> str:
            told = None
            if subject is not None and self.feed is not None:
                told = pane.explain(subject, self.view, self.feed)
            return told or explain(self.view, subject)

        self.push_screen(Words(words))

    def action_help(self) -> None:
        """The keys, what this tab shows, and the signs."""
        pane = self.pane
        words = f"# {pane.TITLE}\n\n{pane.HELP}\n\n## Keys\n{KEYS}\n## Signs\n{LEGEND}"
        self.push_screen(Words(lambda: words))

    def action_go_to(self) -> None:
        """Ask for something by name, and explain it."""

        def found(subject: Subject | None) -> None:
            if subject is not None:
                self.explain(subject)

        self.push_screen(GoTo(), found)

    def action_pause(self) -> None:
        """Stop a replay, or let it go on."""
        if self.feed is not None:
            if self.feed.speed > 0:
                self._speed, self.feed.speed = self.feed.speed, 0.0
            else:
                self.feed.speed = self._speed
            self.fold()

    def action_speed(self, by: int) -> None:
        """A replay faster or slower; a paused one stays so."""
        if self.feed is None:
            return
        paused = self.feed.speed <= 0
        now = self._speed if paused else self.feed.speed
        nearest = min(range(len(SPEEDS)), key=lambda at: abs(SPEEDS[at] - now))
        self._speed = SPEEDS[max(0, min(len(SPEEDS) - 1, nearest + by))]
        if paused:
            self.notify(f"×{self._speed:g} when it goes on (space)")
        else:
            self.feed.speed = self._speed
        self.fold()

    async def action_quit(self) -> None:
        """Leave; the feed is given a moment to close."""
        self._leaving.set()
        if self._live is not None and self._live.is_running:
            try:
                async with asyncio.timeout(QUIT_S):
                    await self._live.wait()
            except (TimeoutError, WorkerFailed, WorkerCancelled):
                self._live.cancel()
        self.exit()

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """Every action by name, whatever ``screen`` is on top."""
        del screen
        for at, pane in enumerate(self._panes()):
            yield SystemCommand(pane.TITLE, "To this tab", partial(self.action_tab, at))
        yield SystemCommand("Explain", "What is selected, or the cluster", self.action_explain)
        yield SystemCommand("Explain the cluster", "All findings", partial(self.explain, None))
        yield SystemCommand("Go to", "Explain a ballot, slot or voter by name", self.action_go_to)
        yield SystemCommand("Help", "The keys and the signs", self.action_help)
        dark = self.current_theme.dark
        yield SystemCommand(
            "Light theme" if dark else "Dark theme", "Change the colours", self.action_toggle_theme
        )
        yield SystemCommand("Theme", "Choose among all themes", self.action_change_theme)
        yield SystemCommand(
            "Hand over leadership", "To another voter, when confirmed", self.action_hand_over
        )
        yield SystemCommand("Take a snapshot", "At voters, when confirmed", self.action_snapshot)
        yield SystemCommand("Save a screenshot", "As SVG", self.action_save)
        yield SystemCommand("Quit", "Leave; the cluster does not notice", self.action_quit)

    def action_toggle_theme(self) -> None:
        """Dark or light."""
        self.theme = "textual-light" if self.current_theme.dark else "textual-dark"

    def action_save(self) -> None:
        """Save what is on the screen, without the palette."""
        self.set_timer(0.2, self.deliver_screenshot)

    # --- what is done to the cluster ------------------------------------------------------------

    def action_hand_over(self) -> None:
        """Ask to whom, then do it."""
        if self._may_act():
            self.push_screen(confirm.hand_over(self.view), self._do)

    def action_snapshot(self) -> None:
        """Ask of which voters, then do it."""
        if self._may_act():
            self.push_screen(confirm.take_snapshot(self.view), self._do)

    def _may_act(self) -> bool:
        if not self._admin:
            self.notify(READ_ONLY, severity="warning")
        elif self.feed is None:
            self.notify("the stream of the voters is not joined yet", severity="warning")
        elif self.feed.progress is not None:
            self.notify(A_RECORDING, severity="warning")
        else:
            return True
        return False

    def _do(self, action: actions.Action | None) -> None:
        if action is not None and self.feed is not None:
            self.run_worker(self._perform(self.feed.cluster, action), group="actions")

    async def _perform(self, cluster: ClusterConfig, action: actions.Action) -> None:
        try:
            assert self._act is not None, "who may act was given the means"
            words, good = await self._act(cluster, action), True
        except (TrexError, ConfigError, OSError) as error:
            words, good = f"{actions.title(action)} failed: {visible(str(error))}", False
        self.notify(words, severity="information" if good else "error", markup=False)
        self.fold()  # it happened after all that is known by now
        self.tell(Did(self.view.now_ms, good, words))


def run(
    open_feed: OpenFeed,
    *,
    admin: bool = False,
    act: actions.Act | None = None,
    theme: str = "textual-dark",
) -> None:
    """Show the dashboard until the operator leaves. Raises what the feed raised."""
    app = DashApp(open_feed, admin=admin, act=act, theme=theme)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        loop = runner.get_loop()
        for number in (signal.SIGTERM, signal.SIGHUP):  # the terminal is left as it was found
            loop.add_signal_handler(number, app.exit)
        app.run(loop=loop)
    error = app.failure
    while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
        error = error.exceptions[0]
    if error is not None:
        raise error


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """The faster event loop where it is installed."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop
