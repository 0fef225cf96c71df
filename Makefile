# slimxl. `make report` is the main job; `make help` lists the rest. Each target sets up what it needs.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:

PYTHON ?= python3
OUT ?= out
MODEL ?=
GPUS ?= a100,rtx4090
FLAVOR ?= tensorrt-rtx
LAYOUT ?= auto
RESOLUTIONS ?= all
BATCHES ?= 1
PRECISION ?= fp16

VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
MINI := mini-sdxl mini-ssd-1b mini-vega
NAME = $(subst /,--,$(subst :,-,$(patsubst %.safetensors,%,$(MODEL))))

.PHONY: help setup report students onnx engines bench test lint clean bench-export bench-engines bench-gpu

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

$(READY): pyproject.toml constraints.txt
	@echo "setting up $(VENV) (some minutes, once)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[optimum,dev]'
	touch $@

setup: $(READY)  ## install everything into .venv

students: $(READY)  ## the mini students, distilled from the mini teacher
	$(BIN)/python -m distill cache --data shapes:1800 --model mini:sdxl --out $(OUT)/cache
	$(BIN)/python -m distill train --recipe mini-ssd-1b --cache $(OUT)/cache --out $(OUT)/students/mini-ssd-1b
	$(BIN)/python -m distill train --recipe mini-vega --start $(OUT)/students/mini-ssd-1b --cache $(OUT)/cache --out $(OUT)/students/mini-vega

engines: $(READY)  ## engines of MODEL for GPUS (FLAVOR, LAYOUT, RESOLUTIONS, BATCHES)
	@test -n "$(MODEL)" || { echo "error: MODEL is not set: make engines MODEL=random:vega (or a hub id, a folder, a .safetensors file)" >&2; exit 2; }
	$(BIN)/python -m export onnx --model $(MODEL) --precision $(PRECISION) --out $(OUT)/onnx/$(NAME)
	$(BIN)/python -m engines build --onnx $(OUT)/onnx/$(NAME) --out $(OUT)/bundles/$(NAME) --gpus $(GPUS) --flavor $(FLAVOR) --layout $(LAYOUT) --resolutions $(RESOLUTIONS) --batches $(BATCHES)

test: $(READY)  ## lint, types and every test, the full-size ones too
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest

clean:  ## remove what was built (the virtual environment stays)
	rm -rf $(OUT)
