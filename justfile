# The verbs of TRex. Everything runs out of .venv; nothing needs activating.

# list the verbs
default:
    @{{just_executable()}} --justfile {{justfile()}} --list

# make .venv and install the project with its development tools
install:
    test -x .venv/bin/python || python3 -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'

# five voters, three members, one killed leader: see it work (under a minute)
demo *args:
    .venv/bin/trex demo {{args}}

# the whole test suite, or the tests named
test *args:
    .venv/bin/python -m pytest -n 4 --dist worksteal {{args}}

# what must hold before anything lands (the tests apart)
check:
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
    .venv/bin/lint-imports --no-cache
    .venv/bin/python -m pytest -q -p no:cacheprovider tests/test_house.py

# make the sources look as `check` wants them
fmt:
    .venv/bin/ruff check --fix-only --quiet .
    .venv/bin/ruff format .

# every branch of trex_core is taken by the tests of the core alone; those that cannot be say why
coverage:
    .venv/bin/coverage run -m pytest -q -p no:cacheprovider tests/core
    .venv/bin/coverage report

# long runs, until Ctrl-C: products, uvloop, model search, simulator, decoders, journals, attacks
soak seeds="10000" search_s="1800" cases="1000000" datagrams="1000000" attack_s="300" minutes="30":
    TREX_WIDE=1 .venv/bin/python -m pytest -q -s --timeout 3600 tests/core/test_exhaustive.py
    .venv/bin/python -m pytest -q -n 4 --loop uvloop tests/voters tests/listeners tests/dashboard
    .venv/bin/python -m tests.search --ballots 3 --slots 2 --cpu-s {{search_s}}
    .venv/bin/python -m tests.simulator --seeds {{seeds}}
    .venv/bin/python -m tests.fuzz --cases {{cases}}
    .venv/bin/python -m tests.adversary.journal
    .venv/bin/python -m tests.adversary --datagrams {{datagrams}}
    TREX_TEST_ATTACK_S={{attack_s}} .venv/bin/python -m pytest -q -s --timeout 3600 tests/e2e/test_adversary.py -k stole
    .venv/bin/python -m tests.linear --minutes {{minutes}}

# every mutant of the sources, each killed by the test named for it (some minutes); --only WORD
mutants *args:
    .venv/bin/python -m tests.mutants {{args}}

# commits a second and latency of five voters, as JSON lines
bench *args:
    .venv/bin/python benchmarks/commit.py {{args}}

# the pictures of README and docs, from those recordings
screenshots:
    .venv/bin/python -m tests.dashboard.screenshots

# record the runs of real clusters that the dashboard's tests and pictures are made of
recordings *names:
    .venv/bin/python -m tests.dashboard.record {{names}}
