# make train   train HATRPO on VMAS; ALGO=itrpo|matrpo|hatrpo|happo|mappo|ippo|trpo, ARGS="seed=1 env=vmas/navigation" for other settings
# make evaluate RUN=<folder>   plays the trained policy of a run and films it; ARGS="--episodes 500 --checkpoint best"
# make test    the test suite, about 5 minutes on 2 cores
# make check   format, lint, docstring rules and types
# make docs    the documentation site; fails on a dead link and a public name without a page; make linkcheck asks for external links
# make bench   what update, memory and sampling cost, as ratios, about 10 minutes; ARGS="--quick --only update,textbook"
# make gpu-check   recipes, resumes, CUDA graphs, speed, memory, waits and tests on a GPU, a table, about 10 minutes; ARGS="--device cuda:1"
# make soak    an hour of training with kills, signals and faults, against the same training left in peace
# make mutations   deliberate mistakes in the numerics, each of which the suite must notice, about 10 minutes
# make coverage   the lines of torchrl_trpo/, objectives/ and recipes/ that the suite runs
# make results   trains, evaluates and compares all algorithms on all tasks, hours; stopped, it goes on where it was
# make tuning    searches the settings of each algorithm on each task, hours, as it was done for the comparison
# make sensitivity   measures what each setting of the trust region does, about an hour
# make dist    the source archive and the wheel in dist/, tried in an empty environment
# make test-slow   the learning results of the README, about 20 minutes on 2 cores
# Each creates the virtual environment $(VENV) if there is none, and installs into it what it needs and what is not there yet.

PYTHON ?= python3
VENV ?= .venv
ALGO ?= hatrpo
RUN ?=
ARGS ?=
BIN := $(VENV)/bin
SPHINX := $(BIN)/sphinx-build --quiet --fail-on-warning --keep-going --doctree-dir outputs/docs/doctrees
export OMP_NUM_THREADS ?= 1

.PHONY: help train evaluate test test-slow gpu-check soak mutations coverage check dist docs linkcheck bench results tuning sensitivity
.DEFAULT_GOAL := help

# The extras of pyproject.toml that each command needs. An empty file $(VENV)/.test says that those of test are installed.
EXTRAS_train := recipes,vmas
EXTRAS_pettingzoo := pettingzoo
EXTRAS_mamujoco := mamujoco
EXTRAS_gym := gym
EXTRAS_results := recipes,vmas,pettingzoo
EXTRAS_test := recipes,loggers,vmas,pettingzoo,mamujoco,gym,test
EXTRAS_check := recipes,vmas,check
EXTRAS_docs := recipes,vmas,docs
SIMULATORS := $(foreach name,pettingzoo mamujoco gym,$(if $(findstring env=$(name)/,$(ARGS)),$(name)))
SIMULATORS += $(if $(filter trpo,$(ALGO)),gym)
TRAIN := $(VENV)/.train $(patsubst %,$(VENV)/.%,$(sort $(SIMULATORS)))

help:
	@sed -n 's/^# //p; /^$$/q' $(firstword $(MAKEFILE_LIST))

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/python
	@echo "==> Installing what $* needs into $(VENV), in the tested versions of constraints.txt"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS_$*)]"
	@touch $@

train: $(TRAIN)
	@test -n "$(filter $(ALGO),trpo itrpo matrpo hatrpo happo mappo ippo)" || { echo "There is no algorithm ALGO=$(ALGO). Legal: trpo, itrpo, matrpo, hatrpo, happo, mappo, ippo"; exit 2; }
	@echo "==> Training $(ALGO) (other settings: make train ARGS=\"env=vmas/navigation seed=1\")"
	$(BIN)/python -m torchrl_trpo.recipes.$(ALGO) $(ARGS)
	@echo "==> Done. The lines above say where the learning curve, the film and the metrics are."

