# One folder (.venv) holds everything; `make` alone lists the targets.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/
DATASET ?= openmoji
METHOD ?= seda
ARGS ?=

.PHONY: help setup demo test check docs extract train-head grid finetune demo-joint reproduce report bench lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: $(VENV)/.done ## make .venv with every pinned package (the first time takes minutes)

# The stamp is written last: an interrupted set-up starts again.
$(VENV)/.done: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "diffalign needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(RUN)python -m pip install --quiet --disable-pip-version-check uv
	$(RUN)uv pip install --quiet --python $(RUN)python -r requirements.lock
	$(RUN)uv pip install --quiet --python $(RUN)python --no-deps --editable .
	@touch $@

demo: setup ## the whole idea on real images and text, about 7 minutes; then at once
	$(RUN)diffalign demo $(ARGS)

test: setup ## the test suite
	$(RUN)python -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

check: setup ## ruff, formatting, types, import contracts
	$(RUN)ruff check .
	$(RUN)ruff format --check .
	$(RUN)pyright
	$(RUN)lint-imports

extract: setup ## stage 1: make extract DATASET=openmoji, or a dataset of your own that was prepared once with its --root
	$(RUN)diffalign prepare $(DATASET)
	$(RUN)diffalign extract $(DATASET) $(ARGS)

train-head: setup ## stage 2: make train-head DATASET=openmoji METHOD=seda
	$(RUN)diffalign train-head --dataset $(DATASET) --method $(METHOD) $(ARGS)

grid: setup ## every combination of some settings: make grid METHOD=seda ARGS="--grid T=900,1800"
	$(RUN)diffalign grid --dataset $(DATASET) --method $(METHOD) $(ARGS)

finetune: setup ## stage 3: make finetune INIT=artifacts/runs/openmoji/ema-.../seed0
	$(RUN)diffalign finetune --init $(INIT) $(ARGS)

demo-joint: setup ## two generations of a cache: heads, joint training, heads on the tuned encoder
	$(RUN)diffalign demo-joint $(ARGS)

reproduce: setup ## a table or figure of the papers: make reproduce ARTEFACT=marnet-table2 DATASET=openmoji
	$(RUN)diffalign reproduce $(ARTEFACT) --dataset $(DATASET) $(ARGS)

report: setup ## tables and pictures of all runs of DATASET
	$(RUN)diffalign report $(DATASET) $(ARGS)

bench: setup ## the tables of benchmarks/RESULTS.md, on a machine with nothing else to do: make bench ARGS="--parts stores"
	$(RUN)python benchmarks/results.py $(ARGS)

docs: setup ## the pictures, the API page, and the documentation site in build/site
	$(RUN)python docs/draw_rooms.py
	$(RUN)python docs/draw_concepts.py
	$(RUN)python docs/write_api.py
	NO_MKDOCS_2_WARNING=1 $(RUN)mkdocs build --strict --quiet --config-file docs/site/mkdocs.yml
	@echo build/site/index.html

lock: ## renew requirements.lock from pyproject.toml
	$(RUN)uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --no-emit-index-url --no-header --no-annotate --quiet --upgrade -o requirements.lock

clean: ## remove .venv and caches of the tools; artifacts stay
	rm -rf $(VENV) .pytest_cache .ruff_cache .import_linter_cache
