# `make demo` and `make test` do their own set-up on a fresh machine: virtual environment, pinned
# torch, build. The rest is for those who work on the project.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PYTHON_HERE := $(abspath $(BIN))/python
GXX     ?= g++
CLANGXX ?= clang++-19
SECONDS ?= 120
SOURCES := $(shell find csrc metal -type f) setup.py pyproject.toml

.PHONY: demo test check-mps link-mac check-cuda test-kernels asan ubsan tsan asan-extension test-avx512 test-arm \
  fuzz fuzz-emulated fuzz-accuracy soak compilers dist test-dist bench bench-cuda figures docs build check format clean

# Without a network the demo says so and trains a small model instead.
demo: build
	$(BIN)/python examples/demo.py

# Two processes, whose OpenMP threads sleep while they wait for the other.
test: build test-kernels
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile

# The Metal backend alone: emulated kernels, shader rules, the macOS build, and the suite on mps.
check-mps: build link-mac
	$(BIN)/python -m pytest tests/metal
	$(BIN)/python -m pytest tests -m mps

# The whole extension for macOS against the wheels that a user may have.
link-mac: $(VENV)/.installed
	$(BIN)/python tests/metal/mac_build.py 2.10.0 2.13.0 newest

# The CUDA backend: every kernel compiled for every architecture, launch plans, and, where there is a
# GPU, the suite on it. PYTHON is an interpreter whose torch is built for CUDA.
check-cuda:
	$(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest tests/cuda -m "not cuda"
	PYTHONPATH=. $(PYTHON) -m pytest tests -m cuda --ignore tests/metal
	for tool in memcheck racecheck initcheck synccheck; do for choice in CHOICE=own ONEBIT_CUDA_ARCHITECTURE=80; do \
	  echo $$tool $$choice; done; done | xargs -P 4 -L 1 sh -c 'env $$1 PYTHONPATH=. PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
	    compute-sanitizer --tool $$0 --error-exitcode 1 $(PYTHON) tests/cuda/every_kernel.py'

# What the emulated Metal does, for an NVIDIA GPU to repeat: tests/metal/nvidia/replay.py
# build/metal_trace, there.
metal-trace: build
	$(BIN)/python tests/metal/nvidia/gpu_trace.py build/metal_trace

# The CPU kernels alone, without torch: every table of this machine against the scalar one, buffers
# ending at pages that may not be touched. The same under the sanitizers, and for 64-bit ARM in an
# emulator (Debian: g++-aarch64-linux-gnu qemu-user).
KERNELS := $(wildcard csrc/cpu/kernels/*.cpp csrc/cpu/kernels/*/*.cpp tests/cpp/*.cpp)
KERNEL_FLAGS := -std=c++17 -Wall -Wextra -pthread
# AVX-512 is emulated where the machine has none: its tables are sanitised everywhere. Without
# optimisation, which would take minutes for the emulation.
EMULATE := $(if $(filter x86_64,$(shell uname -m)),$(if $(shell grep -m 1 -o avx512bw /proc/cpuinfo),,\
  -O0 -Wno-psabi -Wno-unused-parameter -include $(CURDIR)/tests/cpp/avx512_emulated.h))
# Nor do sanitizers optimise: g++ would take seven minutes for one, and three need three without.
ASAN := -O0 -g -fsanitize=address -fno-omit-frame-pointer
UBSAN := -O0 -g -fsanitize=undefined,float-cast-overflow -fno-sanitize-recover=all
TSAN := -O0 -g -fsanitize=thread

test-kernels: build/test_kernels
	build/test_kernels

build/test_kernels: $(KERNELS) $(wildcard csrc/cpu/kernels/*.h csrc/cpu/kernels/*/*.h csrc/*.h tests/cpp/*.h)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) -O1 $(KERNELS) -o $@

asan: $(KERNELS)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) $(ASAN) $(EMULATE) $(KERNELS) -o build/test_kernels_asan
	build/test_kernels_asan

ubsan: $(KERNELS)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) $(UBSAN) $(EMULATE) $(KERNELS) -o build/test_kernels_ubsan
	build/test_kernels_ubsan

tsan: $(KERNELS)
	mkdir -p build
	$(CXX) $(KERNEL_FLAGS) $(TSAN) $(EMULATE) $(KERNELS) -o build/test_kernels_tsan
	build/test_kernels_tsan

# The whole extension under AddressSanitizer: random calls and sequences of calls. It looks for
# what throws exceptions when it is loaded, before Python loads libstdc++.
asan-extension: $(VENV)/.installed
	CFLAGS="$(ASAN) $(EMULATE)" LDFLAGS="-fsanitize=address" \
	  $(BIN)/python setup.py --quiet build --build-temp build/asan --build-lib build/asan/lib
	cd tests && LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(CURDIR)/build/asan/lib $(PYTHON_HERE) $(FUZZ)

# The AVX-512 tables on machines without: their intrinsics lane by lane, tests/cpp/avx512_emulated.h.
EMULATED := $(wildcard csrc/cpu/kernels/avx512/*.cpp)
test-avx512: $(KERNELS)
	mkdir -p build
	for f in $(notdir $(EMULATED)); do $(CXX) $(KERNEL_FLAGS) -O0 -Wno-psabi -Wno-unused-parameter \
	  -include tests/cpp/avx512_emulated.h -c csrc/cpu/kernels/avx512/$$f -o build/$$f.emulated.o || exit 1; done
	$(CXX) $(KERNEL_FLAGS) -O1 $(filter-out $(EMULATED),$(KERNELS)) \
	  $(EMULATED:csrc/cpu/kernels/avx512/%=build/%.emulated.o) -o build/test_kernels_emulated
	build/test_kernels_emulated

# Structured activations and weights at random against the accuracy rule: COUNT products from SEED on.
COUNT ?= 20000
SEED  ?= 0
fuzz-accuracy: build
	$(BIN)/python tests/fuzz_accuracy.py --count $(COUNT) --seed $(SEED)

test-arm: $(KERNELS)
	mkdir -p build
	aarch64-linux-gnu-g++ $(KERNEL_FLAGS) -O2 $(KERNELS) -o build/test_kernels_arm
	qemu-aarch64 -L /usr/aarch64-linux-gnu build/test_kernels_arm

# Random calls and sequences of module calls, from case FIRST on, or, without it, a random one; and
# mixed calls from eight threads while memory must stay flat. A failure prints the command that
# repeats it.
FUZZ := -m fuzz all --seconds $(SECONDS) $(if $(FIRST),--first $(FIRST))
fuzz: build
	cd tests && $(PYTHON_HERE) $(FUZZ)

# The same with the AVX-512 tables emulated, and with them prepacked layers, where there are none.
fuzz-emulated: $(VENV)/.installed
	CFLAGS="$(EMULATE)" \
	  $(BIN)/python setup.py --quiet build --build-temp build/emulated --build-lib build/emulated/lib
	cd tests && PYTHONPATH=$(CURDIR)/build/emulated/lib $(PYTHON_HERE) $(FUZZ)

soak: build
	cd tests && $(PYTHON_HERE) soak.py --seconds $(SECONDS)

# Every file of csrc that needs no GPU's headers, by both compilers of Debian 12 and no warning, and
# the kernels of the second one against each other: 3 to 4 minutes on 2 cores.
STRICT := -std=c++20 -Wall -Wextra -Wpedantic -Werror -Icsrc/mps
TORCH_HEADERS = $(addprefix -isystem , $(shell $(BIN)/python -c \
  'from torch.utils.cpp_extension import include_paths as p; print(*p())'))

compilers: $(VENV)/.installed
	for compile in "$(GXX) -fopenmp -O1 -c -o /dev/null" "$(CLANGXX) -fsyntax-only"; do \
	  find csrc -name '*.cpp' -not -path csrc/cuda/launcher.cpp | xargs -t -P 2 -n 1 $$compile $(STRICT) $(TORCH_HEADERS) || exit 1; \
	done
	mkdir -p build
	$(CLANGXX) $(KERNEL_FLAGS) -Wpedantic -Werror -O2 $(KERNELS) -o build/test_kernels_clang
	build/test_kernels_clang

# An sdist, the wheel that is built from it, and what they hold; then the tests on that wheel in a
# fresh environment, away from the package's sources. DIST_TESTS=tests runs all of them.
DIST_TESTS ?= $(addprefix tests/test_, qmm.py quantize.py nn.py model.py packaging.py)

dist: $(VENV)/.installed
	rm -rf dist
	$(BIN)/python setup.py --quiet sdist
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist dist/*.tar.gz
	$(BIN)/python tests/check_dist.py dist

test-dist: dist
	rm -rf build/fresh && mkdir -p build/fresh/clone && $(PYTHON) -m venv build/fresh/venv
	build/fresh/venv/bin/python -m pip install --quiet --requirement requirements-dev.txt dist/*.whl
	git ls-files | grep -v '^torch_onebit/\|^setup.py\|test_architecture' | \
	  xargs cp --parents --target-directory build/fresh/clone
	cd build/fresh/clone && ../venv/bin/python -m pytest -q -m 'not mps' $(DIST_TESTS)

bench: build
	$(BIN)/python -m torch_onebit bench

# On an NVIDIA GPU, after check-cuda; PYTHON as there.
bench-cuda:
	PYTHONPATH=. $(PYTHON) benchmarks/bench_cuda.py
	PYTHONPATH=. $(PYTHON) benchmarks/bench_cuda_model.py

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
	$(BIN)/python -m mkdocs build --quiet

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
	git ls-files 'metal/*.metal' 'metal/*.h' 'csrc/cuda/kernels/*' | xargs -r -I{} sh -c \
	  '$(BIN)/clang-format --assume-filename=x.cpp < {} | cmp -s - {} || { echo "not formatted: {}"; exit 1; }'

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.mm' 'examples/*.cpp' 'tests/cpp/*' | xargs $(BIN)/clang-format -i
	for f in $$(git ls-files 'metal/*.metal' 'metal/*.h' 'csrc/cuda/kernels/*'); do \
	  $(BIN)/clang-format --assume-filename=x.cpp < $$f > $$f.new && mv $$f.new $$f; done

clean:
	rm -rf build torch_onebit/_C*.so $(VENV)/.built