evaluate: $(VENV)/.train
	@test -n "$(RUN)" || { echo "Which run? make evaluate RUN=outputs/hatrpo/2026-01-31_12-00-00"; exit 2; }
	@echo "==> Evaluating the policy of $(RUN) (other settings: ARGS=\"--episodes 500 --checkpoint best --sampled\")"
	$(BIN)/python -m torchrl_trpo.evaluate "$(RUN)" $(ARGS)
	@echo "==> Done. The lines above say where the numbers and the film are."

test: $(VENV)/.test
	@echo "==> Running the test suite on 2 processes"
	$(BIN)/python -m pytest -n 2 --dist worksteal $(ARGS)
	@echo "==> And what runs on a device that is not the CPU, which is built with g++ and ninja"
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/device
	@echo "==> Done. One file: $(BIN)/python -m pytest tests/numerics/test_updater.py; learning runs: make test-slow"

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 -m slow -o faulthandler_timeout=3600 $(ARGS)

gpu-check: $(VENV)/.test
	@echo "==> Checking the project on a GPU; the table and what belongs to it go to outputs/gpu_check"
	$(BIN)/python -m tests.gpu_check $(ARGS)

soak: $(VENV)/.test
	@echo "==> Training for about an hour, twice at once: one is killed again and again, and must end as the other"
	$(BIN)/python -m tests.soak $(ARGS)

mutations: $(VENV)/.test
	@echo "==> Making mistakes in a copy of the code, which the tests must notice"
	$(BIN)/python -m tests.mutations $(ARGS)

coverage: $(VENV)/.test
	$(BIN)/python -m pytest -n 2 --cov --cov-report=term-missing:skip-covered $(ARGS)

check: $(VENV)/.check
	@echo "==> Format, lint and docstring rules"
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	@echo "==> Types, on the package as it is installed"
	rm -rf build $(VENV)/types
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/types .
	cd $(VENV)/types && $(abspath $(BIN))/mypy --config-file $(abspath pyproject.toml) -p torchrl_trpo
	@echo "==> Done."

dist: $(VENV)/.check
	@echo "==> Building the source archive, and the wheel from it"
	rm -rf dist outputs/dist
	$(BIN)/python -m build --outdir dist .
	@echo "==> Trying the wheel in an empty environment"
	$(PYTHON) -m venv outputs/dist/venv
	outputs/dist/venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[recipes,vmas]"
	cd outputs/dist && venv/bin/python -m torchrl_trpo.recipes.hatrpo train.total_frames=12000 output_dir=run
	cd outputs/dist && venv/bin/python -m torchrl_trpo.evaluate run --episodes 10
	@echo "==> Done: dist/"

results: $(VENV)/.results
	@echo "==> Comparing all algorithms on all tasks, 2 runs at a time; runs go to outputs/comparison, the report to docs/results"
	$(BIN)/python -m torchrl_trpo.recipes.studies.comparison $(ARGS)

tuning: $(VENV)/.results
	@echo "==> Searching settings, 2 at a time; runs go to outputs/tuning, the outcome to docs/results and recipes/config"
	$(BIN)/python -m torchrl_trpo.recipes.studies.tuning $(ARGS)

sensitivity: $(VENV)/.train
	@echo "==> Changing one setting at a time, 2 runs at a time; runs go to outputs/sensitivity, the report to docs/results"
	$(BIN)/python -m torchrl_trpo.recipes.studies.sensitivity $(ARGS)

docs: $(VENV)/.docs
	@echo "==> Building the site; the tutorial is executed when it has changed"
	$(SPHINX) -b html docs outputs/docs/html
	$(SPHINX) -b coverage docs outputs/docs/coverage
	@echo "==> Done: outputs/docs/html/index.html"

linkcheck: $(VENV)/.docs
	@echo "==> Asking for every external link of the site"
	$(SPHINX) -b linkcheck docs outputs/docs/linkcheck

bench: $(VENV)/.test
	@echo "==> What update, memory and sampling cost, one thread"
	$(BIN)/python -m tests.benchmarks $(ARGS)
