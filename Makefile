# `make reproduce` and `make test` need nothing but Python, make and git; `make help` lists the rest.
PYTHON  ?= python3
PROFILE ?= demo
BIN     := .venv/bin
# uv installs the same lock in a fraction of the time; without it, pip does. The lock names every package, so none is
# resolved; modules are compiled when they are first used
INSTALL := $(if $(shell command -v uv 2>/dev/null),uv pip install --python $(BIN)/python --no-deps --quiet,$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile)
LONGEST := $(patsubst %,tests/test_%.py,pipeline look_alike gpu_run site ray network distributed wheel)
FORKING := 01_processes 04_stages
NBDEV_TEST := TQDM_DISABLE=1 OMP_NUM_THREADS=1 LOKY_MAX_CPU_COUNT=1 $(BIN)/nbdev_test
# a fork that hangs is ended and shows where: at SIGABRT each process writes the lines that its threads are at
LIMIT := $(if $(shell command -v timeout 2>/dev/null),PYTHONFAULTHANDLER=1 timeout --signal=ABRT --kill-after=10 600 env)
export PATH := $(CURDIR)/$(BIN):$(PATH)
# hundreds of processes import the same modules: each is compiled once
unexport PYTHONDONTWRITEBYTECODE

.DELETE_ON_ERROR:
.PHONY: help setup reproduce bench test test-files test-notebooks test-types lab prepare docs release-check check-notebooks clean-reports

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/complete ## environment in .venv from requirements.lock, editable install, Jupyter kernel

.venv/complete: requirements.lock settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed: make PYTHON=python3.11 ..."; exit 1; }
	@echo "Setting up .venv: some minutes and about 7 GB (10 GB meanwhile), most of it torch"
	$(PYTHON) -m venv .venv
	$(INSTALL) -r requirements.lock
	$(INSTALL) --no-build-isolation -e .
	$(BIN)/python -m pip check
	$(BIN)/python -m ipykernel install --sys-prefix --name imaginet_nb --display-name imaginet_nb
	@touch $@

reproduce: setup ## every table and figure of the paper: make reproduce [PROFILE=demo] [SEEDS=3] [FORCE=1] [DRYRUN=1]
	$(BIN)/imaginet reproduce --profile $(PROFILE) $(if $(SEEDS),--seeds $(SEEDS)) $(if $(FORCE),--force) $(if $(DRYRUN),--dry-run)

bench: setup ## times of every stage beside the plain way, to reports/benchmark/; leave the machine alone meanwhile
	$(BIN)/python -c 'from imaginet_nb.apps.pipeline import run_notebook, write_html; write_html(run_notebook("p95_benchmark", "benchmark"), "reports/benchmark/index.html")'

test: setup check-notebooks ## notebooks clean and exported, ruff, mypy, notebook tests, tests/
	$(BIN)/ruff check .
	# all at once, so that no core waits; ends when all have ended, with an error if one has failed
	$(MAKE) --no-print-directory --jobs 3 test-files test-notebooks test-types

# each file by name, since pytest would sort those of a folder: the longest first. Three workers on two cores, since many tests wait. A worker that crashes ends the run, since what it had left would wait for ever
test-files:
	MAKEFLAGS= OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(LONGEST) $(filter-out $(LONGEST),$(wildcard tests/test_*.py)) -n 3 --max-worker-restart=0 --dist loadfile --no-loadscope-reorder

# at a lower priority, since the tests have limits of time; what they say is shown if one fails, so that pytest's summary stays the last word.
# Notebooks that fork get a process of their own: others may have left one in which a fork cannot train. What notebooks write goes with them
test-notebooks:
	@export TMPDIR=$$(mktemp -d); trap 'rm -rf "$$TMPDIR"' EXIT; \
	said=$$({ for name in $(FORKING); do $(LIMIT) $(NBDEV_TEST) --path nbs/03_training/$$name.ipynb || exit 1; done && \
	nice -n 3 env $(NBDEV_TEST) --n_workers 2 --skip_file_re '^[_.]|01_processes|04_stages'; } 2>&1) || \
	{ printf '%s\n' "$$said"; exit 1; }

test-types:
	@said=$$(nice -n 3 $(BIN)/mypy 2>&1) || { printf '%s\n' "$$said"; exit 1; }

# the same content before and after: what is committed is what the notebooks say
check-notebooks: setup
	@before=$$(git status --porcelain; git diff | git hash-object --stdin); $(BIN)/nbdev_clean; $(BIN)/nbdev_export; \
	after=$$(git status --porcelain; git diff | git hash-object --stdin); \
	[ "$$before" = "$$after" ] || { echo "nbdev_clean or nbdev_export changed files; commit them:"; git status --porcelain; exit 1; }

prepare: setup ## after editing notebooks or settings.ini: clean, export, render README.md, the map of reports and what holds addresses
	$(BIN)/nbdev_clean
	$(BIN)/nbdev_export
	$(BIN)/python tools/addresses.py
	$(BIN)/python tools/render_documents.py

release-check: setup ## whether this can be released: make release-check [CHECKS="tree versions links"]
	$(BIN)/python tools/release_check.py $(CHECKS)

docs: setup ## a site of all notebooks, the API and a search, read offline: _docs/site/index.html
	$(BIN)/python docs/pages.py _docs/source
	$(BIN)/python -m sphinx -c docs -q -W --keep-going -j auto _docs/source _docs/site
	@echo "Open _docs/site/index.html"

lab: setup ## JupyterLab, open at the first tutorial
	# no news, no look for a newer version, no list of extensions from elsewhere
	$(BIN)/jupyter lab --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
	  --LabApp.extension_manager=readonly --ServerApp.root_dir="$(CURDIR)" nbs/tutorials/00_imaginet_in_one_sitting.ipynb

clean-reports: ## remove what `make reproduce` wrote for PROFILE; data and environment stay
	@test -d reports/$(PROFILE) || { echo "no reports/$(PROFILE)"; exit 1; }
	rm -rf reports/$(PROFILE) .snakemake
