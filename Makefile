# Two commands on a fresh machine with Python 3.10 to 3.14: `make quickstart` and `make test`.

SHELL  := /bin/bash
VENV   ?= .venv
PY     := $(VENV)/bin/python
# The first Python on the path that is new enough
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.10 python3.14; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && { echo "$$p"; break; }; done)
PIP    := $(PY) -m pip --disable-pip-version-check --quiet

.PHONY: quickstart test test-slurm test-long lint format docs bench clean help

help:
	@echo "make quickstart   set up, then search a network on a Balsam of your own"
	@echo "make test         set up, then run the tests"
	@echo "make test-slurm   set up, then the tests on a real Slurm of their own (root, Slurm's packages)"
	@echo "make test-long    those that take long: before a release"
	@echo "make lint         ruff and mypy --strict"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make bench        the benchmarks (QUICK=1 for a short look, PEER_PYTHON=... beside peers)"
	@echo "make clean        remove what these commands made, the results of quickstart too"

quickstart: $(VENV)/.installed-local
	@$(VENV)/bin/deephyper-balsam quickstart

# The unit and contract tests side by side, then the live ones on a Balsam for each of two processes
test: $(VENV)/.installed-test
	$(PY) -m pytest -m "not live and not slurm" -n 2 -q
	$(PY) -m pytest -m "live and not slurm and not long" -n 2 --dist loadfile --no-loadscope-reorder -q

# The site configs for Slurm on a real one, also on a cluster of several hosts; it says why when it cannot
test-slurm: $(VENV)/.installed-test
	$(PY) -m pytest -m "slurm and not slow and not long" -n 2 --dist loadfile -q

# What `make test` and `make test-slurm` leave out
test-long: $(VENV)/.installed-test
	$(PY) -m pytest -m "long or (slurm and slow)" -n 2 --dist loadfile -q

lint: $(VENV)/.installed-test $(VENV)/.installed-lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: $(VENV)/.installed-lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Any warning, such as a link that leads nowhere, is an error
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict --quiet

bench: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) -m tests.benchmarks $(if $(QUICK),--quick) $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))

$(PY):
	@test -n "$(PYTHON)" || { echo "Python 3.10 to 3.14 is needed, and none is on the path."; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-%: pyproject.toml | $(PY)
	@echo "Installing deephyper-balsam[$*] into $(VENV) ..."
	@$(PIP) install -e '.[$*]'
	@touch $@

clean:
	@if [ -x $(VENV)/bin/deephyper-balsam ] && [ -d quickstart/balsam ]; then \
		$(VENV)/bin/deephyper-balsam server down --dir quickstart/balsam; fi
	rm -rf $(VENV) quickstart build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
