# make         the quick start: install, prepare a dataset, train a small GPT on the CPU, print samples
# make test    the tests
# make soak    a run that is killed 50 times, against one that is not; some minutes
# make corpus  how fast a gigabyte of text is tokenized, and that a kill changes nothing; some minutes
# make lint    the style
# make format  the style, applied
# make clean   remove the environment (datasets and runs stay)

PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
OUT := out-quickstart
export PYTHONUNBUFFERED := 1

.PHONY: quickstart test soak corpus lint format clean
.DEFAULT_GOAL := quickstart

quickstart: $(VENV)/installed
	@if [ ! -f data/shakespeare_char/train.bin ]; then \
		echo "== preparing Tiny Shakespeare"; \
		$(RUN) data/shakespeare_char/prepare.py || { \
			echo "== going on without it, with Python's own source: python_char"; \
			[ -f data/python_char/train.bin ] || $(RUN) data/python_char/prepare.py || exit 1; \
		}; \
	fi
	@dataset=shakespeare_char; [ -f data/shakespeare_char/train.bin ] || dataset=python_char; \
	echo "== training a small GPT on $$dataset: about a minute on two cores" && \
	$(RUN) train.py config/train_shakespeare_char_cpu.py --dataset=$$dataset --out_dir=$(OUT) --log_interval=100 && \
	echo && echo "== what it writes" && \
	$(RUN) sample.py --out_dir=$(OUT) --num_samples=3 --max_new_tokens=300 --device=cpu
	@echo
	@echo "That was a GPT of 0.8 million parameters, after 2,000 updates. Next:"
	@echo "  source $(VENV)/bin/activate"
	@echo "  python sample.py --out_dir=$(OUT) --start=\"The \"                  # give it a beginning"
	@echo "  python train.py --init_from=resume --out_dir=$(OUT) --max_iters=4000 --lr_decay_iters=4000   # train on"
	@echo "  python data/text/prepare.py --input=FILE --name=mine             # your own text"
	@echo "  python train.py --help                                           # every key; README.md has the walk"

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
		{ echo "Python 3.10 or newer is needed; name one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo "$(PYTHON) cannot create environments; on Debian and Ubuntu: apt install python3-venv" >&2; rm -rf $(VENV); exit 1; }

$(VENV)/installed: requirements.txt | $(VENV)/bin/python
	@echo "== installing requirements.txt into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements.txt | $(VENV)/bin/python
	@echo "== installing requirements-dev.txt into $(VENV)"
	@$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@ $(VENV)/installed
