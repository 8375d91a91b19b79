# Few verbs, each working on a fresh machine: it makes .venv and installs what it needs.
#   make up MODEL=path/or/hub-id ARGS='--prefill 2 --decode 2'
#   make bench ARGS='--json figures.json'
#   make bench-engine ARGS='--only overhead'
PYTHON ?= python3
BIN := .venv/bin
PROTOS := $(wildcard proto/pdmesh/v1/*.proto)
PROTOC = PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/python -m grpc_tools.protoc -I proto $(PROTOS)
# Messages, services and the types of both, below the directory $(1).
stubs_in = $(foreach out,python_out= grpc_python_out= mypy_out=quiet: mypy_grpc_out=quiet:,--$(out)$(1))
# Tests run many small models: one thread each leaves the cores to the processes.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help demo up test test-all check gen bench bench-engine bench-handoff bench-loading bench-parallel bench-precision bench-tiers bench-transfer

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 12

demo: .venv/.installed  ## a small model on a local cluster answers a few prompts
	@$(BIN)/pdmesh demo $(ARGS)

up: .venv/.installed  ## run a cluster here, with MODEL or the demo's model
	@model="$(MODEL)"; $(BIN)/pdmesh up "$${model:-$$($(BIN)/python -m pdmesh.cli.model_download)}" $(ARGS)

test: check  ## all checks and all but the slow tests
	$(PYTEST) -q -m 'not slow' $(ARGS)

test-all: check  ## the slow tests too
	$(PYTEST) -q $(ARGS)

check: .venv/.installed  ## format, lint, types, import rules, protos and their stubs
	$(BIN)/ruff format --check -q .
	$(BIN)/ruff check -q .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache
	$(BIN)/buf lint
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && $(PROTOC) $(call stubs_in,$$fresh) && \
	  diff -r -x __init__.py -x __pycache__ "$$fresh/pdmesh/v1" pdmesh/v1 || \
	  { echo 'pdmesh/v1 is not what proto/ generates: run `make gen` and commit it' >&2; exit 1; }

gen: .venv/.installed  ## regenerate pdmesh/v1 from proto/
	$(PROTOC) $(call stubs_in,.)

bench: .venv/.installed  ## measure the mesh beside the engine alone
	@$(BIN)/python -m bench.mesh $(ARGS)

bench-engine: .venv/.installed  ## measure the engine beside its peers and the machine's limits
	@$(BIN)/python -m bench.engine $(ARGS)

bench-handoff: .venv/.installed  ## measure what handing a prompt over costs, beside the prefill worker by itself
	@$(BIN)/python -m bench.handoff $(ARGS)

bench-loading: .venv/.installed  ## measure loading, and decoding with half of the weights on disk
	@$(BIN)/python -m bench.loading $(ARGS)

bench-parallel: .venv/.installed  ## measure what a model gains by being spread over ranks
	@$(BIN)/python -m bench.parallel $(ARGS)

bench-precision: .venv/.installed  ## measure size, speed and perplexity of weights in fewer bits
	@$(BIN)/python -m bench.precision $(ARGS)

bench-transfer: .venv/.installed  ## measure every KV transport beside memcpy, a bare socket and a bare gRPC stream
	@$(BIN)/python -m bench.transfer $(ARGS)

bench-tiers: .venv/.installed  ## measure KV brought from host memory, disk and a shared store beside computing it
	@$(BIN)/python -m bench.tiers $(ARGS)

# A new pyproject.toml means a new install; pip does nothing where all is there. This torch goes first and exactly so:
# pip then keeps the build that is installed, for CPU or CUDA, where a range could replace it.
.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pdmesh needs Python 3.11: make PYTHON=python3.11")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q torch==2.13.0
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@
