PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
DOCS := .venv/.docs

.PHONY: demo test check bench docs

demo: $(INSTALLED)
	$(BIN)/paucity run recipes/quickstart.yaml --out runs/quickstart --force

test: $(INSTALLED)
	$(BIN)/pytest -n 2

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2
	for example in examples/*.py; do echo $$example; $(BIN)/python $$example > /dev/null || exit 1; done

bench: $(INSTALLED)
	$(BIN)/paucity bench

docs: $(DOCS)
	$(BIN)/mkdocs build --strict

$(INSTALLED): pyproject.toml constraints.txt $(shell find csrc -type f)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

$(DOCS): $(INSTALLED)
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	touch $@
