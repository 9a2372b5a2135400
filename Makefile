# Everything is built in the release profile, so that demo, tests and servers share one build.
# scripts/setup-* install what is missing and print where it is; they ask nothing of the network twice.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The queries are checked against .sqlx, whatever DATABASE_URL is; `make sqlx` renews it.
export SQLX_OFFLINE := true
export CARGO_TARGET_DIR ?= $(CURDIR)/target
export PYTHONDONTWRITEBYTECODE := 1

# Only what is compiled with the trainer needs libtorch. Asked for when it is needed, and not before.
with_libtorch = LIBTORCH=$$(scripts/setup-libtorch); export LIBTORCH;
relora = $(CARGO_TARGET_DIR)/release/relora

# What the targets build is the same, so they take turns.
.NOTPARALLEL:
.PHONY: help setup build demo test chaos lint sqlx openapi bench bench-service clean-demo

help: ## Show this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 24

setup: ## Install what is missing: PostgreSQL's server, libtorch, the Python packages of the tests
	@scripts/setup-postgres >/dev/null
	@scripts/setup-libtorch >/dev/null
	@scripts/setup-python >/dev/null

build: ## Compile relora and relora-trainer
	@$(with_libtorch) cargo build --release --locked

demo: ## Run the main job from text to checked weights (DEMO_TEXT=path for other text)
	@scripts/demo

test: setup lint ## Run every test
	scripts/sqlx-prepare --check
	$(with_libtorch) cargo build --release --locked
	$(with_libtorch) scripts/with-postgres cargo test --release --locked
	RELORA_TRAINER="$(relora)-trainer" "$$(scripts/setup-python)" -m pytest -p no:cacheprovider tests

chaos: build ## Prove that the service survives: 40 minutes (CHAOS_FLAGS="--only kill9 --runs 20" and others)
	tests/chaos/run --bin-dir "$(CARGO_TARGET_DIR)/release" $(CHAOS_FLAGS)

lint: ## Check formatting and clippy, with and without the trainer
	cargo fmt --check
	cargo clippy --release --locked --no-default-features --all-targets -- -D warnings
	$(with_libtorch) cargo clippy --release --locked --all-targets -- -D warnings

sqlx: ## Write what the query macros learn of the database to .sqlx
	scripts/sqlx-prepare

openapi: build ## Write the API's document to openapi/
	@mkdir -p openapi
	"$(relora)" openapi > openapi/openapi.json

bench: build ## Compare training speed and memory with PyTorch (BENCH_FLAGS="--models 60m" and others)
	benches/run $(BENCH_FLAGS)

bench-service: build ## Measure start, claim, transfer and memory
	@scripts/bench-service

clean-demo: ## Remove what the demo left
	rm -rf target/demo target/relora-demo-*
