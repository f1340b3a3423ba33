"""The house itself: its layout, who may import whom, and whether the README tells the truth.

The README's cluster commands are run in tests/e2e/test_readme.py.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.readme import README, shell_blocks

ROOT = Path(__file__).parent.parent
PYTHON = Path(sys.executable)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

CORE_STDLIB = {
    "__future__", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib",
    "heapq", "itertools", "math", "operator", "re", "struct", "types", "typing", "urllib", "zlib",
}  # fmt: skip
"""What the core may use of the standard library: nothing that reads a clock, a disk or chance."""
CORE_THIRD_PARTY = {"msgspec", "immutables"}
CORE_CIPHERS = {
    "cryptography.exceptions",
    "cryptography.hazmat.primitives.ciphers.aead",
    "nacl.bindings",
    "nacl.exceptions",
}
"""What ``seal`` alone may use beside: functions of keys and bytes."""
CORE_CERTIFICATES = {"cryptography"}
"""What ``access`` alone may: it reads certificates, as bytes."""


def sources(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_the_two_commands_set_all_up_alike():
    """CI runs the second block of the README, whole, in a bare clone. The first differs in two
    words: what it installs (less) and what it then runs."""
    demo, tests = shell_blocks()[:2]
    assert tests.replace("-e '.[dev]'", "-e .").replace("just test", "trex demo") == demo


def test_import_contracts_hold():
    linter = PYTHON.parent / "lint-imports"
    result = subprocess.run(
        [linter, "--no-cache", "--config", ROOT / "pyproject.toml"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", sources("trex_core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_core_imports_only_what_is_pure(path):
    allowed = CORE_STDLIB | CORE_THIRD_PARTY | {"trex_core"}
    strangers = {name for name in imported(path) if name.split(".")[0] not in allowed}
    if path.name == "seal.py":
        assert ".generate" not in path.read_text(), "chance comes from outside"
        strangers -= CORE_CIPHERS
    if path.name == "access.py":
        strangers -= CORE_CERTIFICATES
    assert not strangers, f"{path.relative_to(ROOT)} imports {strangers}"


@pytest.mark.parametrize(
    "path",
    [
        path
        for path in sources("trex_core", "voters", "listeners", "dashboard")
        if path.stat().st_size
    ],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_each_room_says_what_it_is_responsible_for(path):
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no module docstring"


def test_console_scripts_exist():
    scripts = PROJECT["project"]["scripts"]
    assert set(scripts) == {"trex", "trex-voter", "trex-listener", "trex-dash"}
    for name in scripts:
        help_text = subprocess.run(
            [PYTHON.parent / name, "--help"], capture_output=True, text=True, timeout=60
        )
        assert help_text.returncode == 0, f"{name} --help: {help_text.stderr}"
        assert help_text.stdout


def test_the_distribution_ships_each_of_our_packages():
    shipped = set(PROJECT["tool"]["setuptools"]["packages"])
    written = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in sources("trex_core", "voters", "listeners", "dashboard")
    }
    assert written == shipped


def test_each_dependency_has_its_line_of_reasons():
    reasons = (ROOT / "docs" / "dependencies.md").read_text()
    project = PROJECT["project"]
    for requirement in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        name = re.split(r"[^A-Za-z0-9-]", requirement)[0]
        assert f"**{name}**" in reasons, f"docs/dependencies.md does not say why {name}"


def test_each_verb_of_the_justfile_is_there():
    listed = subprocess.run(
        [PYTHON.parent / "just", "--justfile", ROOT / "justfile", "--summary"],
        capture_output=True, text=True,
    )  # fmt: skip
    assert {"demo", "test", "check", "fmt", "soak", "bench"} <= set(listed.stdout.split())


def test_ci_runs_the_readme_and_the_checks():
    script = (ROOT / ".ci" / "run").read_text()
    assert "readme 1)" in script and "readme 2)" in script and "just check" in script
    demo, tests = shell_blocks()[:2]
    assert demo.endswith(".venv/bin/trex demo") and len(demo.splitlines()) == 1
    assert tests.endswith(".venv/bin/just test") and len(tests.splitlines()) == 1


def test_links_between_documents_lead_somewhere():
    documents = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
    for document in documents:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_no_machine_and_no_registry_is_named():
    words = re.compile(
        r"(^|[^A-Za-z.])/(w[o]rk|r[o]ot|h[o]me)/|https?://[^ ]*/(s[i]mple|p[a]ckages)/"
    )
    kept = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in kept.stdout.splitlines():
        path = ROOT / name
        if (
            path.suffix in {".py", ".md", ".toml", ".json", ".yml", ".service", ""}
            and path.is_file()
        ):
            found = words.search(path.read_text(errors="replace"))
            assert not found, f"{name} names {found.group()!r}"
