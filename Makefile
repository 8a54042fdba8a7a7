# Vivim in C. `make` says what was found and what can be built; README.md says how to use it.
# make CC=clang, make OPENMP=0 (one thread), make NATIVE=0 (any x86-64 or Arm), make SANITIZE=1 (slow, finds bugs)
# make USE_MPI=1 train_vivim (several processes: mpirun -n 2 ./train_vivim)
# make AMX=1 train_vivim test_vivim (Intel processors with AMX: matrix products of bfloat16; AMX=3: of float's precision)

CC     ?= cc
OPENMP ?= 1
NATIVE ?= 1
AMX    ?= 0

# a flag is used if the compiler takes it
try = $(shell echo 'int main(void) { return 0; }' | $(CC) -Werror $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')

# No -ffast-math: NaN must stay detectable. What fast code needs is allowed one by one: multiply-adds, no errno, no traps.
CFLAGS  = -std=c99 -pedantic -Wall -Wextra -Wshadow -Wc++-compat -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -MMD -MP
LDLIBS  = -lm -pthread
ifeq ($(NATIVE),1)
CFLAGS += $(call try,-march=native) $(call try,-mprefer-vector-width=512)
endif
ifeq ($(OPENMP),1)
CFLAGS += $(or $(call try,-fopenmp),$(call try,-Wno-unknown-pragmas))
else
CFLAGS += -Wno-unknown-pragmas
endif
ifeq ($(SANITIZE),1)
CFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1 -DHELD_OUT_PAIRS=256
endif
ifeq ($(WERROR),1)
CFLAGS += -Werror
endif

CFLAGS := $(CFLAGS)

# matrix products in an Intel processor's tile registers, each number rounded to so many bfloat16: dev/matmul_amx.h
$(if $(filter 0 1 3,$(AMX)),,$(error AMX=$(AMX): 1 or 3, or 0 for none))
ifneq ($(AMX),0)
AMX_FLAGS = -DVIVIM_AMX=$(AMX) -mamx-tile -mamx-bf16 -mavx512bf16
endif

# what MPI's compiler would add to the command line; -isystem: its headers have warnings of their own
ifeq ($(USE_MPI),1)
MPI := $(shell mpicc -show 2>/dev/null)
MPI := $(patsubst -I%,-isystem %,$(wordlist 2,$(words $(MPI)),$(MPI)))
$(if $(MPI),,$(error USE_MPI=1: there is no mpicc: apt-get install libopenmpi-dev openmpi-bin, or another MPI))
MPI += -DUSE_MPI
endif
# changes when these do, so that what was built without is built again
$(shell echo 'USE_MPI=$(USE_MPI)' | cmp -s - .mpi 2>/dev/null || echo 'USE_MPI=$(USE_MPI)' > .mpi)
$(shell echo 'AMX=$(AMX)' | cmp -s - .amx 2>/dev/null || echo 'AMX=$(AMX)' > .amx)
$(shell echo 'PRECISION=$(PRECISION)' | cmp -s - .precision 2>/dev/null || echo 'PRECISION=$(PRECISION)' > .precision)

DATA   = data/phantom_train.bin data/phantom_val.bin data/phantom_train_affine.safetensors
TESTS  = test_vivim test_vivim_double dev/test_metrics
PREPRO = prepro/phantom prepro/frames prepro/affine prepro/overlay
DEV    = dev/evaluate dev/report dev/mixers
LAB    = dev/scan_forward dev/scan_backward dev/dwconv3d dev/layernorm dev/attention dev/matmul
LAB_CU = dev/scan_forward_cu dev/scan_backward_cu dev/dwconv3d_cu dev/layernorm_cu dev/attention_cu
LAB_EMU = $(LAB_CU:_cu=_emu)

# On a GPU, PRECISION=FP32 (as on the CPU), TF32 (factors of products rounded to 10 bits) or BF16 (activations, too, to 8 bits: the
# fastest, and half the memory)
PRECISION ?= FP32
$(if $(filter FP32 TF32 BF16,$(PRECISION)),,$(error PRECISION=$(PRECISION): FP32, TF32 or BF16))
PRECISION_FLAG = $(if $(filter-out FP32,$(PRECISION)),-DVIVIM_$(PRECISION))

# CUDA: nvcc from PATH, $CUDA_HOME or /usr/local/cuda. Compiled for this machine's GPU, or, where there is none, for all from sm_80
# on that this nvcc knows, with PTX for later ones. CUDA_ARCH="90 100" chooses.
NVCC = $(or $(shell command -v nvcc 2>/dev/null),$(wildcard $(CUDA_HOME)/bin/nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
KNOWN_ARCH = $(filter-out 2% 3% 5% 6% 7%,$(subst sm_,,$(shell $(NVCC) --list-gpu-code 2>/dev/null | grep -x 'sm_[0-9]*')))
GPU_ARCH   = $(filter $(KNOWN_ARCH),$(sort $(subst .,,$(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null))))
PLAIN_ARCH = $(filter 80 90 100 120,$(KNOWN_ARCH))
NVCC_ARCH  = $(or $(CUDA_ARCH),$(GPU_ARCH),$(PLAIN_ARCH))
NVCC_FLAGS = -std=c++17 -O3 -diag-suppress 177 $(PRECISION_FLAG) $(foreach a,$(NVCC_ARCH),-gencode arch=compute_$(a),code=sm_$(a)) \
             -gencode arch=compute_$(lastword $(NVCC_ARCH)),code=compute_$(lastword $(NVCC_ARCH)) \
             -Xcompiler -Wall,-Wno-unused-function,-Wno-unknown-pragmas $(if $(findstring -fopenmp,$(CFLAGS)),-Xcompiler -fopenmp) \
             $(if $(findstring -march=native,$(CFLAGS)),-Xcompiler -march=native) -Xcompiler -ffp-contract=fast -Xcompiler -fno-math-errno
# NCCL, for several GPUs: beside the Toolkit or the system's; NO_NCCL=1 builds without
CUDA_DIR   = $(patsubst %/bin/nvcc,%,$(realpath $(NVCC)))
NCCL_LIB   = $(if $(wildcard $(CUDA_DIR)/include/nccl.h /usr/include/nccl.h),$(firstword $(wildcard $(CUDA_DIR)/lib64/libnccl.so \
             $(CUDA_DIR)/lib/libnccl.so /usr/lib64/libnccl.so /usr/lib/*/libnccl.so)))
ifeq ($(NO_NCCL),1)
NCCL_LIB   =
endif
COMMA     := ,
NVCC_LIBS  = -lcublas -lcublasLt $(if $(NCCL_LIB),-L$(dir $(NCCL_LIB)) -lnccl -Xlinker -rpath=$(dir $(NCCL_LIB)),-DNO_NCCL) \
             $(filter-out -pthread,$(patsubst -Wl$(COMMA)%,-Xlinker %,$(MPI)))
NO_NVCC    = the CUDA Toolkit is needed, and nvcc is not in PATH, $$CUDA_HOME/bin or /usr/local/cuda/bin (set CUDA_HOME)

# The same without a GPU: dev/cudaemu.h runs the kernels on the CPU, under the sanitizers, in three orders of blocks, warps and lanes
EMU_FLAGS  = -std=c++17 -g1 -O1 -Wall -Wno-unused-function -Wno-unknown-pragmas -Wno-sign-compare -fsanitize=address,undefined \
             -fno-sanitize-recover=all -include dev/cudaemu.h -I. -Ibuild -MMD -MP -DNO_NCCL \
             $(PRECISION_FLAG)
EMU_ORDERS = forward reverse 7
# left out, for they take minutes: trajectory, ten steps, plan, the trained network, the other models
EMU_TESTS  = op golden drop model.hash_tiny model.hash_odd ^golden.trajectory

.PHONY: help prepro dev data test test_emu test_races lab_emu nvcc clean
help:
	@echo "compiler: $(CC)$(if $(findstring -fopenmp,$(CFLAGS)),, - without OpenMP, one thread only: install libgomp or libomp)"
	@echo "images:   $(if $(HAVE_IMAGES),libjpeg and libpng found,libjpeg or libpng missing, so no prepro/frames: $(IMAGE_HINT))"
	@echo
	@echo "make train_vivim   the program, synthetic clips to train on, the affine constraint's network; then ./train_vivim"
	@echo "make prepro        prepro/phantom (synthetic clips), prepro/frames (your images and videos -> shards),"
	@echo "                   prepro/affine (a shard -> the network of the affine constraint), prepro/overlay (predictions -> pictures)"
	@echo "make dev           dev/evaluate (predictions -> scores in all protocols), dev/report (a run -> one HTML page)"
	@echo "                   and the kernel laboratory: $(LAB) (dev/README.md)"
	@echo "make data          the synthetic clips and their network alone: $(DATA)"
	@echo "make train_vivimcu test_vivimcu   the program on an NVIDIA GPU, and its tests: $(if $(NVCC),$(NVCC) for sm_$(NVCC_ARCH)$(if $(NCCL_LIB),,$(COMMA) one process only: NCCL was not found),$(NO_NVCC))"
	@echo "make test_emu      the same tests without a GPU: its kernels on the CPU, slowly, under sanitizers"
	@echo "make test_races    the operations' tests once more, with a look at every access: races between threads"
	@echo "make lab_emu       the kernel laboratory's CUDA versions (dev/README.md), checked in the same way"
	@echo "make test          build and run all tests that need no GPU"
	@echo "make clean         remove what was built, but not data/ and out/"

train_vivim: train_vivim.c .mpi .amx | $(DATA)
	$(CC) $(CFLAGS) $(AMX_FLAGS) $< -o $@ $(LDLIBS) $(MPI)

test_vivim: test_vivim.c .amx
	$(CC) $(CFLAGS) $(AMX_FLAGS) $< -o $@ $(LDLIBS)

# the same source with every float a double: finite differences, and golden numbers to more digits
test_vivim_double: test_vivim.c
	$(CC) $(CFLAGS) -DVIVIM_DOUBLE $< -o $@ $(LDLIBS)

nvcc:  # which one is used; fails if there is none
	@$(if $(NVCC),echo $(NVCC),echo "$(NO_NVCC)" >&2; exit 1)

train_vivimcu: train_vivim.cu .mpi .precision | $(DATA)
	$(if $(NVCC),,$(error $(NO_NVCC)))
	$(NVCC) $(NVCC_FLAGS) -MMD -MF $@.d -MT $@ $< -o $@ $(NVCC_LIBS)

test_vivimcu: test_vivim.c .precision
	$(if $(NVCC),,$(error $(NO_NVCC)))
	$(NVCC) $(NVCC_FLAGS) -MMD -MF $@.d -MT $@ -DVIVIM_CUDA -x cu $< -o $@ $(NVCC_LIBS)

build/train_vivim_emu.cpp: train_vivim.cu dev/cudaemu.sed
	@mkdir -p build
	sed -f dev/cudaemu.sed $< > $@

train_vivim_emu: build/train_vivim_emu.cpp dev/cudaemu.h .mpi .precision | $(DATA)
	$(CXX) $(EMU_FLAGS) $< -o $@ $(MPI)

test_vivim_emu: test_vivim.c build/train_vivim_emu.cpp dev/cudaemu.h .precision
	$(CXX) $(EMU_FLAGS) -DVIVIM_CUDA -x c++ $< -o $@

RACES_FLAGS = -fsanitize=thread -fno-pie -fno-threadsafe-statics -Wno-maybe-uninitialized
# and, slower, with a look at every access: races
test_vivim_races: test_vivim.c build/train_vivim_emu.cpp dev/cudaemu.h .precision
	$(CXX) $(filter-out -fsanitize=% -fno-sanitize%,$(EMU_FLAGS)) $(RACES_FLAGS) -DVIVIM_CUDA -x c++ -c $< -o build/$@.o
	$(CXX) -no-pie build/$@.o -o $@

prepro/phantom: prepro/phantom.c
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

IMAGE_HINT = apt-get install libjpeg-dev libpng-dev (Fedora: libjpeg-turbo-devel libpng-devel; macOS: brew install jpeg libpng)
HAVE_IMAGES = $(shell printf '\043include <stdio.h>\n\043include <jpeglib.h>\n\043include <png.h>\nint main(void) { return 0; }' | \
                $(CC) -x c - -o /dev/null -ljpeg -lpng 2>/dev/null && echo yes)
prepro/frames: prepro/frames.c
ifneq ($(HAVE_IMAGES),)
	$(CC) $(CFLAGS) $< -o $@ -ljpeg -lpng $(LDLIBS)
else
	@echo "prepro/frames is left out: it needs libjpeg and libpng: $(IMAGE_HINT)"
endif

# the pre-training of the affine constraint's network, with train_vivim.c's functions
prepro/affine: prepro/affine.c
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

# scores of anyone's predictions; dev/test_evaluate.sh needs both programs
dev/test_metrics: dev/test_metrics.c
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)
dev/evaluate: dev/evaluate.c
ifneq ($(HAVE_IMAGES),)
	$(CC) $(CFLAGS) $< -o $@ -ljpeg -lpng $(LDLIBS)
else
	@echo "dev/evaluate is left out: it needs libjpeg and libpng: $(IMAGE_HINT)"
endif

# predictions as pictures or video; a run as a page
prepro/overlay: prepro/overlay.c
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)
dev/report: dev/report.c
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

# ST-Mamba's time and memory beside attention's
dev/mixers: dev/mixers.c
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)
dev/mixers_cu: dev/mixers.c .precision
	$(if $(NVCC),,$(error $(NO_NVCC)))
	$(NVCC) $(NVCC_FLAGS) -MMD -MF $@.d -MT $@ -DVIVIM_CUDA -x cu $< -o $@ $(NVCC_LIBS)
build/mixers_emu.cpp: dev/mixers.c dev/cudaemu.sed
	@mkdir -p build
	sed -f dev/cudaemu.sed $< > $@
dev/mixers_emu: build/mixers_emu.cpp build/train_vivim_emu.cpp dev/cudaemu.h .precision
	$(CXX) $(EMU_FLAGS) -DVIVIM_CUDA $< -o $@

# the kernel laboratory on this CPU: dev/README.md. -fwhole-program leaves out what a program does not use of train_vivim.c
$(LAB): dev/%: dev/%.c
	$(CC) $(CFLAGS) $(call try,-fwhole-program) $< -o $@ $(LDLIBS) $(call try,-ldl)

# the kernel laboratory on a GPU (dev/README.md), and without one: checked on the CPU, not timed
$(LAB_CU): dev/%_cu: dev/%.cu
	$(if $(NVCC),,$(error $(NO_NVCC)))
	$(NVCC) $(NVCC_FLAGS) -MMD -MF $@.d -MT $@ $< -o $@ $(NVCC_LIBS)
build/%_cuda.h: dev/%_cuda.h dev/cudaemu.sed
	@mkdir -p build
	sed -f dev/cudaemu.sed $< > $@
build/%_emu.cpp: dev/%.cu dev/cudaemu.sed
	@mkdir -p build
	sed -f dev/cudaemu.sed $< > $@
$(LAB_EMU): dev/%_emu: build/%_emu.cpp build/lab_cuda.h build/scan_cuda.h build/train_vivim_emu.cpp dev/cudaemu.h dev/lab.h
	$(CXX) $(EMU_FLAGS) -Idev $< -o $@
LAB_RUNS = $(LAB_EMU:%=run_%)
lab_emu: $(LAB_RUNS)
$(LAB_RUNS): run_%: %
	$* all

prepro: $(PREPRO)

dev: $(DEV) $(LAB) $(if $(NVCC),$(if $(GPU_ARCH),$(LAB_CU) $(if $(filter FP32,$(PRECISION)),dev/mixers_cu)))  # CUDA where it runs

data: $(DATA)
data/phantom_train.bin: | prepro/phantom
	@mkdir -p data
	prepro/phantom --out $@ --videos 60 --frames 8 --size 64x64 --seed 1
data/phantom_val.bin: | prepro/phantom
	@mkdir -p data
	prepro/phantom --out $@ --videos 16 --frames 8 --size 64x64 --seed 2
data/phantom_train_affine.safetensors: | data/phantom_train.bin prepro/affine
	prepro/affine --shard data/phantom_train.bin --out $@

# Each test is a target of its own, for `make -j2 -O test`. Threads that wait must not hold a core that others need
# (train_vivim sees to that itself).
RUNS = $(TESTS:%=run_%) $(addprefix run_dev/test_,$(addsuffix .sh,cli resume pictures evaluate mixers lab gpu_sh))
test: $(RUNS)
$(RUNS): export GOMP_SPINCOUNT ?= 50000
$(RUNS): run_%: $(TESTS) train_vivim prepro $(DEV) $(LAB) data
	./$*

# not of a precision: the emulation itself, and the mixers, which are in float
EMU_ONCE = run_dev/test_cudaemu.sh run_mixers_emu
EMU_RUNS = $(if $(filter FP32,$(PRECISION)),$(EMU_ONCE)) $(EMU_ORDERS:%=run_order_%) run_device_emu
test_emu: $(EMU_RUNS)
$(EMU_RUNS): export ASAN_OPTIONS = detect_leaks=0
run_dev/test_cudaemu.sh:
	dev/test_cudaemu.sh
$(EMU_ORDERS:%=run_order_%): run_order_%: test_vivim_emu
	CUDAEMU_ORDER=$* ./test_vivim_emu $(EMU_TESTS)
run_device_emu: train_vivim_emu train_vivim prepro
	dev/test_device.sh ./train_vivim_emu $(if $(filter BF16,$(PRECISION)),5e-2)
run_mixers_emu: dev/mixers_emu
	CUDAEMU_ORDER=7 dev/mixers_emu --check

RACES_TESTS = op ^op.matmul  # whose kernels are cuBLAS's
test_races: test_vivim_races  # of the operations' kernels
	./test_vivim_races $(RACES_TESTS)

.PHONY: $(RUNS) $(EMU_ONCE) $(EMU_RUNS) $(LAB_RUNS)

clean:
	rm -rf build train_vivim_emu test_vivim_emu test_vivim_races train_vivimcu test_vivimcu dev/mixers_cu dev/mixers_emu $(LAB_CU) $(LAB_EMU)
	rm -f train_vivim $(TESTS) $(PREPRO) $(DEV) $(LAB) .mpi .amx .precision *.d prepro/*.d dev/*.d

-include $(wildcard *.d prepro/*.d dev/*.d)
