# `make` alone lists the targets. Everything runs from .venv, which the first target that needs it creates.

PYTHON ?= python3
ARGS ?=

BIN := .venv/bin
# The stamp's name carries a checksum of what decides the environment's content: a change installs again, a `touch` does not.
STAMP := .venv/.installed-$(shell cat pyproject.toml constraints.txt | cksum | tr ' ' '-')
PYTEST := $(BIN)/pytest -n logical --maxprocesses 8 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-long test-faults test-s3 test-yardsticks check fix gpu bench-gpu quality findings table-ml1m bench-model bench-semi-local bench-recompute bench-dirichlet bench-metrics bench-ingest bench-import bench-items bench-length-balance bench-row-precision bench-content bench-survival bench-store bench-swap bench-publish bench-upstream bench-upstream-serving bench-drift bench-backtest bench-freshness bench-recommend bench-long-histories bench-ranking bench-serving bench-guards study-llatte study-ultra docs clean

help: ## list the targets
	@awk 'BEGIN {FS = ":.*## "} /^[a-z0-9-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(STAMP):
	@PYTHON="$(PYTHON)" .ci/setup "$@"

setup: $(STAMP) ## create .venv and install everything at the pinned versions
	@echo ".venv holds what pyproject.toml and constraints.txt ask for"

demo: $(STAMP) ## the whole loop on a real stream; ARGS=--keep-running leaves it up
	@$(BIN)/headrace demo $(ARGS)

test: $(STAMP) ## the test suite; ARGS="tests/ops -k settings" for a part of it
	$(PYTEST) $(ARGS)

test-long: $(STAMP) ## the test suite with the slow tests
	$(PYTEST) -m "not s3" --timeout 1800 $(ARGS)

test-faults: $(STAMP) ## faults of real processes only, the long ones included: kills, restarts, stalls, full disks, rebalances
	$(PYTEST) -m "not s3" --timeout 1800 tests/faults tests/ops/test_kill.py $(ARGS)

test-s3: $(STAMP) ## snapshots on a local server that speaks S3; installs 105 MB into .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[s3test]'
	$(BIN)/pytest -m s3 tests/ops/test_s3.py $(ARGS)

check: $(STAMP) ## lint, format, types, import directions, spelling, schema
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	@BIN="$(BIN)" .ci/schema-check

test-yardsticks: ## LensKit's and RecTools' metrics, each in an environment of its own, against the values that the suite uses
	@PYTHON="$(PYTHON)" .ci/test-yardsticks

fix: $(STAMP) ## mend what lint and format can mend by themselves
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

gpu: ## kernel and model tests on a CUDA machine, with that machine's own Python (PYTHON=…)
	$(PYTHON) -m pytest -c tests/gpu.ini --rootdir . --confcutdir . tests/kernels tests/model $(ARGS)

bench-gpu: ## the kernels on a CUDA machine, with its own Python (PYTHON=…); ARGS="--only attention --seconds 240"
	@$(PYTHON) -m benchmarks.bench_gpu $(ARGS)

bench-ingest: $(STAMP) ## events a second from broker to durable, on one core; ARGS="--arms sqlite-full postgresql"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_ingest.py $(ARGS)

table-ml1m: $(STAMP) ## SASRec, HSTU, HSTU-large on MovieLens-1M beside the published rows; hours on a CPU, resumable; ARGS="--data ml-1m --arms hstu"
	@PYTHONPATH=. $(BIN)/python benchmarks/table_ml1m.py --results benchmarks/results/ml-1m.json $(ARGS)

bench-model: $(STAMP) ## training steps and attention on a CPU, packed against padded; ARGS="--only attention"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_model.py $(ARGS)

bench-semi-local: $(STAMP) ## semi-local against full attention on a CPU, time and memory by length; ARGS="--lengths 2048 16384 --kernels native"
	@PYTHONPATH=. $(BIN)/python -m benchmarks.bench_semi_local $(ARGS)

bench-recompute: $(STAMP) ## a layer's memory and time with and without model.recompute, on a CPU; ARGS="--steps 5"
	@PYTHONPATH=. $(BIN)/python -m benchmarks.bench_recompute $(ARGS)

bench-dirichlet: $(STAMP) ## pointwise against softmax attention on a Dirichlet-process stream
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_dirichlet.py $(ARGS)

bench-items: $(STAMP) ## growth of the item table: pauses, and bytes an item; ARGS="--items 10000000 --width 16"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_items.py $(ARGS)

