# Every target sets up what it needs. On a fresh Debian 12 machine the first run installs and builds everything
# (needs root; installs from apt, pip and Go modules).
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
UV := $(PY) -m uv pip install -q --no-cache --compile-bytecode -c constraints.txt
CLUSTER := PYTHONPATH=tests/cluster $(PY) -m ivft_cluster
DEMO := PYTHONPATH=tests/cluster $(PY) -m ivft_demo
CRD_COPIES := crds/internvlfinetunes.yaml charts/internvl-operator/files/internvlfinetunes.yaml
POLICY := charts/internvl-operator/files/policy.yaml
DASHBOARDS := charts/internvl-operator/files/dashboards
STAMP := $(VENV)/.installed
# Bytecode is kept, whatever the shell says: a trainer's process would compile for seconds at each start.
export PYTHONDONTWRITEBYTECODE :=
STARTED := $(shell date +%s)

# The oldest supported Kubernetes. tests/cluster/ivft_cluster/releases.py has all releases; the newest is the default.
# `make test KUBERNETES=1.36` picks another: make exports a variable of its command line or environment by itself.
FLOOR := 1.34
# The operator's tests that depend on the API server's version; the others differ in the operator alone.
FLOOR_TESTS := $(patsubst %,tests/controller/test_%.py,applier_server disruptions_server gang_server operator \
	refused_status_server rights_server)

.PHONY: help demo demo-down test test-unit test-cluster test-servers test-training test-floor chaos soak lint typecheck generate verify fuzz bench bench-scale bench-real-size test-gpu bench-gpu images lock krew release docs docs-serve setup clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): constraints.txt pyproject.toml crds/pyproject.toml operator/pyproject.toml trainer_image/pyproject.toml
	# Debian's Python comes without venv
	$(PYTHON) -m venv $(VENV) || (apt-get update -qq && apt-get install -y -qq python3-venv && $(PYTHON) -m venv $(VENV))
	$(PY) -m pip install -q -c constraints.txt --upgrade pip uv
	# torch first and by its exact version, so that other requirements do not replace the chosen build
	$(UV) torch
	$(UV) --group dev -e crds -e operator -e 'trainer_image[eval,mlflow,wandb]'
	touch $@

setup: $(STAMP) ## set up virtualenv, Debian packages, Go programs (Kubernetes, etcd, containerd, Kueue) and images
	$(CLUSTER) setup

demo: $(STAMP) ## fine-tune a tiny model on a real two-node cluster (KEEP=1 leaves the cluster up; EXAMPLE=name)
	$(DEMO) up --started $(STARTED) $(if $(KEEP),--keep) $(if $(EXAMPLE),--example $(EXAMPLE))

demo-down: $(STAMP) ## remove every trace of the demo
	$(DEMO) down

test: setup verify ## run every test: unit, contract, integration, end to end (KUBERNETES=1.36 selects a release)
	$(MAKE) --no-print-directory test-unit
	# pods mostly wait, training mostly computes: together they take little longer than the longest
	$(MAKE) --no-print-directory -j3 -k test-cluster test-servers test-training

test-cluster: setup ## the tests that need the two-node cluster
	set -o pipefail; $(PY) -m pytest --instafail -m '(integration or e2e) and not soak' tests/cluster tests/e2e \
		| sed -u 's/^/cluster  | /'

test-servers: setup ## the tests that need an API server or an S3 server, without nodes
	set -o pipefail; nice -n 4 $(PY) -m pytest --instafail -m 'integration and not e2e and not soak' --ignore tests/cluster \
		| sed -u 's/^/servers  | /'

test-training: $(STAMP) ## the slow tests that need neither: training, models, processes
	set -o pipefail; nice -n 6 $(PY) -m pytest --instafail -m 'slow and not integration and not e2e and not gpu and not soak' \
		| sed -u 's/^/training | /'

test-floor: $(STAMP) ## run the API server's tests on the oldest supported Kubernetes
	KUBERNETES=$(FLOOR) $(CLUSTER) setup --control-plane
	KUBERNETES=$(FLOOR) $(PY) -m pytest -m 'integration and not e2e' tests/api tests/contract/test_chart_install.py $(FLOOR_TESTS)

test-unit: $(STAMP) ## the tests that need neither root nor a server, and are not slow: a minute
	$(PY) -m pytest -n 2 -m 'not integration and not e2e and not slow and not gpu'

chaos: setup ## break nodes, servers and storage under eight runs; docs/chaos.md (SEED=7 RUNS=40 for another plan)
	CHAOS_SEED=$(SEED) CHAOS_RUNS=$(or $(RUNS),8) $(PY) -m pytest -s tests/e2e/test_under_chaos.py

soak: ## run what is too long for every change: tests marked soak, the oldest Kubernetes, chaos with twenty runs
	$(PY) -m pytest -m soak
	$(MAKE) --no-print-directory test-floor
	$(MAKE) --no-print-directory chaos RUNS=20

