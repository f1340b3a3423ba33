"""The frame: every key, every state of the screen, and leaving in any of them."""

import re
import time
from pathlib import Path

import anyio
import anyio.lowlevel
import msgspec
import pytest
from textual.widgets import Input, Markdown

from dashboard import actions, advice
from dashboard.actions import HandOver, TakeSnapshot
from dashboard.app import A_RECORDING, READ_ONLY, DashApp, run
from dashboard.view import Clock, Opened, Trouble
from dashboard.widgets.confirm import Choice, Options
from dashboard.widgets.explain import GoTo, Words, plain, subject_of
from dashboard.widgets.header import Tabs, Top
from dashboard.widgets.pane import Subject
from tests.dashboard import samples
from tests.dashboard.fakes import FakeFeed, opens
from tests.dashboard.pictures import screen_text
from voters.driver import NoQuorum


class Stage:
    """A dashboard on a fake feed, and what was asked of the cluster."""

    def __init__(self, *, feed=None, view=None, admin=False, answer="done", **how):
        self.feed = feed or FakeFeed()
        self.asked = []
        self.answer = answer
        self.app = DashApp(opens(self.feed, **how), admin=admin, act=self.act)
        self.app.view = samples.healthy() if view is None else view

    async def act(self, cluster, action):
        assert cluster is self.feed.cluster
        self.asked.append(action)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def text(self):
        return screen_text(self.app)

    def notes(self):
        return [each.message for each in self.app._notifications]


def staged(size=(80, 24), **how):
    stage = Stage(**how)
    return stage, stage.app.run_test(size=size)


async def settled(stage, pilot):
    """The feed is open, and what it gave is drawn."""
    with anyio.fail_after(10):
        while stage.app.feed is None:
            await pilot.pause()
    stage.app.fold()
    await pilot.pause()


# --- opening and leaving --------------------------------------------------------------------------


async def test_while_the_feed_opens_it_says_so():
    gate = anyio.Event()
    stage, test = staged(gate=gate)
    async with test as pilot:
        await pilot.pause()
        assert "opening: joining the stream of the voters" in stage.text()
        gate.set()
        await settled(stage, pilot)
        assert advice.verdict(stage.app.view).words.split(",")[0] in stage.text()


async def test_a_feed_that_cannot_be_opened_ends_it_with_the_error():
    error = OSError(19, "No such device")
    stage, test = staged(error=error)
    async with test:
        with anyio.fail_after(10):
            while stage.app.failure is None:
                await anyio.lowlevel.checkpoint()  # the pilot would wait for an app that has ended
    assert stage.app.failure is error
    assert stage.app.return_code == 1


def test_run_raises_what_the_feed_raised(monkeypatch):
    error = OSError(19, "No such device")

    def run_headless(app, **_):
        app.failure = ExceptionGroup("tasks", [error])

    monkeypatch.setattr(DashApp, "run", run_headless)
    with pytest.raises(OSError, match="No such device"):
        run(opens(FakeFeed()))


async def test_leaving_closes_the_feed():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press("q")
    assert stage.feed.closed
    assert stage.app.return_code == 0


@pytest.mark.parametrize("keys", [(), ("e",), ("question_mark",), ("h",), ("g",), ("ctrl+p",)])
async def test_leaving_is_quick_in_any_state(keys):
    stage, test = staged(admin=True)
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press(*keys)
        began = time.monotonic()
        await pilot.press("ctrl+q")
    assert time.monotonic() - began < 1.5, "it took longer than an operator waits"
    assert stage.feed.closed


async def test_leaving_while_the_feed_opens_or_will_not_close_is_quick():
    _, test = staged(gate=anyio.Event())
    async with test as pilot:
        await pilot.pause()
        began = time.monotonic()
        await pilot.press("q")
    assert time.monotonic() - began < 1.5


# --- the frame ------------------------------------------------------------------------------------