bench-content: $(STAMP) ## what content of items buys, on films with genres; ARGS="--data folder --limit 20000"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_content.py $(ARGS)

study-llatte: $(STAMP) ## what LLaTTE's two stages bring: transfer, stale vectors, FLOPs, content, scaling; some 25 minutes on a core, resumable; ARGS="--limit 300000 --seeds 1"
	@PYTHONPATH=. $(BIN)/python benchmarks/study_llatte.py --results benchmarks/results/llatte.json --plots benchmarks/results $(ARGS)

bench-survival: $(STAMP) ## poisoned batches against a clean stream, and a checkpoint against a step; ARGS="--only checkpoint"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_survival.py $(ARGS)

quality: $(STAMP) ## prequential quality on movietweetings and globo-news; ARGS="--results quality.json"
	@PYTHONPATH=. $(BIN)/python benchmarks/quality.py $(ARGS)

bench-metrics: $(STAMP) ## the share of a training step that its prequential metrics cost; ARGS="--losses full"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_metrics.py $(ARGS)

bench-row-precision: $(STAMP) ## snapshots with int8 and int4 rows: bytes, quality, swap time; ARGS="--events 0"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_row_precision.py $(ARGS)

study-ultra: $(STAMP) ## quality against operations of HSTU and ULTRA-HSTU, and each part alone; resumable; ARGS=--quick
	@PYTHONPATH=. $(BIN)/python benchmarks/study_ultra.py $(ARGS)

bench-length-balance: $(STAMP) ## straggler ratios of plain and load-balanced stochastic length, ranks as processes; ARGS="--ranks 4"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_length_balance.py $(ARGS)

bench-swap: $(STAMP) ## the pause of a hot swap; ARGS="--items 36000"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_swap.py $(ARGS)

bench-publish: $(STAMP) ## bytes of deltas against anchors, and what publishing costs the training path; ARGS="--items 16000"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_publish.py $(ARGS)

bench-upstream: $(STAMP) ## what vectors of users cost: computing them, training with them, answers; ARGS="--lengths 64 5000"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_upstream.py $(ARGS)

bench-upstream-serving: $(STAMP) ## latency of /v1/rank with and without users' vectors in place; ARGS=--quick
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_upstream_serving.py $(ARGS)

bench-drift: $(STAMP) ## drift on simulated streams: delay, false alarms, recovery with and without reaction; ARGS=--quick
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_drift.py $(ARGS)

findings: $(STAMP) ## what a run of headrace backtest shows as JSON small enough to keep; ARGS="runs/movietweetings --results findings.json"
	@PYTHONPATH=. $(BIN)/python benchmarks/backtest_findings.py $(ARGS)

bench-backtest: $(STAMP) ## what a backtest costs: stream and store alone, one online arm, the eight-point freshness curve
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_backtest.py $(ARGS)

bench-freshness: $(STAMP) ## age of events at each hop, all processes and 1,000 events a second on this machine; ARGS="--rate 500"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_freshness.py $(ARGS)

bench-recommend: $(STAMP) ## what a recommendation costs: user states kept or not, search of the catalogue; ARGS="--only search"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_recommend.py $(ARGS)

bench-long-histories: $(STAMP) ## what each part of ULTRA-HSTU saves in training and answering; ARGS="--length 4096"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_long_histories.py $(ARGS)

bench-guards: $(STAMP) ## false and missed trips of the guards on a stream that is learned; ARGS="--events 20000"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_guards.py $(ARGS)

bench-ranking: $(STAMP) ## the ranking head on movietweetings beside item means, and 256 candidates at once; ARGS="--only scoring"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_ranking.py $(ARGS)

bench-serving: $(STAMP) ## latency, pauses and memory of a worker under load while weights are swapped; ARGS=--quick
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_serving.py $(ARGS)

bench-import: $(STAMP) ## logs into recordings: events a CPU second and peak memory by the log's length; ARGS="--events 100000000"
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_import.py $(ARGS)

bench-store: $(STAMP) ## appends and reads of histories, in memory and in SQLite; ARGS=--quick takes a minute
	@PYTHONPATH=. $(BIN)/python benchmarks/bench_store.py $(ARGS)

docs: $(STAMP) ## check the documentation: links, settings, commands, topics, instruments
	$(BIN)/pytest tests/docs $(ARGS)

clean: ## remove caches and build outputs (keeps .venv and var/)
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -rf {} +
