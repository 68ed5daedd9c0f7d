# Everything runs from the virtual environment in .venv, on the package as installed from this tree.
PYTHON ?= python3
SUITE ?= quick
BIN := .venv/bin
INSTALLED := .venv/.installed-from-this-tree

# Directories are listed too, so that removing a file also counts as a change.
SOURCES := pyproject.toml CMakeLists.txt constraints.txt README.md \
	$(shell find src csrc -name __pycache__ -prune -o -print)

# The first installation shows pip's progress, since it downloads for minutes; later ones are quiet.
PIP_INSTALL = $(BIN)/python -m pip install $(if $(wildcard $(INSTALLED)),-q) -c constraints.txt

# Two test processes with one torch thread each: the tests are many and small.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help install demo test fast check lint sanitize sanitize-threads bench docs kernels gpu-check wheel clean

help:
	@echo "make install   a virtual environment in .venv with tilewise and its tools"
	@echo "make demo      compare, train and generate; results in out/"
	@echo "make test      all tests"
	@echo "make fast      the tests that are not marked slow"
	@echo "make check     format, lint, types, sizes, then all tests"
	@echo "make sanitize  the native library's tests under AddressSanitizer and UBSan"
	@echo "make sanitize-threads  its kernels under ThreadSanitizer"
	@echo "make bench     a benchmark grid (SUITE=quick); results in out/bench"
	@echo "make docs      the documentation as a site in out/site, any warning an error; Python >= 3.11"
	@echo "make kernels   compile every Triton kernel for every GPU, without one; docs/kernels.md"
	@echo "make gpu-check on a machine with a GPU: tests, races, times (ARGS='--part cases')"
	@echo "make wheel     a wheel in dist/"
	@echo "make clean     remove build products and results; keeps .venv"

install: $(INSTALLED)

$(BIN)/python:
	$(PYTHON) -m venv .venv

# torch first and alone: it is by far the largest download, and one that is already in .venv (a CPU
# build, for instance) is kept if its version fits.
$(INSTALLED): $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) ".[test,dev]"
	@touch $@

demo: install
	@mkdir -p out
	$(BIN)/tilewise compare --out out/compare.png
	$(BIN)/tilewise train --out out/train --steps 400
	$(BIN)/tilewise generate out/train

# The Triton tests interpret their kernels, which a process has to decide before it imports Triton; with
# them go the tests that every backend takes. Both runs take place, whatever the first says.
SHARED := tests/test_api.py tests/test_ops.py
fast: MARKED := -m "not slow"
test fast: install
	@status=0; \
	TRITON_INTERPRET=1 $(PYTEST) $(MARKED) -k triton tests/backends/triton $(SHARED) || status=1; \
	$(PYTEST) $(MARKED) --ignore=tests/backends/triton || status=1; \
	exit $$status

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python tools/check_sizes.py

check: lint test

# Python itself is not instrumented, so the sanitizer's runtime is preloaded; PyTorch's own leaks at exit
# are not ours to report.
sanitize: install
	cmake -S . -B build/sanitize -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_CXX_FLAGS="-g1 -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer"
	cmake --build build/sanitize --parallel 2
	TILEWISE_LIBRARY=$(CURDIR)/build/sanitize/libtilewise.so ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
		$(PYTEST) tests/backends tests/test_api.py -k native -m "not slow" \
		--ignore=tests/backends/triton --ignore=tests/backends/native/test_ports.py

# The kernels alone, in a program whose threads are its own: neither Python nor PyTorch is instrumented.
sanitize-threads: install
	cmake -S . -B build/sanitize-threads -DTILEWISE_CHECK=ON -DCMAKE_BUILD_TYPE=Release \
		-DCMAKE_CXX_FLAGS="-g1 -fsanitize=thread"
	cmake --build build/sanitize-threads --parallel 2 --target tilewise-check
	TILEWISE_CHECK=$(CURDIR)/build/sanitize-threads/tilewise-check $(PYTEST) tests/backends/native/test_races.py

bench: install
	@mkdir -p out/bench
	$(BIN)/tilewise bench --suite $(SUITE) --out out/bench

docs: install
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "out/site/index.html; for the search: $(BIN)/python -m http.server --directory out/site"

kernels: install
	$(BIN)/tilewise kernels --markdown docs/kernels.md

# Straight from the tree, with the Python that holds the GPU's PyTorch: such machines are often bare.
gpu-check:
	PYTHONPATH=src $(PYTHON) tools/gpu_check.py $(ARGS)

# On Linux auditwheel turns the plain linux tag into the manylinux tag that the library really meets;
# a pure wheel (no compiler) has nothing to repair.
wheel: install
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist
	@for wheel in dist/*-linux_*.whl; do \
		if [ -e "$$wheel" ] && [ -x $(BIN)/auditwheel ]; then \
			PATH="$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist "$$wheel" || exit 1; \
			rm "$$wheel"; \
		fi; \
	done
	@ls dist

clean:
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name .venv -prune -o -name __pycache__ -prune -exec rm -rf {} +
