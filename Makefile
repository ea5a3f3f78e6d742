# Two commands: `make demo` installs everything and runs the main job, `make test` installs what
# the tests need and passes them. Both use one virtual environment in .venv.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin
# torch first and alone: this release is the CPU build, and with it in place nothing that follows
# fetches the much larger one. Where there is a GPU, install torch by its own instructions first.
PIP := $(RUN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test lint docs clean

demo: $(VENV)/lab
	$(RUN)/normlab compare

test: $(VENV)/tests
	$(RUN)/ruff check . && $(RUN)/ruff format --check .
	$(RUN)/pyright
	OMP_NUM_THREADS=1 $(RUN)/pytest -n 2 -m "not alone"
	$(RUN)/pytest -m alone

lint: $(VENV)/tests
	$(RUN)/ruff check --fix . && $(RUN)/ruff format . && $(RUN)/pyright

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --disable-pip-version-check \
		"$$(grep '^torch==' constraints.txt)"
	touch $@

$(VENV)/lab: $(VENV)/torch pyproject.toml
	$(PIP) -e ".[lab]"
	touch $@

$(VENV)/tests: $(VENV)/lab
	$(PIP) -e ".[lab,hub,test,dev]"
	$(PIP) --no-deps torchvision timm  # architectures to convert; they would ask for another torch
	touch $@

clean:
	rm -rf $(VENV) build dist
