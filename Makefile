# make demo   train on five pictures, offline, and leave a report to look at
# make test   what must hold, in six to eight minutes on two cores      make test-all   all that needs no GPU, the laboratory too
# make lint / types / format / docs / bench / bench-quick / bench-gpu / wheel / plugins / clean
#
# The first call makes .venv and installs into it; later calls find it ready. Without an NVIDIA card, a CPU build of
# torch saves 3 GB on Linux: install it into .venv first, or point pip at an index that has one.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/ready
RUN ?= runs/demo
JOBS ?= 2

.PHONY: demo test test-all test-hosts lint format types docs bench bench-quick bench-gpu bench-throughput bench-ladder bench-fleet bench-svd pretrain-gpu plugins wheel clean venv
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/personalize train sample_data/subject --trigger zwx --class cat --preset pocket-subject --output $(RUN)

# Tiny models: one thread is fastest, and does not fight with a neighbour for the cores. Each of JOBS needs about 1.5 GB. Each takes
# whole files, and what another has left of its own at the end, so that what a file's tests share is made once.
PYTEST = OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test: $(READY)
	$(PYTEST)

test-all: $(READY)
	$(PYTEST) -m "not gpu"

# The extension under the gradio of each image UI, in environments of their own that the first call makes in .cache/hosts.
test-hosts: $(READY)
	$(PYTEST) -n 0 -m slow tests/webui_ext/test_pins.py

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
	$(BIN)/python -m tools.architecture > docs/architecture.md.tmp
	mv docs/architecture.md.tmp docs/architecture.md
	$(BIN)/python -m tools.kinds > docs/kinds.md.tmp
	mv docs/kinds.md.tmp docs/kinds.md

# How well the base obeys, and how well it personalizes; minutes to hours.
bench: $(READY)
	$(BIN)/python -m tools.pocket.proof base
	$(BIN)/python -m tools.pocket.proof personalization
	$(BIN)/python -m tools.bench algebra $(if $(KOHYA),--kohya $(KOHYA))

# What this tree made slower or faster than a commit: step, image, merge, start, fleet; under five minutes on an idle machine.
bench-quick: $(READY)
	$(BIN)/python -m tools.bench quick --against $(or $(AGAINST),HEAD)

# What needs a GPU: each at most ten minutes a call, and the same call again goes on. SCRIPT, SCRIPT_SDXL (diffusers') and KOHYA
# (a checkout of sd-scripts) are timed beside ours where they are given; TINY=1 shows on a CPU that all of it runs.
GPU = $(if $(TINY),--tiny --to runs/bench-tiny)

bench-gpu: bench-throughput bench-ladder bench-fleet bench-svd

bench-throughput: $(READY)
	$(BIN)/python -m tools.bench throughput $(GPU) $(if $(SCRIPT),--script $(SCRIPT)) \
		$(if $(SCRIPT_SDXL),--script-sdxl $(SCRIPT_SDXL)) $(if $(KOHYA),--kohya $(KOHYA))

bench-ladder: $(READY)
	$(BIN)/python -m tools.bench ladder $(GPU)

bench-fleet: $(READY)
	$(BIN)/python -m tools.bench fleet $(GPU) $(if $(TINY),--members 1 2 --modes eager --seconds 0)

bench-svd: $(READY)
	$(BIN)/python -m tools.bench svd $(GPU) $(if $(TINY),--family pocket --seconds 0)

# The embedded base from nothing, in WORK, at SIDE pixels: 1.5 million pictures of 150,000, drawn by all CPU cores. Finished, it lies
# in WORK/base; `python -m tools.pocket.proof base --base WORK/base` judges it.
WORK ?= runs/pretrain$(if $(TINY),-tiny)
SIDE ?= 128
PRETRAIN = $(if $(TINY),--device cpu --pool 130 --no-muon --textures 40 --vae-steps 1 --decoder-steps 2 --clip-steps 1 --unet-steps 1 \
	--unet-batch 16,\
	--device cuda --compile --pool 150000 --clip-steps 1200 --unet-steps 6000 --unet-batch 256)

pretrain-gpu: $(READY)
	$(BIN)/python -m tools.pocket.pretrain --work $(WORK) --to $(WORK)/base --size $(SIDE) --workers $(shell getconf _NPROCESSORS_ONLN) \
		--minutes 9 $(PRETRAIN)

# The plugins of image UIs (webui_ext): what they share is written once, in a1111/personalize_studio. Each has its wheel beside it, so that its
# folder can be copied alone.
plugins: wheel
	cp personalize/service/page/static/theme.js webui_ext/a1111/personalize_studio/
	rm -rf webui_ext/comfyui/personalize_studio && mkdir -p webui_ext/comfyui
	cp -R webui_ext/a1111/personalize_studio webui_ext/comfyui/personalize_studio
	find webui_ext -name __pycache__ -type d -prune -exec rm -rf {} +
	for one in a1111 comfyui; do rm -f webui_ext/$$one/personalize-*.whl; cp dist/personalize-*.whl webui_ext/$$one/; done

wheel:
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

venv: $(READY)

# The stamp is written last, so that an interrupted installation is taken up again.
$(READY): pyproject.toml constraints.txt
	@test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find personalize tools tests -name __pycache__ -type d -prune -exec rm -rf {} +
