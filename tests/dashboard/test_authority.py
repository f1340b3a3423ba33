"""The authority: what it refuses to write over, and what a command that failed leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from dashboard import authority as authority_module
from dashboard import cluster_init
from dashboard.authority import (
    AUTHORITY_FOLDER,
    Authority,
    make_authority,
    read_authority,
    serials_of,
)
from dashboard.cluster_init import cluster_file, init_cluster
from trex_core.access import Grant, Role, holder_of
from trex_core.cluster import ConfigError, parse_cluster
from trex_core.credentials import CERTIFICATE_FILE, FOLDER, KEYS_FILE, parse_keys

CLUSTER = parse_cluster(cluster_file("own", ["127.0.0.1"] * 3, range(7100, 7111)))
ID = CLUSTER.cluster_id_bytes


@pytest.fixture
def made(tmp_path: Path) -> Authority:
    return make_authority(tmp_path, CLUSTER)


def epochs(folder: Path) -> tuple[int, ...]:
    """Of the stream key's ring in ``folder``; the first one seals."""
    ring = parse_keys((folder / KEYS_FILE).read_text()).stream
    assert ring is not None
    return tuple(key.epoch for key in ring.keys)


def everywhere(base: Path) -> list[tuple[int, ...]]:
    """The same, of all that hold it, without repetition."""
    folders = [base / AUTHORITY_FOLDER, *(base / FOLDER).iterdir()]
    return sorted({epochs(folder) for folder in folders})


def contents(base: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()
    }


def rotate(base: Path) -> str:
    return read_authority(base, CLUSTER).rotate(base, voter=True, stream=True)


# --- rotation -------------------------------------------------------------------------------


@pytest.mark.usefixtures("made")
def test_three_steps_change_the_key_everywhere(tmp_path):
    for step, now in enumerate(((1, 2), (2, 1), (2,)), 1):
        assert f"stream key: step {step} of 3" in rotate(tmp_path)
        assert everywhere(tmp_path) == [now]


@pytest.mark.usefixtures("made")
def test_a_step_that_is_refused_changes_nothing(tmp_path):
    broken = tmp_path / FOLDER / "broken" / CERTIFICATE_FILE
    broken.parent.mkdir()
    broken.write_text("junk")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"broken/node\.pem: .*; move it away, or issue it again"):
        rotate(tmp_path)
    broken.unlink()
    broken.parent.rmdir()
    keys = tmp_path / FOLDER / "voter-3" / KEYS_FILE
    held = keys.read_bytes()
    keys.unlink()
    with pytest.raises(ConfigError, match="does not hold the key voter 3 signs with"):
        rotate(tmp_path)
    keys.write_bytes(held)
    assert {name: before[name] for name in contents(tmp_path)} == contents(tmp_path)
    assert "step 1 of 3" in rotate(tmp_path)


@pytest.mark.parametrize("done", [0, 1, 2])
@pytest.mark.usefixtures("made")
def test_a_step_that_was_cut_off_is_not_skipped(done, tmp_path, monkeypatch):
    """The disk fails at the third folder, in each of the steps."""
    for _ in range(done):
        rotate(tmp_path)
    before = everywhere(tmp_path)
    write, writes = authority_module.write_whole, []

    def failing(path: Path, text: str | bytes) -> None:
        writes.append(path)
        if len(writes) == 3:
            raise OSError(5, "Input/output error")
        write(path, text)

    with monkeypatch.context() as patch:
        patch.setattr(authority_module, "write_whole", failing)
        with pytest.raises(OSError, match="Input/output"):
            rotate(tmp_path)
    assert len(everywhere(tmp_path)) == 2, "some have the next step"
    assert "no step taken" in rotate(tmp_path)
    assert everywhere(tmp_path) == before
    assert f"step {done + 1} of 3" in rotate(tmp_path)
    assert len(everywhere(tmp_path)) == 1


@pytest.mark.usefixtures("made")
def test_a_folder_that_lags_is_brought_along_before_the_next_step(tmp_path):
    keys = tmp_path / FOLDER / "listener" / KEYS_FILE
    old = keys.read_text()
    rotate(tmp_path)
    keys.write_text(old)
    assert "written again" in rotate(tmp_path)
    assert everywhere(tmp_path) == [(1, 2)]
    assert "step 2 of 3" in rotate(tmp_path)


