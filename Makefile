# SPDX-License-Identifier: MIT
# A thin front. Everything lands in .venv and build; `make test` needs a C compiler and Python 3.11.

PYTHON ?= python3
VENV := .venv/bin
SOURCES := $(shell git ls-files include src python tools CMakeLists.txt pyproject.toml)

.PHONY: test apt quick demo bench docs format lint clean
.DELETE_ON_ERROR:

test:
	$(MAKE) -j2 apt .venv/dev.stamp
	$(VENV)/python tools/run_tests.py

apt: .venv/pyvenv.cfg
	sh tools/apt.sh

quick: .venv/dev.stamp
	$(VENV)/python tools/run_tests.py --quick

demo: .venv/package.stamp
	for demo in examples/*.py; do $(VENV)/python $$demo || exit 1; done

bench: .venv/package.stamp
	$(VENV)/cmake -S . -B build/release -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/ninja
	$(VENV)/cmake --build build/release
	$(VENV)/python bench/peak.py
	$(VENV)/python bench/cpu.py

docs: .venv/dev.stamp
	$(VENV)/python tools/check_docs.py

format: .venv/dev.stamp
	git ls-files -co --exclude-standard '*.c' '*.h' '*.cu' | xargs $(VENV)/clang-format -i
	$(VENV)/ruff format .
	$(VENV)/ruff check --fix .

lint: .venv/dev.stamp
	$(VENV)/python tools/run_tests.py --lint

clean:
	rm -rf build .venv

.venv/pyvenv.cfg:
	sh tools/apt.sh python3-venv
	$(PYTHON) -m venv .venv

.venv/dev.stamp: requirements-dev.txt .venv/pyvenv.cfg
	$(VENV)/pip install --quiet -r requirements-dev.txt
	touch $@

.venv/package.stamp: .venv/dev.stamp $(SOURCES)
	$(VENV)/pip install --quiet --no-build-isolation --no-deps \
		--config-settings=build-dir=build/package .
	touch $@
