# make demo   train on five pictures, offline, and leave a report to look at
# make test   run the tests          make lint / types / format / docs / bench / wheel / clean
#
# The first call makes .venv and installs into it; later calls find it ready. Without an NVIDIA card, a CPU build of
# torch saves 3 GB on Linux: install it into .venv first, or point pip at an index that has one.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready
RUN ?= runs/demo

.PHONY: demo test test-all lint format types docs bench wheel clean venv
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/personalize train sample_data/subject --trigger zwx --class cat --preset pocket-subject --output $(RUN)

# Tiny models: one thread is fastest, and does not fight with a neighbour for the cores.
test: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest

test-all: $(READY)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -m "not gpu"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python -m personalize.recipe.reference > docs/recipe.md.tmp
	mv docs/recipe.md.tmp docs/recipe.md

# How well the base obeys, and how well it personalizes; minutes to hours.
bench: $(READY)
	$(BIN)/python -m personalize.pocket.proof base
	$(BIN)/python -m personalize.pocket.proof personalization
	$(BIN)/python -m personalize.bench algebra $(if $(KOHYA),--kohya $(KOHYA))

wheel: $(READY)
	$(BIN)/pip wheel --quiet --no-deps --wheel-dir dist .

venv: $(READY)

# The stamp is written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find personalize tests -name __pycache__ -type d -prune -exec rm -rf {} +
