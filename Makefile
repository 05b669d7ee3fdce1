# make         quick start: install, prepare a dataset, train a small GPT on the CPU, print samples
# make test    run the tests
# make soak    kill a run 50 times and compare it with an undisturbed one; takes some minutes
# make corpus  measure tokenization of 1 GB of text, and check that a kill changes nothing; takes some minutes
# make lint    check the style
# make format  apply the style
# make clean   delete the environment; datasets and runs stay

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
OUT := out-quickstart
export PYTHONUNBUFFERED := 1

.PHONY: quickstart test soak corpus lint format clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/installed
	@if [ ! -f data/shakespeare_char/train.bin ]; then \
		echo "== preparing Tiny Shakespeare"; \
		$(RUN) data/shakespeare_char/prepare.py || { \
			echo "== no download; using the source of Python's standard library instead: python_char"; \
			[ -f data/python_char/train.bin ] || $(RUN) data/python_char/prepare.py || exit 1; \
		}; \
	fi
	@dataset=shakespeare_char; [ -f data/shakespeare_char/train.bin ] || dataset=python_char; \
	echo "== training a small GPT on $$dataset, one to three minutes on two cores" && \
	$(RUN) train.py config/train_shakespeare_char_fast.py --dataset=$$dataset --out_dir=$(OUT) && \
	echo && echo "== samples from the model" && \
	$(RUN) sample.py --out_dir=$(OUT) --num_samples=3 --max_new_tokens=300 --device=cpu
	@echo
	@echo "That was a GPT with 0.8 million parameters, trained for 800 iterations. Next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  python sample.py --out_dir=$(OUT) --start=\"The \"                  # sample from a prompt"
	@echo "  python look.py --out_dir=$(OUT)                                   # a page that shows the model at work"
	@echo "  python train.py --init_from=resume --out_dir=$(OUT) --max_iters=1600 --lr_decay_iters=1600   # train longer"
	@echo "  python data/text/prepare.py --input=FILE --name=mine             # use your own text"
	@echo "  python train.py --help                                           # list all keys; see also README.md"

test: $(VENV)/installed-dev
	$(RUN) -m pytest -n 2

soak: $(VENV)/installed
	$(RUN) tests/soak.py

corpus: $(VENV)/installed
	$(RUN) tests/corpus_speed.py

lint: $(VENV)/installed-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

format: $(VENV)/installed-dev
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
		{ echo "Python must be 3.10 or newer; choose one with: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot create environments; on Debian and Ubuntu, run: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/installed: requirements.txt constraints.txt | $(VENV)/bin/python
	@echo "== installing requirements.txt into $(VENV)"
	@$(PIP) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: tests/requirements.txt requirements.txt constraints.txt | $(VENV)/bin/python
	@echo "== installing tests/requirements.txt into $(VENV)"
	@$(PIP) -r tests/requirements.txt
	@touch $@ $(VENV)/installed
