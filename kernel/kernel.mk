# Targets of the compiled kernel; included by the Makefile of the repository. Nothing here needs a GPU but kernel-gpu.

.PHONY: kernel kernel-cuda test-kernel kernel-fuzz kernel-benchmark kernel-gpu

KERNEL_SANITIZED := build/kernel-sanitized
SANITIZER_RUNTIME = $(shell $${CXX:-g++} -print-file-name=libasan.so) $(shell $${CXX:-g++} -print-file-name=libubsan.so)

kernel: install  ## the CPU kernel for the installed torch
	$(BIN)/python kernel/dev_build.py

kernel-cuda: install  ## compile the CUDA kernel for sm_80, sm_90 and sm_100 (needs nvcc, no GPU)
	$(BIN)/python kernel/dev_build.py --backend cuda

test-kernel: kernel  ## the kernel's own tests
	cd kernel && $(abspath $(BIN))/python -m pytest -q -c /dev/null --rootdir=. -p no:cacheprovider tests

kernel-fuzz: install  ## random calls of a build with address and undefined-behavior sanitizers
	$(BIN)/python kernel/dev_build.py --sanitize --output $(KERNEL_SANITIZED)
	LOCAL_KERNELS=vfmtok-hf/vfmtok-msda=$(abspath $(KERNEL_SANITIZED)) LD_PRELOAD="$(SANITIZER_RUNTIME)" \
		ASAN_OPTIONS=detect_leaks=0:verify_asan_link_order=0 $(BIN)/python kernel/tests/fuzz.py --cases 5000

kernel-benchmark: kernel  ## plain torch against the kernel, eager and compiled, as ratios
	$(BIN)/python kernel/benchmarks/benchmark_ms_deform_attn.py --device cpu \
		--output benchmarks/results/deformable_attention.csv

kernel-gpu: install  ## every check and benchmark of the CUDA kernel, on a machine with a GPU
	$(BIN)/python benchmarks/run_on_gpu outputs/gpu --parts kernel
