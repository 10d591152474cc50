PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A hundred processes of the tests import torch: without caches of bytecode each compiles it anew, for as long again.
export PYTHONDONTWRITEBYTECODE =
CXX_FILES = $(shell git ls-files --cached --others --exclude-standard 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu')

.PHONY: demo test docs lint fuzz long kernels matrix aarch64 bench microbench studies gpu clean

# Train on real images with torch.optim and with fused_opt, side by side.
demo: $(VENV)/built
	$(BIN)/python examples/digits.py

# Everything that CI runs: the linters, the C++ tests under sanitizers (tests/backends/test_cpp.py), the doctests, the tests.
test: lint
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses=auto --maxprocesses=8 --dist=worksteal

# The documentation as pages, in build/site; a link that leads nowhere is an error. PICTURES=1 draws its pictures again.
docs: $(VENV)/built
	$(BIN)/python -m pip install --quiet --requirement requirements-docs.txt
	$(if $(PICTURES),$(BIN)/python docs/pictures.py)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "build/site/index.html"

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# Other random cases than those of `make test`, for SECONDS, until one fails; SEED=n repeats those of a seed that was printed.
SECONDS = 3600
fuzz: $(VENV)/installed
	@end=$$(($$(date +%s) + $(SECONDS))); seed=$(or $(SEED),$$(date +%s)); while [ $$(date +%s) -lt $$end ]; do \
	  echo "SEED=$$seed"; \
	  $(BIN)/python -m pytest tests/fuzz --ignore tests/fuzz/test_hostile_checkpoints.py \
	    --hypothesis-profile=fuzz --hypothesis-seed=$$seed || exit 1; \
	  seed=$$((seed + 1)); \
	done

# A million steps, 10^5 parameters, 10^4 groups, more than 2^31 elements: minutes, and 9 GB.
long: $(VENV)/installed
	$(BIN)/python -m pytest -m long

# The kernels for GPUs compiled for every generation, and their registers: `make test` looks at the GPUs of this machine, or
# at one generation where it has none. What is installed in place then serves all.
kernels: $(VENV)/installed
	CUDAARCHS="80-real;90-real;100" $(BIN)/python -m pip install --quiet --no-build-isolation --editable .
	$(BIN)/python -m pytest tests/backends/test_cuda.py -k compiled -s

# Other versions of Python and torch, each in a new environment: docs/versions.md. MATRIX="--python 3.12 --torch 2.13.0" takes one.
matrix:
	$(PYTHON) tests/matrix.py $(MATRIX)

# The C++ tests as compiled for 64-bit ARM, run by qemu: needs Debian's g++-aarch64-linux-gnu and qemu-user, a few minutes.
aarch64: $(VENV)/installed
	PATH="$(abspath $(BIN)):$$PATH" cmake -S . -B build/aarch64 -G Ninja -DCMAKE_SYSTEM_NAME=Linux \
	  -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ \
	  "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/aarch64-linux-gnu" -DFUSED_OPT_PYTHON=OFF -DFUSED_OPT_TESTS=ON
	$(BIN)/cmake --build build/aarch64
	$(BIN)/ctest --test-dir build/aarch64 --output-on-failure

# Every figure of docs/performance.md and docs/temp_balance.md, against torch.optim and the published ways; the host's time of docs/gpu.md.
bench: $(VENV)/installed
	$(BIN)/python -m pip install --quiet weightwatcher==0.7.7 bitsandbytes==0.50.2 torch-optimi==0.3.3
	$(BIN)/python -m benchmarks
	$(BIN)/python -m benchmarks.spectra
	$(BIN)/python -m benchmarks.communication
	$(BIN)/python -m benchmarks.host

# The same cases for one change: `make microbench SAVE=before`, the change, `make microbench`, which shows both. ONLY takes
# an expression of pytest's -k, COMPARE the number of an older run; all of them lie in .benchmarks/.
microbench: $(VENV)/installed
	$(BIN)/python -m pytest benchmarks/microbench.py -k "$(ONLY)" --benchmark-enable --benchmark-sort=name \
	  --benchmark-columns=median,iqr,rounds $(if $(SAVE),--benchmark-save="$(SAVE)",--benchmark-compare$(COMPARE:%=\=%))

# What the methods do on real data, with controls: goes on from the rows in studies/results. DATA=DIR has the data sets.
studies: $(VENV)/installed
	nice $(BIN)/python -m studies --jobs 2 $(if $(DATA),--data "$(DATA)")

# Build, test and time on the GPU of this machine, in PYTHON's environment as it is, without network: docs/gpu.md.
gpu:
	$(PYTHON) -m benchmarks.gpu

$(VENV)/installed: $(VENV)/built requirements-dev.txt requirements-docs.txt
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/built: requirements-demo.txt pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/*/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --requirement requirements-demo.txt
	$(BIN)/python -m pip install --quiet --no-compile --no-deps scikit-learn
	$(if $(shell nvidia-smi -L 2>/dev/null),,CUDAARCHS=$${CUDAARCHS:-90}) \
	  $(BIN)/python -m pip install --quiet $(if $(wildcard $(BIN)/cmake),--no-build-isolation) --editable .
	$(BIN)/python -m fused_opt
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info fused_opt/backends/_native*.so