lint: $(STAMP) ## check with ruff and the import contracts
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/lint-imports

typecheck: $(STAMP) ## check types with mypy (strict)
	$(VENV)/bin/mypy crds/src operator/src trainer_image/src

generate: $(STAMP) ## write the generated files
	$(PY) -m internvl_api.crd $(CRD_COPIES)
	$(PY) -m internvl_api.admission_policy $(POLICY)
	$(PY) -m internvl_api.memory.tables docs/memory.md
	$(PY) -m internvl_api.reference docs/reference.md
	$(PY) -m internvl_api.memory.real_size docs/real-size.md docs/network.md
	$(PY) tests/tools/import_picture.py docs/images/imports.svg
	$(PY) operator/dashboards/build.py $(DASHBOARDS)
	$(PY) tests/tools/chart_readme.py charts/internvl-operator
	$(PY) tests/tools/kustomize_base.py config

verify: lint typecheck ## check lint, types, import contracts and generated files
	$(PY) -m internvl_api.crd --check $(CRD_COPIES)
	$(PY) -m internvl_api.admission_policy --check $(POLICY)
	$(PY) -m internvl_api.memory.tables --check docs/memory.md
	$(PY) -m internvl_api.reference --check docs/reference.md
	$(PY) -m internvl_api.memory.real_size --check docs/real-size.md docs/network.md
	$(PY) tests/tools/import_picture.py --check docs/images/imports.svg
	$(PY) operator/dashboards/build.py --check $(DASHBOARDS)
	$(PY) tests/tools/chart_readme.py --check charts/internvl-operator
	$(PY) tests/tools/kustomize_base.py --check config

fuzz: $(STAMP) ## random input for the operator and the trainer, many more than make test has (FUZZ_EXAMPLES, FUZZ_SECONDS)
	FUZZ_TIMING=1 FUZZ_EXAMPLES=$(or $(FUZZ_EXAMPLES),20000) $(PY) -m pytest -q -s tests/controller/test_fuzz.py --timeout 7200
	FUZZ_TIMING=1 FUZZ_SECONDS=$(or $(FUZZ_SECONDS),600) $(PY) -m pytest -q tests/trainer/fuzz --timeout 7200

bench: setup ## measure time to first pod, merge memory and trainer throughput
	$(PY) -m pytest -q -s tests/bench --ignore tests/bench/bench_scale.py -o 'python_files=bench_*.py' -o 'python_functions=bench_*' --timeout 3600

bench-scale: setup ## measure thousands of runs; docs/scale.md (an hour; SCALE_JOBS=100 and so on make it smaller)
	$(PY) -m pytest -q -s tests/bench/bench_scale.py -o 'python_files=bench_*.py' -o 'python_functions=bench_*' --timeout 7200

bench-real-size: $(STAMP) ## compute what every recipe needs, and how long it takes; docs/real-size.md
	$(PY) -m internvl_api.memory.real_size docs/real-size.md docs/network.md
	sed -n '/: generated -->/,/<!-- end of/p' docs/real-size.md

test-gpu: $(STAMP) ## the tests that need a GPU; skipped without one
	$(PY) -m pytest -m gpu tests/gpu

bench-gpu: $(STAMP) ## measure a GPU for nine minutes at most; call it until nothing is left; docs/gpu.md (PARTS='2b-lora')
	PYTHONPATH=tests:tests/cluster $(PY) -m gpu $(PARTS)

images: $(STAMP) ## build both images; print size and time (VARIANT=cu12 EXTRAS=qlora REGISTRY=… BUILDER=podman)
	$(PY) tests/tools/build_images.py --variant $(or $(VARIANT),cu13) --extras '$(EXTRAS)' --registry '$(REGISTRY)'

lock: $(STAMP) ## write the hashes of the trainer image's packages, after constraints.txt has changed
	$(PY) tests/tools/lock_requirements.py

krew: $(STAMP) ## pack kubectl ivft for krew into build/krew (URL=https://… where the archive will be)
	$(PY) operator/krew/pack.py build/krew --url $(or $(URL),https://example.org/internvl-operator)

release: $(STAMP) ## write the files of a release to dist/ (VERSION=0.1.0 URL=https://… where they will be)
	$(PY) tests/tools/build_release.py '$(VERSION)' $(if $(URL),--url '$(URL)')

docs: $(STAMP) ## build the documentation as a site into build/site, with every link checked (REPO_URL=https://…)
	$(VENV)/bin/mkdocs build --strict

docs-serve: $(STAMP) ## show the site on http://127.0.0.1:8000 while you write
	$(VENV)/bin/mkdocs serve

clean: ## remove the virtualenv and build output (caches outside the checkout stay)
	rm -rf $(VENV) build dist demo-output .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
