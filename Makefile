# slimxl. `make report` is the main job; `make help` lists the rest. Each target sets up what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
OUT ?= out
MODEL ?=
BUNDLE ?=
FLAVOR ?= tensorrt-rtx
PRECISION ?= fp16
ifneq ($(filter tensorrt onnxruntime,$(FLAVOR)),)  # builds on the GPU at hand only; runs anywhere
GPUS ?= auto
endif
ifeq ($(PRECISION),fp8)  # which an A100 has not
GPUS ?= rtx4090
endif
GPUS ?= a100,rtx4090
LAYOUT ?=
LAYOUTS ?= per-resolution shared ranged
RESOLUTIONS ?= all
BATCHES ?= 1
PROMPTS ?=
ADDRESS ?=
CONCURRENCY ?=
MINUTES ?=

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MINI := mini-sdxl mini-ssd-1b mini-vega
FEW := mini-lcm-vega
EIGHT_BITS = $(filter int8 fp8,$(PRECISION))
BASE = $(if $(EIGHT_BITS),$(if $(filter onnxruntime-int8,$(FLAVOR)-$(PRECISION)),fp32,fp16),$(PRECISION))
NAME = $(subst /,--,$(subst :,-,$(patsubst %.safetensors,%,$(MODEL))))
FOLDER = $(NAME)$(patsubst %,-%,$(filter-out fp16,$(PRECISION)))
BASE_FOLDER = $(NAME)$(patsubst %,-%,$(filter-out fp16,$(BASE)))

NEED_MODEL = test -n "$(MODEL)" || { echo "error: MODEL is not set; e.g. MODEL=random:vega, a Hugging Face id, a folder, a .safetensors file" >&2; exit 2; }

