# One command a habit; `make` alone lists them. A target that needs the virtual
# environment makes it first, and again when pyproject.toml or constraints.txt change.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -qq --disable-pip-version-check
STAMP := $(VENV)/.installed
DOCS := $(VENV)/.installed-docs

# `make test TESTS=tests/passes` runs a part.
TESTS ?=

# Torch's own threads and Inductor's compile workers would fight with pytest's two workers.
PYTEST := OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1 FIXPASS_VERIFY=1 $(PY) -P -m pytest -n 2 --durations=15

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-full engines accept lint format type site check bench gpu pages \
	browser models-page sharding-page launches-page versions wheel wheel-test doctor clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "fixpass needs Python 3.11 or newer, and $(PYTHON) is not: make PYTHON=python3.12 ..." >&2; \
		exit 1; }
	@echo "[1/3] Making $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt pip
	@echo "[2/3] Installing torch: a minute, or what its download takes"
	@$(PIP) -c constraints.txt torch
	@echo "[3/3] Installing fixpass, triton and the development tools"
	@$(PIP) -c constraints.txt --build-constraint constraints.txt -e . --group dev
	@touch $@

$(DOCS): $(STAMP)
	@echo "Installing mkdocs"
	@$(PIP) -c constraints.txt --group docs
	@touch $@

demo: $(STAMP) ## Compile a small Qwen3 with fixpass; report, checks, times
	@$(PY) examples/demo.py

test: $(STAMP) ## Run the tests; TESTS=path runs a part
	$(PYTEST) -m "not full" $(TESTS)

test-full: $(STAMP) ## Run every test: each model through Inductor, 20,000 random modules
	FIXPASS_TEST_FULL=1 $(PYTEST) $(TESTS)

engines: ## Run the tests in real serving engines; ENGINES=vllm runs one
	tests/engines/run $(ENGINES)

# expecttest rewrites the file a test stands in and counts the lines it moved, so all
# tests of a file go to one worker.
accept: $(STAMP) ## Rewrite the snapshots to what the code does now; read the diff
	@status=0; EXPECTTEST_ACCEPT=1 $(PYTEST) --dist loadfile -m "not full" $(TESTS) || status=$$?; \
		find . -name '*.bak' -not -path './$(VENV)/*' -delete; \
		git --no-pager diff --stat -- tests examples; exit $$status

lint: $(STAMP) ## Check style and formatting
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

format: $(STAMP) ## Format, and fix what ruff can fix by itself
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

type: $(STAMP) ## Check types
	$(PY) -m mypy

# Strict: a link that leads nowhere is an error. The site names no script of another host, so that
# it works without a network. The variable silences a notice about the successor of the theme.
site: $(DOCS) ## Build the documentation: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build -q --strict
	@! grep -rl 'src="https\?://' --include=*.html build/site

check: lint type site test ## What CI runs: lint, type, site, test

bench: $(STAMP) ## Measure: tables, and JSON in benchmarks/results
	@$(PY) -m benchmarks

# PAGES=docs/passes.md runs one.
pages: $(STAMP) ## Run the examples of the documentation and write their output into the pages
	PYTHONPATH=.:tests $(PY) -P -W ignore -m helpers.pages $(PAGES)
	PYTHONPATH=.:tests $(PY) -P -m helpers.layout_pictures

browser: $(STAMP) ## Test the HTML report in the system's chromium, and make its pictures in docs/images
	@$(PIP) -c constraints.txt --group browser
	FIXPASS_TEST_FULL=1 $(PYTEST) tests/report/test_html_in_a_browser.py
	PYTHONPATH=.:tests $(PY) -m helpers.report_picture

models-page: $(STAMP) ## Compile the models with Inductor (half an hour); write docs/models.md
	PYTHONPATH=.:tests $(PY) -m helpers.models_page

launches-page: $(STAMP) ## Count the launches of norms in the models (ten minutes); write docs/launches.md
	PYTHONPATH=.:tests $(PY) -P -m helpers.launches_page

sharding-page: $(STAMP) ## Write the table of units in docs/checkpoints.md
	PYTHONPATH=.:tests $(PY) -m helpers.sharding_page

# VERSIONS="2.11 2.14" runs two of them.
versions: ## Run the tests with each torch of constraints-*.txt (an hour each); write docs/versions.md
	PYTHONPATH=tests $(PYTHON) -m helpers.versions_page $(VERSIONS)

# No target before it: a machine with a GPU may have no network. It takes the environment of
# this checkout where there is one, else the machine's Python with torch and triton.
gpu: ## Check and measure on a GPU in nine minutes; GPU="--device cpu" is a dry run
	@PYTHONPATH=$(CURDIR) $(if $(wildcard $(PY)),$(PY),$(PYTHON)) -P -m benchmarks gpu $(GPU)

# A stale build/ would put deleted modules into the wheel; building it from the sdist
# shows that the sdist is complete.
wheel: $(STAMP) ## Build the sdist, and the wheel from it, into dist/
	rm -rf build dist
	PIP_CONSTRAINT=$(CURDIR)/constraints.txt $(PY) -m build

# -o pythonpath leaves the checkout out, so `import fixpass` finds the installed wheel.
wheel-test: wheel ## Install the wheel in an empty environment and test imports and catalogue
	rm -rf build/empty
	$(PYTHON) -m venv build/empty
	build/empty/bin/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
		torch dist/*.whl expecttest pytest
	cd tests && ../build/empty/bin/python -P -m pytest -q -c ../pyproject.toml \
		-o pythonpath=$(CURDIR)/tests test_package.py test_catalogue.py

doctor: $(STAMP) ## Say what this machine has
	@$(PY) -c 'import platform, torch; print("python", platform.python_version()); print("torch ", torch.__version__, "on", "cuda" if torch.cuda.is_available() else "cpu")'
	@$(PY) -m pip check
	@$${CXX:-g++} --version 2>/dev/null | head -n 1 | grep . \
		|| { echo "No C++ compiler: Inductor needs one on CPU. Install g++, or set CXX." >&2; exit 1; }

clean: ## Remove the virtual environment, builds and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.bak' -type f -delete
