# One way to run each thing. Everything stays inside the checkout: .venv (made here), .cache, var, wheelhouse, dist.
#
#   PYTHON=python3.12   which Python makes .venv (default: the first of python3, python3.13, python3.12, python3.11 that fits)
#   OFFLINE=1           install from ./wheelhouse alone
#   UPGRADE=1           `make lock` takes newer releases instead of keeping what is pinned
#   ARGS="-k revoke"    passed on by test, test-all, conformance, demo, up, bench and load
#   REDIS=redis://...   the server that `make conformance` checks; VERIFIER_REDIS, KEYSERVICE_REDIS where REDIS is no admin
#
# Works with GNU make 3.81 (macOS) as with 4.x, and under -j.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SUFFIXES:

ifneq ($(words $(CURDIR)),1)
$(error The path of this checkout contains a space, which make cannot handle: please move it)
endif

CACHE := $(CURDIR)/.cache
export HYPOTHESIS_STORAGE_DIRECTORY := $(CACHE)/hypothesis
export MYPY_CACHE_DIR := $(CACHE)/mypy
export PIP_CACHE_DIR := $(CACHE)/pip
export RUFF_CACHE_DIR := $(CACHE)/ruff
export UV_CACHE_DIR := $(CACHE)/uv
export XDG_CACHE_HOME := $(CACHE)
# Whatever the caller's shell says, packages go into .venv and come from there.
export PIP_USER := 0
unexport PIP_PREFIX PIP_REQUIRE_HASHES PIP_TARGET PYTHONHOME PYTHONPATH

PY := .venv/bin/python
PYTHON ?=
ARGS ?=
CODE := $(wildcard verifier keyservice regions examples benchmarks)

# -qq hides pip's warnings and keeps its errors. Wheels only: building a source package would run unpinned code.
PIP := mkdir -p $(CACHE)/tmp && TMPDIR=$(CACHE)/tmp
ifeq ($(OFFLINE),1)
PIP += PIP_CONFIG_FILE=/dev/null $(PY) -m pip --isolated --no-cache-dir
PIP_FROM := --no-index --find-links wheelhouse
else
PIP += $(PY) -m pip
PIP_FROM :=
endif
PIP += --disable-pip-version-check --no-input -qq
PIP_LOCKED := --require-hashes --only-binary :all: --requirement requirements.lock

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' Makefile

# --- set-up -----------------------------------------------------------------------------------------------------------

# .venv/.made says which checkout the environment was made for; one that was moved, or whose Python went away, is made anew.
# .venv/.installed-<key> says which lock and pyproject.toml it holds. Both are looked at by content, not by time.
VENV_SOUND := $(shell test "$$(cat .venv/.made 2>/dev/null)" = "$(CURDIR)" && $(PY) -V >/dev/null 2>&1 && echo yes)
INSTALLED := .venv/.installed-$(shell cat requirements.lock pyproject.toml 2>/dev/null | cksum | cut -d ' ' -f 1)

.PHONY: install
install: $(INSTALLED) ## make .venv and install the locked packages and the project

