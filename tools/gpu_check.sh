#!/usr/bin/env bash
# Builds and checks fastkernels on a machine with a GPU, nvcc and a CUDA torch. Needs no network.
#
#   tools/gpu_check.sh build              CMake and Ninja, for the GPU that is there, into python/fastkernels
#   tools/gpu_check.sh test [PYTEST ARGS] all tests, a process a file, JOBS files at a time
#   tools/gpu_check.sh sanitize           memcheck, racecheck and synccheck of every kernel, over the op tests;
#                                         TOOLS: some of the three, NTH: every n-th test
#   tools/gpu_check.sh all                the three of them
#
# Beside torch it needs cmake, ninja, pybind11, and for the tests pytest, pytest-timeout, hypothesis, typer
# and transformers; carry what is missing as wheels. Logs go to OUT (default: build/gpu_check).
set -euo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-build/gpu_check}
jobs=${JOBS:-8}
mkdir -p "$out"
export PYTHONPATH=$PWD/python${PYTHONPATH:+:$PYTHONPATH}

build() {
  local architecture
  architecture=$(python3 -c 'import torch; a, b = torch.cuda.get_device_capability(); print(f"{a}{b}" + "a" * (a == 9) + "-real")')
  CXX=$(command -v g++) cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v python3)" -DFASTKERNELS_CUDA=ON \
    -DFASTKERNELS_CUDA_ARCHITECTURES="$architecture" >"$out/cmake.log" || { cat "$out/cmake.log"; return 1; }
  ninja -C build/gpu >"$out/build.log" || { grep -A8 -E 'error|FAILED' "$out/build.log" | head -60; return 1; }
  cmake --install build/gpu --prefix python >>"$out/build.log"
  echo "build: for sm_$architecture in ${SECONDS} s"
}

# One line a file as it ends; the failures last.
run_files() { # name, command..., with {} for the file; files on stdin
  local name=$1 began=$SECONDS failed
  shift
  rm -rf "$out/$name"
  mkdir -p "$out/$name"
  xargs -P "$jobs" -I{} bash -c '
    log=$0/$(echo "$1" | tr " /" __).log; shift
    "$@" >"$log" 2>&1; rc=$?
    [ $rc -eq 5 ] && rc=0  # pytest: no test was selected
    echo "rc $rc  $(tail -n 1 "$log" | cut -c1-120)  ${log##*/}"
  ' "$out/$name" {} "$@" | tee "$out/$name.txt"
  failed=$(grep -vc '^rc 0 ' "$out/$name.txt" || true)
  cat "$out/$name"/*.log >"$out/$name.log"
  echo "$name: $failed of $(wc -l <"$out/$name.txt") files failed, $((SECONDS - began)) s"
  [ "$failed" -eq 0 ] || { grep -hE '^(FAILED|ERROR|E   )' "$out/$name.log" | cut -c1-300 | head -80; return 1; }
}

run_tests() {
  find tests -name 'test_*.py' | sort |
    OMP_NUM_THREADS=2 run_files tests python3 -m pytest -p no:cacheprovider --tb=short {} "$@"
}

# racecheck takes seconds for a test that launches large grids, so of these files it sees every sixth test.
slow='attention|paged|sampling|matmul|weight_only|product_sizes'

sanitize() {
  # racecheck breaks the kernels of cuBLAS that the references call ("failed to handle a hardware exception").
  export FASTKERNELS_REFERENCE_ON_CPU=1
  local tool select nth=${NTH:-1} slow_nth failed=0
  for tool in ${TOOLS:-memcheck racecheck synccheck}; do
    select='not cpu' slow_nth=$nth
    [ $tool = racecheck ] && select='not cpu and not distribution and not its_batch and not 128256 and not 26214' slow_nth=6
    {
      find tests/ops -name 'test_*.py' | grep -E "$slow" | sort | sed "s/^/$slow_nth /"
      find tests/ops -name 'test_*.py' | grep -vE "$slow" | sort | sed "s/^/$nth /"
    } | OMP_NUM_THREADS=2 run_files "$tool" bash -c 'FASTKERNELS_EVERY_NTH_TEST=${1% *} timeout ${TIME:-600} \
        compute-sanitizer --tool "$2" --kernel-name kns=fastkernels --error-exitcode 9 \
        python3 -m pytest -p no:cacheprovider --tb=short -k "$3" --timeout=0 "${1#* }"' sanitize {} "$tool" "$select" || failed=1
    grep -hE '^========= (ERROR SUMMARY|RACECHECK SUMMARY)' "$out/$tool.log" | sort | uniq -c
  done
  return $failed
}

command=${1:-all}
shift || true
case $command in
  build) build ;;
  test) run_tests "$@" ;;
  sanitize) sanitize ;;
  all) build && run_tests && sanitize ;;
  *) sed -n '2,11p' "$0" >&2; exit 2 ;;
esac
