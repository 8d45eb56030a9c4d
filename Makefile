# `make demo` and `make test` do their own set-up on a fresh machine: virtual environment, pinned
# torch, build. The rest is for those who work on the project.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
SOURCES := $(shell find csrc metal -type f) setup.py pyproject.toml

.PHONY: demo test check-mps test-kernels asan ubsan tsan test-arm bench figures docs build check format clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# Without a network the demo says so and trains a small model instead.
$(VENV)/.demo: $(VENV)/.built examples/requirements.txt
	@echo "set-up: what the demo needs beside torch"
	@$(BIN)/python -m pip install --quiet --requirement examples/requirements.txt && touch $@ \
	  || echo "not installed"

# Two processes, whose OpenMP threads sleep while they wait for the other.
test: build test-kernels
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

# The Metal backend alone: emulated kernels, shader rules, the macOS build, and the suite on mps.
check-mps: build
	$(BIN)/python -m pytest tests/metal
	$(BIN)/python -m pytest tests -m mps

# The CPU kernels alone, without torch: every table of this machine against the scalar one, buffers
# ending at pages that may not be touched. The same under the sanitizers, and for 64-bit ARM in an
# emulator (Debian: g++-aarch64-linux-gnu qemu-user).
KERNELS := $(wildcard csrc/cpu/kernels*.cpp csrc/cpu/levels_*.cpp) csrc/cpu/level_kernels.cpp \
  csrc/cpu/scratch.cpp $(wildcard tests/cpp/*.cpp)
KERNEL_FLAGS := -std=c++17 -Wall -Wextra -pthread
ASAN := -O1 -g -fsanitize=address -fno-omit-frame-pointer
UBSAN := -O1 -g -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all
TSAN := -O1 -g -fsanitize=thread

test-kernels: build/test_kernels
	build/test_kernels

build/test_kernels: $(KERNELS) $(wildcard csrc/cpu/*.h csrc/*.h tests/cpp/*.h)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) -O1 $(KERNELS) -o $@

asan: $(KERNELS)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) $(ASAN) $(KERNELS) -o build/test_kernels_asan
	build/test_kernels_asan

ubsan: $(KERNELS)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) $(UBSAN) $(KERNELS) -o build/test_kernels_ubsan
	build/test_kernels_ubsan

tsan: $(KERNELS)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) $(TSAN) $(KERNELS) -o build/test_kernels_tsan
	build/test_kernels_tsan

test-arm: $(KERNELS)
	mkdir -p build
	aarch64-linux-gnu-g++ $(KERNEL_FLAGS) -O2 $(KERNELS) -o build/test_kernels_arm
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/test_kernels_arm

bench: build
	$(BIN)/python -m torch_onebit bench

# The figures in the README and docs/, between their marks. Training is only rendered, from the JSON in
# benchmarks/results: to train again, an hour, first run bench_training.py without --report.
figures: build
	$(BIN)/python benchmarks/bench_training.py --protocol short --report
	$(BIN)/python benchmarks/bench_training.py --protocol long --report
	$(BIN)/python benchmarks/bench_quantizers.py --write
	$(BIN)/python benchmarks/bench_quantizers.py --solver --write
	$(BIN)/python benchmarks/bench_cpu.py

docs: build
	$(BIN)/python docs/make_api.py

build: $(VENV)/.built

$(VENV)/.installed: requirements-dev.txt
	@echo "set-up: a virtual environment with torch and tools in $(VENV), about a minute"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --requirement requirements-dev.txt
	@touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	@echo "set-up: compiling the operators, 2 to 3 minutes on 2 cores"
	@$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

check: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.mm' 'examples/*.cpp' 'tests/cpp/*' | xargs $(BIN)/clang-format --dry-run --Werror
	git ls-files 'metal/*.metal' 'metal/*.h' | xargs -r -I{} sh -c \
	  '$(BIN)/clang-format --assume-filename=x.cpp < {} | cmp -s - {} || { echo "not formatted: {}"; exit 1; }'

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.mm' 'examples/*.cpp' 'tests/cpp/*' | xargs $(BIN)/clang-format -i
	for f in $$(git ls-files 'metal/*.metal' 'metal/*.h'); do \
	  $(BIN)/clang-format --assume-filename=x.cpp < $$f > $$f.new && mv $$f.new $$f; done

clean:
	rm -rf build torch_onebit/_C*.so $(VENV)/.built
