# Vivim in C. `make` says what was found and what can be built; README.md says how to use it.
# make CC=clang, make OPENMP=0 (one thread), make NATIVE=0 (any x86-64 or Arm), make SANITIZE=1 (slow, finds bugs)

CC     ?= cc
OPENMP ?= 1
NATIVE ?= 1

# a flag is used if the compiler takes it
try = $(shell echo 'int main(void) { return 0; }' | $(CC) -Werror $(1) -x c - -o /dev/null 2>/dev/null && echo '$(1)')

# No -ffast-math: NaN must stay detectable. What fast code needs is allowed one by one: multiply-adds, no errno, no traps.
CFLAGS  = -std=c99 -pedantic -Wall -Wextra -Wshadow -Wc++-compat -O3 -ffp-contract=fast -fno-math-errno -fno-trapping-math -MMD -MP
LDLIBS  = -lm
ifeq ($(NATIVE),1)
CFLAGS += $(call try,-march=native) $(call try,-mprefer-vector-width=512)
endif
ifeq ($(OPENMP),1)
CFLAGS += $(or $(call try,-fopenmp),$(call try,-Wno-unknown-pragmas))
else
CFLAGS += -Wno-unknown-pragmas
endif
ifeq ($(SANITIZE),1)
CFLAGS += -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1
endif
ifeq ($(WERROR),1)
CFLAGS += -Werror
endif

CFLAGS := $(CFLAGS)
DATA   = data/phantom_train.bin data/phantom_val.bin data/phantom_train_affine.safetensors
TESTS  = test_vivim test_vivim_double dev/test_metrics
PREPRO = prepro/phantom prepro/frames prepro/affine prepro/overlay
DEV    = dev/evaluate dev/report

.PHONY: help prepro dev data test clean
help:
	@echo "compiler: $(CC)$(if $(findstring -fopenmp,$(CFLAGS)),, - without OpenMP, one thread only: install libgomp or libomp)"
	@echo "images:   $(if $(HAVE_IMAGES),libjpeg and libpng found,libjpeg or libpng missing, so no prepro/frames: $(IMAGE_HINT))"
	@echo
	@echo "make train_vivim   the program, synthetic clips to train on, the affine constraint's network; then ./train_vivim"
	@echo "make prepro        prepro/phantom (synthetic clips), prepro/frames (your images and videos -> shards),"
	@echo "                   prepro/affine (a shard -> the network of the affine constraint), prepro/overlay (predictions -> pictures)"
	@echo "make dev           dev/evaluate (predictions -> scores in all protocols), dev/report (a run -> one HTML page)"
	@echo "make data          the synthetic clips and their network alone: $(DATA)"
	@echo "make test          build and run all tests"
	@echo "make clean         remove what was built, but not data/ and out/"

train_vivim: train_vivim.c | $(DATA)
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

test_vivim: test_vivim.c
	$(CC) $(CFLAGS) $< -o $@ $(LDLIBS)

# the same source with every float a double: finite differences, and golden numbers to more digits
test_vivim_double: test_vivim.c
	$(CC) $(CFLAGS) -DVIVIM_DOUBLE $< -o $@ $(LDLIBS)

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

prepro: $(PREPRO)

dev: $(DEV)

data: $(DATA)
data/phantom_train.bin: | prepro/phantom
	@mkdir -p data
	prepro/phantom --out $@ --videos 60 --frames 8 --size 64x64 --seed 1
data/phantom_val.bin: | prepro/phantom
	@mkdir -p data
	prepro/phantom --out $@ --videos 16 --frames 8 --size 64x64 --seed 2
data/phantom_train_affine.safetensors: | data/phantom_train.bin prepro/affine
	prepro/affine --shard data/phantom_train.bin --out $@

# threads that wait must not hold a core that others need (train_vivim sees to that itself)
test: export GOMP_SPINCOUNT ?= 50000
test: $(TESTS) train_vivim prepro dev data
	./test_vivim
	./test_vivim_double
	dev/test_metrics
	dev/test_cli.sh
	dev/test_resume.sh
	dev/test_pictures.sh
	dev/test_evaluate.sh

clean:
	rm -f train_vivim $(TESTS) $(PREPRO) $(DEV) *.d prepro/*.d dev/*.d

-include $(wildcard *.d prepro/*.d dev/*.d)