async def test_the_verdict_is_the_first_line_with_its_sign():
    for view in (samples.healthy(), samples.election(), samples.two_down(), samples.no_quorum()):
        stage, test = staged(view=view, size=(120, 30))
        async with test as pilot:
            await settled(stage, pilot)
            verdict = advice.verdict(view)
            first = stage.text().splitlines()[0]
            assert first.strip().startswith(advice.SIGNS[verdict.level])
            shown = " ".join(stage.app.query_one(Top).text().split())
            assert verdict.words in shown, "the verdict is never cut"


async def test_a_long_verdict_takes_more_lines(monkeypatch):
    words = "no quorum: " + "voter 3 was not heard for 12 min, " * 4 + "look at it"
    told = advice.Verdict("bad", "no quorum", words, 0, 0)
    monkeypatch.setattr(advice, "verdict", lambda _: told)
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        assert len(stage.app.query_one(Top).picture) == 3
        assert " ".join(stage.app.query_one(Top).text().split()) == f"✗ {words}"
        assert stage.app.query_one(Top).size.height == 3


async def test_keys_and_clicks_change_the_tab():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        panes = stage.app._panes()
        titles = [pane.TITLE for pane in panes]
        assert titles == ["Overview", "Listeners", "Members", "SQL"]
        for at in (1, 2, 0):
            await pilot.press(str(at + 1))
            assert stage.app.pane is panes[at]
            assert [pane.display for pane in panes].index(True) == at
        await pilot.click(Tabs, offset=(16, 0))
        assert stage.app.pane.TITLE == "Listeners"
        await pilot.press("1")
        assert stage.app.focused is not None
        assert stage.app.pane in stage.app.focused.ancestors


async def test_only_the_visible_tab_is_drawn(monkeypatch):
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        drawn = []
        for pane in stage.app._panes():
            monkeypatch.setattr(pane, "show", lambda *_, it=pane: drawn.append(it.TITLE))
        stage.app.fold()
        assert set(drawn) == {"Overview"}
        await pilot.press("2")
        await pilot.pause()
        drawn.clear()  # until the tab was there its own timer may have drawn the one before
        stage.app.fold()
        await pilot.pause()
        assert set(drawn) == {"Listeners"}


async def test_what_is_old_says_how_old_and_what_is_stale_is_dim():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        assert stage.text().splitlines()[1].endswith("live")
        heard_ms = max(each.heard_ms for each in stage.app.view.voters)
        for ago_ms, words, stale in (
            (2_000, "2 s old", False),
            (3_000, "3 s old", False),
            (8_400, "STALE 8 s", True),
        ):
            stage.feed.clock(heard_ms + ago_ms)
            stage.app.fold()
            await pilot.pause()
            assert stage.app.query_one(Tabs).text().rstrip().endswith(words)
            assert stage.app.screen.has_class("-stale") is stale
            assert (stage.app.pane.opacity < 1) is stale


async def test_nothing_heard_yet():
    feed = FakeFeed([[Opened(1_000, "orion", (1, 2, 3), 1_000, "live"), Clock(1_250)]])
    stage, test = staged(feed=feed)
    stage.app.view = type(stage.app.view)()
    async with test as pilot:
        await settled(stage, pilot)
        assert "nothing heard yet" in stage.text()
        assert "orion" in stage.text()
        assert "never" in stage.text()
        assert "healthy" not in stage.app.query_one(Top).text()


async def test_trouble_of_the_feed_is_shown_as_it_is_and_goes():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        stage.feed.push(Trouble(stage.app.view.now_ms, "cannot join [b]239.1[/b]\x1b[2J: no route"))
        stage.app.fold()
        await pilot.pause()
        assert "here: cannot join [b]239.1[/b]\\x1b[2J: no route" in stage.text()
        stage.feed.push(Trouble(stage.app.view.now_ms, ""))
        stage.app.fold()
        await pilot.pause()
        assert "here: cannot join" not in stage.text()


async def test_a_name_from_outside_steers_nothing():
    view = msgspec.structs.replace(samples.healthy(), cluster="[red]o\x1b[31m\nrion")
    stage, test = staged(view=view)
    async with test as pilot:
        await settled(stage, pilot)
        assert "[red]o\\x1b[31m" in stage.text()


