# Commands that people and continuous integration share. `make demo` and `make test` need Python 3.11+ and git, nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-rest test-all lint docs bench bench-full bench-peers gpu-check clean
.DEFAULT_GOAL := test

KERNELS := $(wildcard src/fourbit/kernels/cpu/csrc/* src/fourbit/kernels/cpu/_build.py hatch_build.py)

$(STAMP): pyproject.toml constraints.txt $(KERNELS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[train,hardware,dev]'
	touch $@

# The main job: FP32 against three 4-bit recipes on real images, several seeds, then the report.
demo: $(STAMP)
	$(BIN)/fourbit compare --model digits_cnn --data digits --recipes fp32,int4-fwd,ibm2020,ibm2020-no-tpr \
		--seeds 0,1,2 --epochs 8 --out runs/demo
	$(BIN)/fourbit report runs/demo

# Two processes on two cores: threads that wait must not spin.
PYTEST := OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 2

test: $(STAMP)
	$(PYTEST) -m 'not slow'

# What takes longer: long trainings, sanitizers, huge tensors, emulated processors, wheels. Then, on processors with AVX-512, the
# layers once more with kernels and torch as on those without.
LAYERS := tests/kernels/test_layer_parity.py tests/nn tests/ops tests/chains tests/recipes tests/train
test-rest: $(STAMP)
	$(PYTEST) -m slow
	! grep -q avx512f /proc/cpuinfo || FOURBIT_CPU_ISA=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
		$(PYTEST) -m 'not slow' $(LAYERS)

test-all: test test-rest

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

# The documentation as a site, docs/_build/index.html. A link that leads nowhere is an error.
docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

# Results lie in benchmarks/results. BENCH_FLAGS="--microxcaling DIR --fp4-trainkit DIR" names clones of libraries to race.
BENCHMARKS := quantizers step growth cold_start
bench: $(STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python -m benchmarks.$$name --short $(BENCH_FLAGS); done

# Takes long, more so with other libraries; fills in docs/performance.md.
bench-full: $(STAMP)
	set -e; for name in $(BENCHMARKS); do \
		$(BIN)/python -m benchmarks.$$name --compile --out docs/results/performance $(BENCH_FLAGS); done
	$(BIN)/python -m benchmarks.kernel_parity --out docs/results/performance
	$(BIN)/python -m benchmarks.tables
	$(BIN)/python -m benchmarks.claims

bench-peers: $(STAMP)
	$(BIN)/python -m pip install --no-deps -r benchmarks/requirements.txt

# On a machine with an NVIDIA GPU, with the python that has torch: no installation, no network, under eight minutes.
gpu-check:
	PYTHONPATH=src $(PYTHON) benchmarks/gpu_check.py

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
