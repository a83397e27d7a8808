# make test | lint | demo | retrieval | docs | works | notebooks | nightly | slurm | spark | package | faults | bench | quality | gpu | clean
#
# Each but the last two sees to .venv before anything else: makes it where it is missing or half
# made, brings it up to date where pyproject.toml is newer, and mends it where torch, FBGEMM and
# TorchRec do not go together. FBGEMM=cpu or FBGEMM=cuda overrides the choice between the two, which
# is CUDA where nvidia-smi finds a GPU.

PYTHON ?= python3
FBGEMM ?= auto
TORCHREC := torchrec==1.8.0

ifeq ($(FBGEMM),auto)
override FBGEMM := $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
endif
ifeq ($(filter $(FBGEMM),cpu cuda),)
$(error FBGEMM should be cpu, cuda or auto. Received: $(FBGEMM))
endif

PY := .venv/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := .venv/.ready-$(FBGEMM)
OTHER_FBGEMM := $(if $(filter cuda,$(FBGEMM)),fbgemm-gpu-cpu,fbgemm-gpu)
GUARD := $(PY) -I torchrec_exfm/_versions.py
LOADS := $(PY) -I -c 'import torchrec'
# --no-compile: Python compiles what it imports, which is little of what is installed.
PIP_INSTALL := $(PIP) install -q --no-compile
SET_UP := $(MAKE) --no-print-directory FBGEMM=$(FBGEMM) install

.NOTPARALLEL:
.PHONY: test lint demo retrieval docs works notebooks nightly slurm spark package faults bench quality gpu clean venv install

# A thread a process: two of two threads each would wait for each other on two cores.
test: venv
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

demo: venv
	$(PY) examples/promo_response/main.py

# Two towers for retrieval, five seeds, and examples/retrieval/README.md from them: some ten minutes.
retrieval: venv
	OMP_NUM_THREADS=1 $(PY) examples/retrieval/retrieval.py --write

# The site, into build/docs. A warning, a public name without a page and a broken local link are errors.
docs: venv
	$(PY) -m sphinx -q -E -n -W --keep-going docs build/docs
	$(PY) docs/check_links.py build/docs

# The page docs/works.md, if every test that it names passes: some minutes, as models are compiled.
works: venv
	$(PY) docs/works.py

# Each notebook from top to bottom, on real data; NOTEBOOKS=--write keeps what the cells print.
notebooks: venv
	$(PY) examples/notebooks/execute.py $(NOTEBOOKS)

# The TorchX components with TorchX's nightly, in the place of the release.
nightly: venv
	$(PIP) install -q --no-deps --upgrade --target .venv/torchx-nightly torchx-nightly==2026.10.26
	PYTHONPATH=.venv/torchx-nightly $(PY) -m pytest tests/test_torchx.py

# The TorchX components on a real Slurm, which runs on this machine until the tests end: some minutes,
# two of which Slurm waits before a restart. Needs root; installs Debian's slurm-wlm if it is missing.
slurm: venv
	.ci/slurm $(PY) -m pytest $(PYTEST_ARGS) tests/test_slurm.py

# The join and the memory on Spark, which needs Java; SPARK=4.3.0 picks another version. Spark
# unpacks into .venv.
SPARK ?= 3.5.9
spark: venv
	@command -v java >/dev/null || { echo 'make spark needs Java: apt-get install openjdk-17-jre-headless'; false; }
	$(PIP) install -q --upgrade --target .venv/spark-$(SPARK) pyspark==$(SPARK)
	PYTHONPATH=.venv/spark-$(SPARK) $(PY) -m pytest tests/test_join_spark.py tests/test_ids_spark.py \
		tests/test_memory_spark.py

# Wheel and source distribution into dist/, each tried in an environment of its own.
package: venv
	TORCHREC=$(TORCHREC) .ci/package

# The fault tests at full length: a teacher that fails in every way, jobs killed twenty times each,
# and 200 bits turned over in each file.
faults: venv
	$(PY) -m pytest tests/test_two_ranks.py -k 'failing_store or without_a_teacher or teacher_that_fails'
	FAULT_KILLS=20 BIT_FLIPS=200 $(PY) -m pytest -s tests/test_das_faults.py \
		tests/test_das_server_faults.py tests/test_das_bit_flips.py tests/test_resume.py \
		tests/test_streaming.py tests/test_failing_rank.py

# Every benchmark, and benchmarks/README.md from what they print: about half an hour on 2 quiet cores.
# BENCH=step picks one, BENCH=--quick prints small runs and keeps nothing.
bench: venv
	$(PY) benchmarks/report.py $(BENCH)

# What a teacher brings, on real streams, and benchmarks/QUALITY.md from it; it goes on where it was
# stopped, and what is kept in benchmarks/measured/quality.json is not run again. SOURCE=ebnerd
# DATA=FOLDER: on a stream whose files are yours (taobaoad, kuaivideo, amazonelectronics, criteo).
# TABLE='bias noise' picks tables, SEEDS=1 is the first seed alone. QUICK=1: some minutes, and nothing is kept.
quality: venv
	OMP_NUM_THREADS=1 $(PY) benchmarks/quality.py $(if $(QUICK),--quick) \
		$(if $(SOURCE),--source $(SOURCE)) $(if $(DATA),--data $(DATA)) \
		$(if $(TABLE),--table $(TABLE)) $(if $(SEEDS),--seeds $(SEEDS))

# All that needs an NVIDIA GPU, in under ten minutes, and benchmarks/measured/gpu.md from it. Makes no
# .venv and asks no network: it runs in PYTHON's environment, with what WHEELS, a folder, has beside
# it. GPU='tests export' picks steps, GPU=--cpu tries all of it without a GPU.
gpu:
	$(PYTHON) benchmarks/gpu.py $(if $(WHEELS),--wheels $(WHEELS)) $(GPU)

clean:
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

venv:
	@if [ ! -e $(STAMP) ] || [ pyproject.toml -nt $(STAMP) ] || ! $(GUARD); then \
		$(SET_UP) && { $(LOADS) || { \
			echo 'TorchRec does not load from .venv: making .venv anew'; \
			rm -rf .venv && $(SET_UP) && $(LOADS); \
		}; } && touch $(STAMP); \
	fi

# The two FBGEMMs share a folder, so that taking out one breaks the other: where either is wrong, both
# go. TorchRec goes before each CPU install, as pip would complain that its fbgemm-gpu is missing.
install:
	@echo 'setting up .venv with the $(FBGEMM) FBGEMM: about a minute the first time'
	@rm -f .venv/.ready-*
	@$(PIP) --version >/dev/null 2>&1 || { rm -rf .venv && $(PYTHON) -m venv .venv; }
	@if $(PIP) show -q $(OTHER_FBGEMM) 2>/dev/null || ! $(GUARD) 2>/dev/null; then \
		$(PIP) uninstall -q -y fbgemm-gpu fbgemm-gpu-cpu 2>/dev/null; \
	fi
ifeq ($(FBGEMM),cuda)
	@if $(PIP) freeze 2>/dev/null | grep -q '^torch==.*+cpu'; then $(PIP) uninstall -q -y torch; fi
	$(PIP_INSTALL) -e '.[cuda,das,dev,examples]'
else
	@$(PIP) uninstall -q -y torchrec 2>/dev/null
	$(PIP_INSTALL) -e '.[cpu,das,dev,examples]'
	$(PIP_INSTALL) --no-deps $(TORCHREC)
endif
	@$(GUARD) || { echo 'To choose the FBGEMM yourself: make FBGEMM=cpu test, or FBGEMM=cuda'; false; }