async def test_below_the_least_size_it_says_what_to_do_and_comes_back():
    stage, test = staged(size=(79, 24))
    async with test as pilot:
        await settled(stage, pilot)
        assert "this window is 79 × 24" in stage.text()
        assert "follower" not in stage.text()
        await pilot.resize_terminal(300, 80)
        await pilot.pause()
        stage.app.fold()
        await pilot.pause()
        assert "follower" in stage.text()
        assert "this window is" not in stage.text()
        await pilot.resize_terminal(80, 23)
        await pilot.pause()
        assert "make it at least 80 × 24" in stage.text()


async def test_without_colour_the_same_words_are_there(monkeypatch):
    texts = []
    for variable in (None, "1"):
        if variable is not None:
            monkeypatch.setenv("NO_COLOR", variable)
        stage, test = staged(view=samples.two_down())
        async with test as pilot:
            await settled(stage, pilot)
            assert stage.app.no_color is (variable is not None)
            texts.append(stage.text())
            svg = stage.app.export_screenshot()
            grey = all(red == green == blue for red, green, blue in _colours(svg))
            assert grey is (variable is not None)
    assert texts[0] == texts[1]


def _colours(svg):
    """The colours of words, as (red, green, blue)."""
    for style, colour in re.findall(r"-(r\d+) { fill: #([0-9a-f]{6})", svg):
        if any(words.strip() for words in re.findall(rf'-{style}"[^>]*>([^<]*)<', svg)):
            yield int(colour[:2], 16), int(colour[2:4], 16), int(colour[4:], 16)


# --- a replay -------------------------------------------------------------------------------------


async def test_a_replay_says_where_it_is_and_is_paused_and_sped_up():
    feed = FakeFeed(source="night.trexrec.gz", whole_ms=31_000)
    feed.played_ms = 12_400
    stage, test = staged(feed=feed, size=(120, 30))
    async with test as pilot:
        await settled(stage, pilot)
        assert "REPLAY night.trexrec.gz 00:12/00:31 ×1" in stage.text()
        assert "Pause" in stage.text().splitlines()[-1]
        await pilot.press("plus")
        assert feed.speed == 2
        await pilot.press("minus", "minus")
        assert feed.speed == 0.5
        await pilot.press("space")
        assert feed.speed == 0
        await pilot.pause()
        assert "00:12/00:31 paused" in stage.text()
        await pilot.press("plus")
        assert feed.speed == 0, "faster does not let it go on"
        await pilot.press("space")
        assert feed.speed == 1
        await pilot.press(*["plus"] * 20)
        assert feed.speed == 64
        await pilot.resize_terminal(80, 24)
        await pilot.pause()
        assert "4 SQL" in stage.text()
        assert "REPLAY 00:12/00:31 ×64" in stage.text()


async def test_live_has_no_pause():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press("space", "plus", "minus")
        assert stage.feed.speed == 1
        assert "Pause" not in stage.text()


# --- help, explain, go to, commands ---------------------------------------------------------------


async def test_help_tells_keys_signs_and_the_tab():
    stage, test = staged(size=(120, 50))
    async with test as pilot:
        await settled(stage, pilot)
        for key in ("1", "2", "3"):
            await pilot.press(key)
            pane = stage.app.pane
            assert pane.HELP.strip(), f"{pane.TITLE} says nothing about itself"
            await pilot.press("question_mark")
            text = stage.app.screen.query_one(Markdown).source
            assert pane.HELP in text
            for sign in ("✓", "▒", "◑", "●", "space, +, -", "ctrl+p"):
                assert sign in text
            await pilot.press("escape")
            assert not isinstance(stage.app.screen, Words)


async def test_explain_what_is_selected_and_keep_it_true():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        for key in ("e", "enter"):
            await pilot.press("down", key)
            screen = stage.app.screen
            assert isinstance(screen, Words)
            voter = stage.app.pane.subject().name
            shown = screen.query_one(Markdown).source
            assert shown == advice.explain_voter(stage.app.view, int(voter))
            stage.feed.clock(stage.app.view.now_ms + 9_000)
            stage.app.fold()
            await screen._renew()
            now = screen.query_one(Markdown).source
            assert now == advice.explain_voter(stage.app.view, int(voter))
            assert now != shown, "a voter silent for 9 s is explained as before"
            await pilot.press("escape")
            assert len(stage.app.screen_stack) == 1


