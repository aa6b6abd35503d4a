# Everything that a person or a machine runs. Set-up happens by itself, from constraints.txt.
PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.bitmosaic-installed
LAYOUT  := $(VENV)/.layout

.PHONY: FORCE setup demo test check format bench-quality bench-scale size clean

setup: $(STAMP)

# torch first and alone: the pin without a local version takes a CPU wheel where pip is shown one.
$(STAMP): pyproject.toml constraints.txt CMakeLists.txt src/bitmosaic_autoload.py src/bitmosaic.pth $(LAYOUT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python must be 3.11 or newer. Name one: make PYTHON=python3.11")'
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt scikit-build-core cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# An editable install maps each module to its file, so it is renewed when a file comes or goes.
$(LAYOUT): FORCE
	@mkdir -p $(VENV)
	@find src -name '*.py' | sort > $@.new
	@cmp -s $@.new $@ && rm $@.new || mv $@.new $@

demo: $(STAMP)
	$(BIN)/bitmosaic demo

# One thread a worker, unless given: the tests are many and small.
test: export OMP_NUM_THREADS ?= 1
test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench-quality: $(STAMP)
	$(BIN)/python benchmarks/quality.py --json benchmarks/results/quality.json $(ARGS)

bench-scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py --json benchmarks/results/scale.json $(ARGS)

# Lines of Python by folder, so that growth is seen.
size:
	@for folder in src tests tools benchmarks; do \
	    printf '%-12s' $$folder; \
	    git ls-files "$$folder/*.py" | xargs -r cat | wc -l; \
	done

clean:
	rm -rf $(VENV) build dist demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
