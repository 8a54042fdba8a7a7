# cudaemu.sed - turns a CUDA file into the C++ that dev/cudaemu.h runs. Line numbers stay. On one line must stand: a launch,
# up to its "(", a template kernel with its arguments; the declaration of dynamic shared memory; one of static shared memory,
# for each array its own.
s/^#include *<cuda_runtime\.h>.*//
s/^#include *<\(cublas_v2\|cublasLt\|cuda_bf16\|cuda_profiler_api\|mma\)\.h>.*//
s/extern *__shared__ *\([A-Za-z_0-9]*\) *\([A-Za-z_0-9]*\)\[\] *;/\1 *\2 = (\1 *)emu::dynamic_shared;/
s/__shared__ *\([^;]*[ *]\)\([A-Za-z_0-9]*\)\(\(\[[^;]*\)\{0,1\}\);/__shared__ \1\2\3; emu::fresh(\2);/
s/\([A-Za-z_][A-Za-z_0-9]*\(<[^<>]*>\)\{0,1\}\)<<<\(.*\)>>>(/emu::Launch(\3)(\1, /
/emu::Launch(/ s/, )/)/