.PHONY: help setup report students onnx targets engines bench-distill bench-export bench-engines bench-gpu serve load-test test test-gpu clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (some minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[optimum,dev]'
	touch $@

# Apart from the rest, since diffusers imports bitsandbytes wherever it is: over a second in every command.
$(VENV)/.training: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[training]'
	touch $@

setup: $(READY)  ## install everything into .venv

report: $(READY)  ## the main job: students, ONNX, engines, and the latency report, in OUT/report
	$(MAKE) --no-print-directory students
	$(MAKE) --no-print-directory --jobs 2 $(addprefix bundle-,$(MINI) $(FEW))
	$(BIN)/python -m bench run --contestants $(foreach m,$(MINI),$(m)=bundle@onnxruntime:$(OUT)/bundles/$(m)) $(FEW)=bundle@onnxruntime+taught:$(OUT)/bundles/$(FEW) --artifacts $(foreach m,$(MINI) $(FEW),$(m)=$(call CHECKPOINT,$(m)) $(m)=$(OUT)/onnx/$(m)-fp16 $(m)=$(OUT)/bundles/$(m)) --baseline mini-sdxl --resolutions all --steps 8,4,16 --seconds 40 --pictures 27 --out $(OUT)/results.json
	$(BIN)/python -m bench report --results $(OUT)/results.json --out $(OUT)/report
	@echo "open $(OUT)/report/index.html"

students: $(READY)  ## the mini students, distilled from the mini teacher
	$(BIN)/python -m distill cache --data shapes:1200 --model mini:sdxl --out $(OUT)/cache
	$(BIN)/python -m distill train --recipe mini-ssd-1b --cache $(OUT)/cache --out $(OUT)/students/mini-ssd-1b
	$(BIN)/python -m distill train --recipe mini-vega --start $(OUT)/students/mini-ssd-1b --cache $(OUT)/cache --out $(OUT)/students/mini-vega
	$(BIN)/python -m distill train --recipe mini-lcm --start $(OUT)/students/mini-vega --cache $(OUT)/cache --out $(OUT)/students/$(FEW)

# One mini model: fp16 graphs for TensorRT-RTX, fp32 ones for ONNX Runtime on the CPU, both in one bundle.
CHECKPOINT = $(if $(filter mini-sdxl,$(1)),distill/mini/teacher,$(OUT)/students/$(1))
bundle-%: $(READY)
	$(BIN)/python -m export onnx --model $(call CHECKPOINT,$*) --precision fp16 --out $(OUT)/onnx/$*-fp16
	$(BIN)/python -m engines build --onnx $(OUT)/onnx/$*-fp16 --out $(OUT)/bundles/$* --gpus $(GPUS) --flavor tensorrt-rtx --replace
	$(BIN)/python -m export onnx --model $(call CHECKPOINT,$*) --precision fp32 --out $(OUT)/onnx/$*-fp32
	$(BIN)/python -m engines build --onnx $(OUT)/onnx/$*-fp32 --out $(OUT)/bundles/$* --flavor onnxruntime --replace

onnx: $(READY)  ## the ONNX folder of MODEL (PRECISION, PROMPTS to calibrate on)
	@$(NEED_MODEL)
	$(BIN)/python -m export onnx --model $(MODEL) --precision $(BASE) --out $(OUT)/onnx/$(BASE_FOLDER)
	$(if $(EIGHT_BITS),$(BIN)/python -m export quantise --onnx $(OUT)/onnx/$(BASE_FOLDER) --model $(MODEL) --precision $(PRECISION) $(if $(PROMPTS),--prompts $(PROMPTS)) --out $(OUT)/onnx/$(FOLDER))

targets: $(READY)
	@$(NEED_MODEL)
	@$(BIN)/python -m engines targets --gpus $(GPUS) --flavor $(FLAVOR) --precision $(PRECISION)

engines: targets  ## engines of MODEL for GPUS (FLAVOR, LAYOUT, RESOLUTIONS, BATCHES, PRECISION)
	$(MAKE) --no-print-directory onnx
	$(BIN)/python -m engines build --onnx $(OUT)/onnx/$(FOLDER) --out $(OUT)/bundles/$(FOLDER) --gpus $(GPUS) --flavor $(FLAVOR) $(if $(LAYOUT),--layout $(LAYOUT)) --resolutions $(RESOLUTIONS) --batches $(BATCHES) --replace

bench-distill: $(READY)  ## the training step beside the published loop, in turn, on MODEL (default: the mini teacher); the data at scale
	$(BIN)/python -m distill bench $(if $(MODEL),--model $(MODEL)) --out $(OUT)/bench-distill/$(or $(NAME),mini-sdxl).json
	$(BIN)/python -m distill bench-data --out $(OUT)/bench-distill/data.json

bench-export: $(READY)  ## the exporter beside optimum's, in turn, on MODEL: time, memory, graph, latency
	@$(NEED_MODEL)
	$(BIN)/python -m export bench --model $(MODEL) --out $(OUT)/bench-export/$(NAME).json

bench-engines: targets  ## LAYOUTS compared (time, memory, disk) on the ONNX folder of MODEL
	$(MAKE) --no-print-directory onnx
	for layout in $(LAYOUTS); do \
	  $(BIN)/python -m engines build --onnx $(OUT)/onnx/$(FOLDER) --out $(OUT)/bench-engines/$(FOLDER)/$$layout --layout $$layout --components unet,vae_decoder --gpus $(GPUS) --flavor $(FLAVOR) --resolutions $(RESOLUTIONS) --replace; \
	done
	$(BIN)/python -m engines compare $(addprefix $(OUT)/bench-engines/$(FOLDER)/,$(LAYOUTS)) --out $(OUT)/bench-engines/$(FOLDER)/layouts.json

bench-gpu: $(READY)  ## everything a GPU can be measured for (MINUTES: begin nothing later), into OUT/bench-gpu
	$(BIN)/python -m bench gpu --out $(OUT)/bench-gpu $(if $(MINUTES),--minutes $(MINUTES))

serve: $(READY)  ## BUNDLE inside a Triton server, on its GPUs or the CPU; loopback only, unless ADDRESS says otherwise
	@test -n "$(BUNDLE)" || { echo "error: BUNDLE is not set; e.g. BUNDLE=out/bundles/mini-vega" >&2; exit 2; }
	$(BIN)/python -m engines serve --bundle $(BUNDLE) $(if $(ADDRESS),--address $(ADDRESS))

load-test: $(READY)  ## images/s and latencies of the running server (CONCURRENCY, MINUTES), into OUT/load.json
	$(BIN)/python -m engines load-test $(if $(CONCURRENCY),--concurrency $(CONCURRENCY)) $(if $(MINUTES),--minutes $(MINUTES)) --out $(OUT)/load.json

test: $(VENV)/.training  ## lint, types and every test, the full-size ones too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder --durations 15 tests/test_full_size.py tests

test-gpu: $(READY)  ## what only a GPU can show: plans built, run, refitted and stripped on the one at hand
	@nvidia-smi -L > /dev/null 2>&1 || { echo "error: no NVIDIA GPU answers here; these tests need one" >&2; exit 2; }
	$(BIN)/pytest tests/gpu

clean:  ## remove what was built (the virtual environment stays)
	rm -rf $(OUT)
