#!/bin/sh
# weight_only_kernel on the CPU: a thread a CUDA thread, mma.sync and cp.async in C++, copies as late and as early as the
# kernel's waits allow, every address checked. From the repository's root: sh scratch/emulate/run.sh
set -e
export PYTHONPATH=python:.
E=/tmp/weight_only_emulated; rm -rf $E; mkdir -p $E/gemm; cp -r scratch/emulate/* $E
.venv/bin/python - $E/gemm/emulated.cuh <<'PY'
import re, sys
s = open("csrc/gemm/weight_only.cuh").read()
s = s[: s.index("// --- Launch ---")] + "}  // namespace\n}  // namespace fastkernels\n"
s = s.replace("extern __shared__ __align__(16) char shared[];", "char* shared = emu::me.block->shared;")
s = s.replace("threadIdx.x", "emu::me.thread").replace("blockIdx.x", "emu::me.block->x")
s = s.replace("blockIdx.y", "emu::me.block->y")
s = s.replace("__syncthreads()", "emu::me.block->all->arrive_and_wait()")
s = s.replace("__syncwarp()", "emu::me.warp->all.arrive_and_wait()")
open(sys.argv[1], "w").write(re.sub(r"__launch_bounds__\([^)]*\)", "", s))
PY
CUDA=$(dirname $(dirname $(readlink -f /usr/local/cuda-13.0/bin/nvcc)))
g++ -std=c++20 -O1 -w -pthread -I$E -I$CUDA/include -Icsrc -Icsrc/include -o $E/emu $E/main.cpp
.venv/bin/python $E/dump.py $E
for x in "int4-g128 0" "int4-g32-zeros 5" "int8 6" "e4m3-block 8" "nvfp4 9"; do set -- $x; $E/emu $E/$1.bin $1 $2 all; done