async def test_explain_scrolls():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press("question_mark", "pagedown")
        await pilot.pause()
        box = stage.app.screen.query_one("#words")
        assert box.scroll_offset.y > 0
        await pilot.press("home")
        await pilot.pause()
        assert box.scroll_offset.y == 0


async def test_go_to_asks_again_until_it_understands():
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press("g")
        assert isinstance(stage.app.screen, GoTo)
        await pilot.press(*"voter", "space", "x", "enter")
        await pilot.pause()
        assert "not understood" in stage.text()
        stage.app.screen.query_one(Input).value = "voter 3"
        await pilot.press("enter")
        await pilot.pause()
        assert stage.app.screen.query_one(Markdown).source == advice.explain_voter(
            stage.app.view, 3
        )


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("0.17.3", Subject("ballot", "0.17.3")),
        (" ballot 0.017.3 ", Subject("ballot", "0.17.3")),
        ("12486", Subject("slot", "12486")),
        ("slot 12,486", Subject("slot", "12486")),
        ("Voter 3", Subject("voter", "3")),
        ("", None),
        ("voter", None),
        ("1.2", None),
        ("1..2", None),
        ("voter 0.1.2", None),
        ("²", None),
        ("1 2", None),
    ],
)
def test_what_an_operator_means(words, found):
    assert subject_of(words) == found


def test_text_from_outside_is_no_markdown():
    assert plain("**b** [x](y) \x1b#") == r"\*\*b\*\* \[x\]\(y\) \\x1b\#"


async def test_every_command_is_in_the_palette_and_can_be_called():
    stage, test = staged(admin=True)
    async with test as pilot:
        await settled(stage, pilot)
        commands = {each.title: each for each in stage.app.get_system_commands(stage.app.screen)}
        for title in (
            "Overview",
            "Listeners",
            "Explain",
            "Go to",
            "Help",
            "Light theme",
            "Hand over leadership",
            "Take a snapshot",
            "Save a screenshot",
            "Quit",
        ):
            assert title in commands
        commands["Listeners"].callback()
        await pilot.pause()
        assert stage.app.pane.TITLE == "Listeners"
        commands["Light theme"].callback()
        await pilot.pause()
        assert stage.app.theme == "textual-light"
        commands["Hand over leadership"].callback()
        await pilot.pause()
        assert isinstance(stage.app.screen, Choice)
        await pilot.press("escape", "ctrl+p")
        await pilot.pause()
        assert "Search" in stage.text()


async def test_a_screenshot_is_saved(tmp_path, monkeypatch):
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        saved = []
        monkeypatch.setattr(stage.app, "deliver_screenshot", lambda: saved.append(tmp_path))
        stage.app.action_save()
        with anyio.fail_after(10):
            while not saved:
                await pilot.pause()


# --- what is done to the cluster ------------------------------------------------------------------


@pytest.mark.parametrize("key", ["h", "s"])
async def test_without_admin_nothing_can_be_done(key):
    stage, test = staged()
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press(key)
        assert stage.notes() == [READ_ONLY]
        assert not isinstance(stage.app.screen, Choice)
        assert "Hand over" not in stage.text()


@pytest.mark.parametrize("key", ["h", "s"])
async def test_nothing_can_be_done_to_a_recording(key):
    stage, test = staged(feed=FakeFeed(whole_ms=1_000), admin=True)
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press(key)
        assert stage.notes() == [A_RECORDING]
        assert not isinstance(stage.app.screen, Choice)


