# `make demo` and `make test` do their own set-up on a fresh machine: virtual environment, pinned
# torch, build. The rest is for those who work on the project.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc metal -type f) setup.py pyproject.toml

.PHONY: demo test check-mps build check format clean

demo: build
	$(BIN)/python examples/demo.py

test: build
	$(BIN)/python -m pytest

# The Metal backend alone: emulated kernels, shader rules, the macOS build, and the suite on mps.
check-mps: build
	$(BIN)/python -m pytest tests/metal
	$(BIN)/python -m pytest tests -m mps

build: $(VENV)/.built

$(VENV)/.installed: requirements-dev.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.mm' | xargs $(BIN)/clang-format --dry-run --Werror
	git ls-files 'metal/*.metal' 'metal/*.h' | xargs -r -I{} sh -c \
	  '$(BIN)/clang-format --assume-filename=x.cpp < {} | cmp -s - {} || { echo "not formatted: {}"; exit 1; }'

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.mm' | xargs $(BIN)/clang-format -i
	for f in $$(git ls-files 'metal/*.metal' 'metal/*.h'); do \
	  $(BIN)/clang-format --assume-filename=x.cpp < $$f > $$f.new && mv $$f.new $$f; done

clean:
	rm -rf build torch_onebit/_C*.so $(VENV)/.built
