# Everything that a person or a machine runs. Set-up happens by itself, from constraints.txt.
PYTHON  ?= python3
WORKERS ?= 2
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.bitmosaic-installed
LAYOUT  := $(VENV)/.layout
NATIVE  := CMakeLists.txt $(wildcard csrc/*.cpp csrc/*.h)

.PHONY: FORCE setup demo test sanitize sanitized reliability audit emulate emulated check format hardware bench-quality bench-fgmp
.PHONY: bench-ranks bench-toga bench-toga-cost plot plot-energy energy-sweep bench-scale bench-scale-search bench-larger bench-cpu
.PHONY: kernels compiled bench-gpu bench-pruned size clean

setup: $(STAMP)

# torch first and alone: the pin without a local version takes a CPU wheel where pip is shown one.
$(STAMP): pyproject.toml constraints.txt $(NATIVE) src/bitmosaic_autoload.py src/bitmosaic.pth $(LAYOUT)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python must be 3.11 or newer. Name one: make PYTHON=python3.11")'
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt scikit-build-core nanobind cmake ninja
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

# The tests of compiled code and the fuzzed packing, on a build that stops at any access out of bounds and any
# undefined behaviour. Python itself is no such build, hence the libraries loaded before it.
SANITIZED := build/sanitize
sanitize: export OMP_NUM_THREADS ?= 1
sanitize: sanitized
	$(SANITIZED)/fuzz_pack $(FUZZ)
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	    ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=tests BITMOSAIC_BUILD=$(SANITIZED) \
	    $(BIN)/python -m pytest -p other_build -n $(WORKERS) tests/kernels tests/unit/test_kmeans.py \
	    tests/unit/test_scales.py $(ARGS)

sanitized: $(STAMP)
	$(BIN)/cmake -S . -B $(SANITIZED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DCMAKE_BUILD_TYPE=RelWithDebInfo -DBITMOSAIC_NATIVE=ON -DBITMOSAIC_SANITIZE=ON \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)"
	$(BIN)/cmake --build $(SANITIZED)

# Kills, full disks, hostile files and numbers, threads, traces: docs/reliability.md. Half an hour; QUICK=1: two minutes.
# A part by itself: make reliability ARGS='--parts kills'.
reliability: export OMP_NUM_THREADS ?= 1
reliability: $(STAMP)
ifdef QUICK
	PYTHONPATH=tests $(BIN)/python benchmarks/reliability.py --quick $(ARGS)
else
	$(MAKE) --no-print-directory sanitized
	PYTHONPATH=tests $(BIN)/python benchmarks/reliability.py --json benchmarks/results/reliability.json $(ARGS)
endif

# Known faults of what is installed, by PyPI's own database; needs that, and says so where it cannot be asked.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install -q pip-audit==2.10.1
	build/audit/bin/pip-audit --strict --no-deps --disable-pip --progress-spinner off -r constraints.txt

# The same tests on the AVX-512 kernels, which most machines cannot run: emulated by AVX2 and SIMDe. That the best
# level is named makes sure that it is there.
EMULATED := build/emulate
emulate: export OMP_NUM_THREADS ?= 1
emulate: $(STAMP)
	@if ! echo '#include <simde/x86/avx512.h>' | $(CXX) -E -x c++ - >/dev/null 2>&1; then \
	    echo "The AVX-512 kernels were not tested: the headers of SIMDe are missing (Debian: apt install libsimde-dev)."; \
	    echo "emulate: skipped"; \
	elif ! grep -qw avx2 /proc/cpuinfo; then \
	    echo "The AVX-512 kernels were not tested: this CPU has no AVX2 to emulate them by."; \
	    echo "emulate: skipped"; \
	else $(MAKE) --no-print-directory emulated; fi

emulated: $(STAMP)
	$(BIN)/cmake -S . -B $(EMULATED) -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	    -DBITMOSAIC_NATIVE=ON -DBITMOSAIC_EMULATE=ON \
	    -DPython_EXECUTABLE=$(abspath $(BIN))/python -Dnanobind_DIR="$$($(BIN)/python -m nanobind --cmake_dir)"
	$(BIN)/cmake --build $(EMULATED)
	PYTHONPATH=tests BITMOSAIC_BUILD=$(EMULATED) BITMOSAIC_CPU_LEVEL=avx512vbmi \
	    $(BIN)/python -m pytest -p other_build -n $(WORKERS) tests/kernels tests/unit/test_kmeans.py \
	    tests/unit/test_scales.py $(ARGS)

# The GPU's kernels where there is no GPU: numbers in Triton's interpreter; machine code for three architectures; and
# numbers of what was compiled, instruction by instruction, on a GPU that is emulated (docs/gpu.md).
kernels: export OMP_NUM_THREADS ?= 1
kernels: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) tests/gpu $(ARGS)
	$(MAKE) --no-print-directory compiled

compiled: export OMP_NUM_THREADS ?= 1
compiled: $(STAMP)
	$(BIN)/python tools/gpu_kernels.py --jobs $(WORKERS)
	for gpu in 80 90 100; do \
	    EMULATED_GPU=$$gpu $(BIN)/python -m pytest -n $(WORKERS) -m compiled tests/gpu || exit 1; \
	done

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

plot: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt matplotlib
	$(BIN)/python benchmarks/plot.py benchmarks/results/quality.json docs/quality.svg

plot-energy: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt matplotlib
	$(BIN)/python benchmarks/energy_plot.py benchmarks/results/fgmp.json docs/fgmp.svg

bench-fgmp: $(STAMP)
	$(BIN)/python benchmarks/fgmp.py --json benchmarks/results/fgmp.json $(ARGS)

bench-toga: $(STAMP)
	$(BIN)/python benchmarks/toga.py --json benchmarks/results/toga.json $(ARGS)

bench-toga-cost: $(STAMP)
	$(BIN)/python benchmarks/toga_cost.py --json benchmarks/results/toga_cost.json $(ARGS)

energy-sweep: $(STAMP)
	$(BIN)/python benchmarks/energy_sweep.py --json benchmarks/results/energy_sweep.json $(ARGS)

bench-scale: $(STAMP)
	$(BIN)/python benchmarks/scale.py --json benchmarks/results/scale.json $(ARGS)

# Some minutes; needs two cores that do nothing else.
bench-ranks: $(STAMP)
	$(BIN)/python benchmarks/ranks.py --json benchmarks/results/ranks.json $(ARGS)

# Under a minute.
bench-scale-search: $(STAMP)
	$(BIN)/python benchmarks/scale_search.py --json benchmarks/results/scale_search.json $(ARGS)

# An hour of both cores and 55 GB of disk; ARGS='--blocks 2 --threads 1': a quarter of an hour, 6 GB.
bench-larger: $(STAMP)
	$(BIN)/python benchmarks/larger_than_memory.py --json benchmarks/results/larger_than_memory.json $(ARGS)

# Some six minutes, and once five more to install the peers; QUICK=1: under a minute, without peers.
# Both halves run even where the first misses a figure. ARGS go to the first: --parts one_token.
bench-cpu: $(STAMP)
ifdef QUICK
	$(BIN)/python benchmarks/kernel.py --quick $(ARGS); kernel=$$?; \
	$(BIN)/python benchmarks/model.py --quick && exit $$kernel
else
	benchmarks/peers.sh $(BIN)/python
	$(BIN)/python benchmarks/kernel.py --json benchmarks/results/kernel.json $(ARGS); kernel=$$?; \
	$(BIN)/python benchmarks/model.py --json benchmarks/results/model.json && exit $$kernel
endif

# Some eight minutes; ARGS="--quick": under a minute, single matrices only.
bench-pruned: $(STAMP)
	$(BIN)/python benchmarks/pruned.py --json benchmarks/results/pruned.json $(ARGS)

# Needs an NVIDIA GPU; under eight minutes.
bench-gpu: $(STAMP)
	$(BIN)/python benchmarks/gpu.py --json benchmarks/results/gpu.json $(ARGS)

# The RTL of src/bitmosaic/hardware: vectors, gates, area, energy; some minutes.  Needs Debian packages, names those
# that are missing, and installs nothing.
hardware: export OMP_NUM_THREADS ?= 1
hardware: $(STAMP)
	$(BIN)/python tools/hardware.py --jobs $(WORKERS) $(ARGS)

# Lines of Python by folder, so that growth is seen.
size:
	@for folder in src tests tools benchmarks; do \
	    printf '%-12s' $$folder; \
	    git ls-files "$$folder/*.py" | xargs -r cat | wc -l; \
	done

clean:
	rm -rf $(VENV) build dist demo .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
