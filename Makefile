PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup demo folds table test check lowest bench soak sbom audit clean

setup: .venv/.installed ## Create .venv and install the project with everything the tests need

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"Python 3.11 or newer is needed, {v} was found: make PYTHON=/path/to/python3.11 setup")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: setup ## Phantom images, classifier, explainer, its student, comparison, runs/demo/report.html
	$(BIN)/python train.py fit -c configs/demo/classifier.yaml
	$(BIN)/python train.py fit -c configs/demo/single1.yaml
	$(BIN)/python train.py fit -c configs/demo/distilled.yaml
	$(BIN)/python evaluate.py compare --config configs/demo/compare.yaml
	@echo "The report is runs/demo/report.html, its table runs/demo/table.csv."

DATA ?= busi
FOLDS ?= 5
FOLD_OPTIONS = --data.fold $$i --data.folds $(FOLDS)

folds: setup ## Cross-validation of configs/$(DATA): classifier, explainers and table of each fold, pooled
	set -e; parts=; for i in $$(seq 0 $$(($(FOLDS) - 1))); do \
		out=runs/$(DATA)/folds/$$i; \
		$(BIN)/python train.py fit -c configs/$(DATA)/classifier.yaml $(FOLD_OPTIONS) --out $$out/classifier; \
		$(BIN)/python train.py fit -c configs/$(DATA)/single1_w_tv.yaml $(FOLD_OPTIONS) \
			--model.network $$out/classifier/last.ckpt --out $$out/single1_w_tv; \
		$(BIN)/python train.py fit -c configs/$(DATA)/distilled.yaml $(FOLD_OPTIONS) \
			--model.teacher $$out/single1_w_tv/last.ckpt --out $$out/distilled; \
		$(BIN)/python evaluate.py compare --config configs/$(DATA)/compare.yaml $(FOLD_OPTIONS) $(COMPARE_OPTIONS) \
			--classifier $$out/classifier/last.ckpt --out $$out/compare \
			--explainers "{\"Single_1 and Gradient, distilled\": \"$$out/distilled/last.ckpt\", \
				\"Single_1 (W, TV)\": \"$$out/single1_w_tv/last.ckpt\"}"; \
		parts="$$parts, $$out/compare"; \
	done; $(BIN)/python evaluate.py pool --folders "[$${parts#, }]" --out runs/$(DATA)/folds/pooled

ROWS = $$(sed -n 's|.*runs/$(DATA)/\(.*\)/[a-z]*\.ckpt|\1|p' configs/$(DATA)/compare_all.yaml)

table: setup ## Table of configs/$(DATA)/compare_all.yaml: trains each of its rows, or goes on with it, then compares
	set -e; for row in $(ROWS); do \
		if [ -f runs/$(DATA)/$$row/last.ckpt ]; then on="--ckpt_path last"; else on=; fi; \
		$(BIN)/python train.py fit -c configs/$(DATA)/$$row.yaml $$on; \
	done; $(BIN)/python evaluate.py compare --config configs/$(DATA)/compare_all.yaml

test: setup ## Set up, then every check
	$(MAKE) check

check: ## Style, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile # one thread per worker: two cores are enough

lowest: ## Tests with the lowest versions that pyproject.toml allows, in a new .venv-lowest (Python 3.11)
	$(PYTHON) -m venv --clear .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet uv
	.venv-lowest/bin/uv pip install --quiet --python .venv-lowest --resolution lowest-direct --editable '.[test]'
	OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -q -n 2 --dist loadfile

bench: setup ## Ratios of speed, written to runs/bench.json; fails where one is far below its target
	$(BIN)/python -m benchmarks.bench

soak: setup ## Faults of docs/reliability.md, tried many times; their table is runs/soak.csv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist load -m faults --soak runs/soak.csv

sbom: setup ## Software Bill of Materials of .venv (CycloneDX), runs/sbom.json
	$(BIN)/python -m pip install --quiet --editable '.[audit]'
	mkdir -p runs
	$(BIN)/cyclonedx-py environment $(BIN)/python --output-file runs/sbom.json

audit: setup ## Known vulnerabilities of what is installed; asks a service
	$(BIN)/python -m pip install --quiet --editable '.[audit]'
	$(BIN)/pip-audit --skip-editable

clean: ## Remove what the commands above made, data aside
	rm -rf .venv .venv-lowest runs .pytest_cache .mypy_cache .ruff_cache *.egg-info