# --- issuing --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role", "folder", "says"),
    [
        ("voter-2", "reader", "voter-2", "'voter-2' is the name of a voter, not of a reader"),
        ("voter-9", "admin", "voter-9", "'voter-9' is the name of a voter, not of a admin"),
        ("admin", "writer", "admin", "'admin' is the name of a admin, not of a writer"),
        ("listener", "admin", "elsewhere", "'listener' is the name of a listener"),
        ("ann", "reader", "voter-2", "holds the credentials of 'voter-2', a voter: issue under"),
        ("ann", "reader", "admin", "holds the credentials of 'admin', a admin: issue under"),
        ("voter-3", "voter", "voter-2", "does not hold the key voter 3 signs with"),
    ],
)
def test_what_is_another_roles_is_not_written_over(made, tmp_path, name, role: Role, folder, says):
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=says):
        made.issue(Grant(name, role), tmp_path / FOLDER / folder)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("harm", ["", "damaged keys"])
def test_a_key_to_sign_with_outlives_its_certificate(made, tmp_path, harm):
    place = tmp_path / FOLDER / "voter-2"
    (place / CERTIFICATE_FILE).write_text("junk")
    with (place / KEYS_FILE).open("a") as file:
        file.write(harm)
    with pytest.raises(ConfigError, match="holds the key a voter signs with, which is nowhere"):
        made.issue(Grant("ann", "reader"), place)
    if not harm:
        held = parse_keys((place / KEYS_FILE).read_text()).signing
        made.issue(Grant("voter-2", "voter"), place)
        assert parse_keys((place / KEYS_FILE).read_text()).signing == held


def test_the_same_role_is_issued_anew_and_damage_repaired(made, tmp_path):
    place = tmp_path / FOLDER / "ann"
    for _ in range(2):
        made.issue(Grant("ann", "reader"), place)
        assert holder_of((place / CERTIFICATE_FILE).read_bytes(), ID).grant.name == "ann"
        (place / CERTIFICATE_FILE).write_text("junk")
        (place / KEYS_FILE).write_text("junk")


def test_a_limited_writer_is_not_issued_anew_without_its_limits(made, tmp_path):
    """To forget --prefix at a renewal would let it change everything."""
    place = tmp_path / FOLDER / "billing"
    made.issue(Grant("billing", "writer", ("app/", "b/")), place)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=r"'billing', limited to 'app/', 'b/': give its --prefix"):
        made.issue(Grant("billing", "writer"), place)
    assert contents(tmp_path) == before
    made.issue(Grant("billing", "writer", ("app/",)), place)
    assert holder_of((place / CERTIFICATE_FILE).read_bytes(), ID).grant.prefixes == ("app/",)


# --- whose serials --------------------------------------------------------------------------


def test_all_that_were_ever_issued_to_a_name_are_known(made, tmp_path):
    place = tmp_path / FOLDER / "abba"
    issued = {made.issue(Grant("abba", "writer"), place).serial for _ in range(3)}
    issued.add(made.issue(Grant("abba", "writer"), tmp_path / "elsewhere").serial)
    made.issue(Grant("other", "writer"), tmp_path / FOLDER / "other")
    assert len(issued) == 4
    assert serials_of(tmp_path, "abba", ID) == issued
    one = min(issued)
    for text in (one, one.upper(), "0" + one):
        assert serials_of(tmp_path, text, ID) == {one}
    assert len(serials_of(tmp_path, "admin", ID)) == 1


@pytest.mark.usefixtures("made")
def test_a_name_of_hexadecimal_digits_is_no_serial(tmp_path):
    for text in ("abba", "0", "", "f" * 31, "f" * 41, "g" * 40):
        assert serials_of(tmp_path, text, ID) == set()
    for text in ("f" * 32, "7" * 40, "0" * 8 + "7" * 32):
        assert serials_of(tmp_path, text, ID) == {text.lstrip("0")}


# --- a new cluster --------------------------------------------------------------------------


def test_an_init_that_failed_can_be_given_again(tmp_path, monkeypatch):
    place = tmp_path / "new"

    def failing(base: Path, cluster: object) -> None:
        make_authority(base, cluster)
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cluster_init, "make_authority", failing)
        with pytest.raises(ConfigError, match="new cannot be written: No space left on device"):
            init_cluster(place, 3, [], None, "again")
    assert list(place.iterdir()) == []
    path, config = init_cluster(place, 3, [], None, "again")
    assert sorted(each.name for each in place.iterdir()) == [AUTHORITY_FOLDER, path.name, FOLDER]
    assert read_authority(place, config).keys.public.keys() == {1, 2, 3}


@pytest.mark.parametrize("there", [AUTHORITY_FOLDER, FOLDER, "cluster.toml"])
def test_an_init_overwrites_nothing(there, tmp_path):
    (tmp_path / there).mkdir()
    with pytest.raises(ConfigError, match=f"{there} exists already; it is not overwritten"):
        init_cluster(tmp_path, 1, [], None, "twice")
    assert [each.name for each in tmp_path.iterdir()] == [there]
