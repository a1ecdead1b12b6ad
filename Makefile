PYTHON ?= python3
BIN = .venv/bin

demo: .venv/installed
	$(BIN)/kinema demo

test: .venv/developer
	$(BIN)/python -m pytest

check: .venv/developer
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The kernels in Triton's interpreter, which needs no GPU. Triton takes 1 GB, so it is not among what developers install.
kernels: .venv/developer
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'triton>=3.6,<4'
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/models/test_fused_kernels.py tests/models/test_ttt_kernels.py tests/models/test_vae_kernels.py tests/models/test_attention_eight.py

.venv/installed .venv/developer: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "kinema needs Python 3.11 or newer: make PYTHON=python3.12"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "installing kinema into .venv (a few minutes the first time; torch is large)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar on -c constraints.txt -e '.$(if $(filter %developer,$@),[dev])'
	touch $@

clean:
	rm -rf .venv build dist kinema.egg-info

.PHONY: demo test check kernels clean
