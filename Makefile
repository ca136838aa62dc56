# Two commands do everything on a fresh machine with Python >= 3.11:
#   make quickstart   installs and runs the main job on the embedded data (CPU, minutes)
#   make test         installs and runs the tests
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.13; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
PARITY_VENV ?= .venv-parity
BIN := $(VENV)/bin
WORKDIR ?= runs/quickstart

.PHONY: quickstart test test-parity lint typecheck check install demo lock clean

quickstart: $(VENV)/.installed
	$(BIN)/aqdetr quickstart --workdir=$(WORKDIR)

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n 2 --dist worksteal

# The comparison with torch and transformers live, not with what they once computed.
test-parity: $(PARITY_VENV)/.installed
	AQDETR_PARITY=live $(PARITY_VENV)/bin/python -m pytest tests/models/test_parity.py \
		tests/models/test_efficientnet_lite.py tests/models/test_fold_live.py \
		tests/interop/test_export_live.py tests/interop/test_lite_live.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Drivers are held to what they call: a driver that no test runs must not fall behind the package.
UNCHECKED = arg-type assignment dict-item index method-assign misc operator return-value \
	union-attr var-annotated

typecheck: $(VENV)/.installed
	$(BIN)/mypy
	MYPYPATH=experiments $(BIN)/mypy --no-warn-unused-ignores \
		$(UNCHECKED:%=--disable-error-code=%) experiments/*.py

check: lint typecheck test

install: $(VENV)/.installed

$(VENV)/.installed: requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed: install it, or run 'make PYTHON=/path/to/python3'"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

$(PARITY_VENV)/.installed: requirements-parity.lock pyproject.toml
	$(PYTHON) -m venv $(PARITY_VENV)
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-parity.lock
	$(PARITY_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

# The runtime of the page in docs/demo beside it, so that it works offline and its test runs
# (needs npm); the page checks the files' SHA-384.
ORT_WEB := onnxruntime-web@1.30.0
demo: docs/demo/ort/ort.wasm.bundle.min.mjs
docs/demo/ort/ort.wasm.bundle.min.mjs:
	mkdir -p $(@D)
	cd $(@D) && npm pack --silent $(ORT_WEB) && tar xzf onnxruntime-web-*.tgz --strip-components=2 \
		package/dist/ort.wasm.bundle.min.mjs package/dist/ort-wasm-simd-threaded.wasm
	rm $(@D)/onnxruntime-web-*.tgz

# Resolves the newest versions for all supported Pythons (needs uv).
LOCK := uv pip compile --universal --python-version 3.11 --no-emit-package aqdetr-jax --no-header --quiet pyproject.toml
lock:
	$(LOCK) --extra dev --extra onnx -o requirements.lock
	$(LOCK) --extra parity -c requirements.lock -o requirements-parity.lock

clean:
	rm -rf $(VENV) $(PARITY_VENV) .jax_cache .mypy_cache .ruff_cache .hypothesis build *.egg-info