@pytest.mark.parametrize("keys", [("enter",), ("escape",), ("right", "left", "enter")])
async def test_pressed_in_haste_nothing_happens(keys):
    stage, test = staged(admin=True)
    async with test as pilot:
        await settled(stage, pilot)
        for key in ("h", "s"):
            await pilot.press(key)
            assert stage.app.screen.focused.id == "cancel"
            await pilot.press(*keys)
            assert len(stage.app.screen_stack) == 1
        assert stage.asked == []


@pytest.mark.parametrize(
    ("keys", "action", "words"),
    [
        (("h", "right", "enter"), HandOver(0), "most up to date is to lead"),
        (("h", "up", "down", "down", "enter", "tab", "enter"), HandOver(2), "Voter 2 is to lead"),
        (("s", "right", "enter"), TakeSnapshot((1, 2, 3, 4, 5)), "All voters"),
        (("s", "up", "down", "enter", "tab", "enter"), TakeSnapshot((1,)), "Voter 1 is to"),
    ],
)
async def test_what_is_confirmed_is_done_and_told(keys, action, words):
    stage, test = staged(admin=True, answer="it is done: [b]voter 2[/b]")
    async with test as pilot:
        await settled(stage, pilot)
        *choosing, _ = keys
        await pilot.press(*choosing)
        await pilot.pause()
        assert words in stage.text(), "what will happen is not said"
        await pilot.press(keys[-1])
        await pilot.pause()
        assert stage.asked == [action]
        assert stage.notes() == ["it is done: [b]voter 2[/b]"]
        told = stage.app.view.log[-1]
        assert (told.level, told.subject) == ("good", "dashboard")
        assert "it is done: [b]voter 2[/b]" in told.words


async def test_a_choice_can_be_made_with_the_mouse():
    stage, test = staged(admin=True)
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press("h")
        await pilot.click(Options, offset=(5, 3))
        assert stage.app.screen.query_one(Options).text().splitlines()[3].startswith(" ●")
        await pilot.click("#confirm")
        await pilot.pause()
        assert stage.asked == [HandOver(3)]


async def test_what_failed_is_told_in_words():
    for error in (NoQuorum("only 2 of 5 voters answer"), OSError(111, "Connection refused")):
        stage, test = staged(admin=True, answer=error)
        async with test as pilot:
            await settled(stage, pilot)
            await pilot.press("h", "right", "enter")
            await pilot.pause()
            words = f"handing over leadership failed: {error}"
            assert stage.notes() == [words]
            assert stage.app.view.log[-1].level == "bad"
            assert words in stage.app.view.log[-1].words


async def test_the_screen_lives_while_something_is_done():
    stage, test = staged(admin=True)
    gate = anyio.Event()

    async def slow(_cluster, _action):
        await gate.wait()
        return "done"

    stage.app._act = slow
    async with test as pilot:
        await settled(stage, pilot)
        await pilot.press("s", "right", "enter", "2")
        assert stage.app.pane.TITLE == "Listeners"
        taken = stage.feed.taken
        stage.app.fold()
        assert stage.feed.taken == taken + 1
        gate.set()
        await pilot.pause()
        assert stage.notes() == ["done"]


async def test_actions_are_what_the_client_is_asked_for(monkeypatch):
    class Driver:
        async def snapshot_now(self, voter):
            return voter * 100

    class Client:
        driver = Driver()

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            return None

        async def hand_over(self, to):
            return to or 4

    monkeypatch.setattr(actions, "connect", lambda *_, **__: Client())
    assert (
        await actions.perform(Path(), None, HandOver()) == "leadership handed over: voter 4 leads"
    )
    told = await actions.perform(Path(), None, TakeSnapshot((1, 3)))
    assert told == "snapshot taken: voter 1 at slot 100, voter 3 at slot 300"


def test_every_binding_of_the_frame_is_told_in_the_help():
    from dashboard.app import KEYS

    for key in ("1", "e", "?", "g", "h", "s", "space", "q", "ctrl+p"):
        assert key in KEYS


def test_the_style_sheet_has_every_style():
    from dashboard.widgets.lines import STYLES

    sheet = Path(DashApp.CSS_PATH).read_text()
    for style in STYLES:
        assert f".lines--{style} " in sheet, f"{style} looks like nothing"