ifneq ($(VENV_SOUND),yes)
.PHONY: .venv/.made
endif
.venv/.made:
	@base= ; bare= ; \
	for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
		"$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue; \
		if "$$python" -c 'import ensurepip, venv' >/dev/null 2>&1; then base=$$python; break; fi; \
		bare=$${bare:-$$python}; \
	done; \
	if [ -z "$$base" ] && [ -n "$$bare" ]; then \
		echo "$$bare cannot make virtual environments: install its venv module (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; \
	elif [ -z "$$base" ]; then \
		echo "no Python 3.11 or newer found ($(or $(PYTHON),python3 python3.13 python3.12 python3.11)): install one, or name it with PYTHON=..." >&2; exit 1; \
	fi; \
	echo "[1/3] making .venv with $$("$$base" -V)"; \
	rm -rf .venv && "$$base" -m venv .venv && echo "$(CURDIR)" > $@

$(INSTALLED): .venv/.made
	@echo "[2/3] installing the locked packages$(if $(PIP_FROM), from ./wheelhouse)"
	@$(PIP) install $(PIP_FROM) $(PIP_LOCKED) || { \
		echo "The locked packages could not be installed: is the package index reachable? Without a network: 'make wheelhouse' where there is one, copy ./wheelhouse here, then 'OFFLINE=1 make install'." >&2; exit 1; }
	@echo "[3/3] installing the project"
	@$(PIP) install $(PIP_FROM) --no-deps --no-build-isolation --editable .
	@rm -f .venv/.installed-* && touch $@

# --- running ----------------------------------------------------------------------------------------------------------

.PHONY: demo
demo: install ## set up, then the main job: log in, revoke, measure the lag, rotate keys
	@$(PY) -m regions demo $(ARGS)

.PHONY: up
up: install ## start a cluster of regions on this machine, until Ctrl-C
	@$(PY) -m regions up $(ARGS)

.PHONY: model
model: install ## the keeper rules through seeded schedules of faults; ARGS="--seeds 100000 --jobs 2"
	@$(PY) -m regions model $(ARGS)

# Other people's libraries on Node are measured too where there is Node; the benchmarks say so if there is none.
.PHONY: bench-peers
bench-peers: install
	@command -v node >/dev/null && command -v npm >/dev/null || exit 0; \
	cd benchmarks/node && test node_modules/.package-lock.json -nt package-lock.json || \
	npm ci --silent --ignore-scripts --no-audit --no-fund --cache $(CACHE)/npm

.PHONY: bench bench-compare load
bench: bench-peers ## speed beside other libraries: tables, benchmarks/results.json, docs/images/bench.svg; ARGS="cold warm"
	@$(PY) -m benchmarks $(ARGS)

bench-compare: bench-peers ## fails if a ratio is a quarter worse than the committed one, in the median of three runs
	@$(PY) -m benchmarks compare $(ARGS)

load: install ## 10,000 requests at concurrency 100 against the order service, with one worker and with two
	@$(PY) -m benchmarks load $(ARGS)

# --- testing and checking ---------------------------------------------------------------------------------------------

# Tests wait for servers more than they compute: two workers a core.
WORKERS = $$($(PY) -c 'import os; print(2 * (os.cpu_count() or 1))')

.PHONY: test
test: install ## set up, then the tests that need only Python (under 5 minutes)
	@$(PY) -m pytest -n $(WORKERS) --dist loadscope -m "not slow and not system" $(ARGS)

.PHONY: test-faults
test-faults: install ## what may go wrong, on real servers, the slow ones too; ARGS="-k zombie" picks some
	@$(PY) -m pytest -n auto --dist loadscope tests/faults -m "not system" $(ARGS)

.PHONY: test-readme
test-readme: install ## the README's hands-on commands, as they stand (needs bash and curl)
	@command -v curl >/dev/null || { echo "make test-readme needs curl: install it" >&2; exit 1; }
	@$(PY) -m pytest tests/docs -m system $(ARGS)

# atheris has wheels for Linux alone, so it has a lock of its own, and a place of its own beside .venv.
FUZZ := tests/fuzz/requirements.lock
FUZZ_MADE := $(CACHE)/atheris/.installed-$(shell cat $(FUZZ) 2>/dev/null | cksum | cut -d ' ' -f 1)
FUZZ_TIME := 60

.PHONY: fuzz
fuzz: install $(FUZZ_MADE) ## the parsers under atheris, FUZZ_TIME=60 seconds each (Linux); ARGS="-runs=100000" and the like
	@for name in json jwks token; do echo "fuzzing $$name"; \
		PYTHONPATH=$(CACHE)/atheris $(PY) -m tests.fuzz.run $$name -max_total_time=$(FUZZ_TIME) -print_final_stats=1 $(ARGS) || exit 1; done

$(FUZZ_MADE): $(FUZZ) | $(INSTALLED)
	@rm -rf $(CACHE)/atheris
	@$(PIP) install $(PIP_FROM) --require-hashes --only-binary :all: --target $(CACHE)/atheris --requirement $(FUZZ) || { \
		echo "atheris has wheels for Linux on x86-64 and arm64, CPython 3.11 to 3.13; the corpus itself is replayed by 'make test'" >&2; exit 1; }
	@touch $@

.PHONY: test-gateway
test-gateway: install ## the gateway behind Debian's nginx, unpacked into .cache (needs apt-get), or NGINX=program
	@$(if $(NGINX),,tests/conformance/fetch-servers $(CACHE)/servers bookworm/nginx)
	@$(PY) -m pytest tests/verifier/test_gateway_nginx.py -m system $(ARGS)

.PHONY: test-tls
test-tls: install ## TLS to Debian's redis-server, unpacked into .cache (needs apt-get), or TLS_SERVER=program
	@$(if $(TLS_SERVER),,tests/conformance/fetch-servers $(CACHE)/servers bookworm/redis-server)
	@$(PY) -m pytest tests/verifier/test_redis_tls.py tests/keyservice/test_tls.py -m system $(ARGS)

.PHONY: test-bench
test-bench: install ## that every benchmark of the verifier runs, quickly; looks at no time
	@$(PY) -m pytest tests/benchmarks $(ARGS)

FAKETIME = command -v faketime >/dev/null || { echo "make $@ needs libfaketime: Debian and Ubuntu, apt-get install faketime" >&2; exit 1; }

.PHONY: test-clocks
test-clocks: install ## a cluster whose clocks are turned (needs libfaketime: apt-get install faketime)
	@$(FAKETIME)
	@$(PY) -m pytest tests/faults/test_clocks.py -m system $(ARGS)

.PHONY: test-all
test-all: install ## every test, also slow ones and those that need other programs
	@$(FAKETIME)
	@[ -x $(CACHE)/servers/nginx ] || command -v "$${NGINX:-nginx}" >/dev/null || { \
		echo "make test-all needs nginx: 'make test-gateway' fetches Debian's, or name one with NGINX=" >&2; exit 1; }
	@[ -x $(CACHE)/servers/redis-server ] || command -v "$${TLS_SERVER:-redis-server}" >/dev/null || { \
		echo "make test-all needs redis-server: 'make test-tls' fetches Debian's, or name one with TLS_SERVER=" >&2; exit 1; }
	@$(PY) -m pytest -n auto --dist loadscope $(ARGS)

# CONFORMANCE_REDIS and the like, because a URL with a password has no place in a process list. --tb=short shows no arguments.
CONFORMANCE := $(PY) -m pytest tests/conformance --tb=short

.PHONY: conformance conformance-servers
conformance: export CONFORMANCE_REDIS := $(REDIS)
conformance: export CONFORMANCE_VERIFIER_REDIS := $(VERIFIER_REDIS)
conformance: export CONFORMANCE_KEYSERVICE_REDIS := $(KEYSERVICE_REDIS)
conformance: install ## whether a server has what is needed: REDIS=redis://..., or SERVER=program, or the embedded one
	@$(if $(SERVER),REGIONS_REDIS_SERVER='$(SERVER)') $(CONFORMANCE) $(ARGS)

conformance-servers: install ## the same with Debian's Redis 7.0 and Valkey 8.1, unpacked into .cache (needs apt-get)
	@tests/conformance/fetch-servers $(CACHE)/servers
	@for server in $(CACHE)/servers/*-server; do \
		"$$server" --version && REGIONS_REDIS_SERVER="$$server" $(CONFORMANCE) $(ARGS) || exit 1; done

.PHONY: check check-format check-lint check-types check-imports check-security check-secrets
check: check-format check-lint check-types check-imports check-security check-secrets ## every static check

check-format: install
	@$(PY) -m ruff format --check .

check-lint: install
	@$(PY) -m ruff check .

check-types: install
	@$(PY) -m mypy $(CODE) $(wildcard tests)

check-imports: install
	@.venv/bin/lint-imports --no-logo --cache-dir $(CACHE)/imports

check-security: install
	@.venv/bin/bandit --quiet --recursive --configfile pyproject.toml $(CODE)

# Every file that git tracks or would add; outside a git checkout, every file. No baseline: an exception stands beside its
# line, as `pragma: allowlist secret`. tests/ is full of made-up tokens and passwords, so there only what has a tell-tale
# form is looked for (private keys, cloud keys, service tokens). What has a space in it is prose, unless a PEM header.
SECRETS := .venv/bin/detect-secrets-hook --no-verify --disable-plugin IPPublicDetector --exclude-secrets '^(?!BEGIN ).* '
SECRETS_TESTS := $(SECRETS) $(addprefix --disable-plugin ,\
	Base64HighEntropyString BasicAuthDetector HexHighEntropyString JwtTokenDetector KeywordDetector)
LIST := git ls-files -z --cached --others --exclude-standard
FIND := find . \( -name .git -o -name .venv -o -name node_modules -o -name .cache -o -name var -o -name wheelhouse -o -name dist \) -prune -o -type f

check-secrets: install
	@mkdir -p $(CACHE)
	@$(LIST) -- . ':!tests' > $(CACHE)/files 2>/dev/null || $(FIND) ! -path './tests/*' -print0 > $(CACHE)/files
	@$(LIST) -- tests > $(CACHE)/files-tests 2>/dev/null || $(FIND) -path './tests/*' -print0 > $(CACHE)/files-tests
	@xargs -0 $(SECRETS) < $(CACHE)/files
	@xargs -0 $(SECRETS_TESTS) < $(CACHE)/files-tests
	@echo "No secrets in $$(cat $(CACHE)/files $(CACHE)/files-tests | tr -cd '\0' | wc -c | tr -d ' ') files"

.PHONY: format
format: install ## rewrite the code into its one format, and mend what the linter can
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

# --- packaging --------------------------------------------------------------------------------------------------------

# One lock for every supported Python and platform. uv takes its index from its own environment (UV_DEFAULT_INDEX).
.PHONY: lock
lock: .venv/.made ## resolve pyproject.toml into requirements.lock (UPGRADE=1: to the newest)
	@test -x .venv/bin/uv || { $(PIP) install uv; }
	@.venv/bin/uv pip compile pyproject.toml --quiet --universal --python $(PY) --python-version 3.11 --no-python-downloads \
		--all-extras --generate-hashes --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) \
		--output-file requirements.lock
	@.venv/bin/uv pip compile tests/fuzz/requirements.in --quiet --universal --python $(PY) --python-version 3.11 \
		--no-python-downloads --generate-hashes --custom-compile-command "make lock" $(if $(UPGRADE),--upgrade) --output-file $(FUZZ)
	@! grep -nE '://|^-|@ ' requirements.lock $(FUZZ) || { echo "requirements.lock names a place: see above" >&2; exit 1; }

.PHONY: wheelhouse
wheelhouse: install ## download every locked wheel for this Python and platform into ./wheelhouse
	@$(PIP) download $(PIP_LOCKED) --dest wheelhouse
	@echo "$$(ls wheelhouse | wc -l | tr -d ' ') wheels in ./wheelhouse"

.PHONY: build
build: install ## the wheel and the source archive, in ./dist
	@$(PY) -m build --no-isolation --outdir dist .

.PHONY: clean
clean: ## remove what make made, except ./wheelhouse
	@rm -rf .cache .venv dist var benchmarks/node/node_modules
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
