#!/usr/bin/env bash
# All figures of docs/engine_performance.md on one GPU, about ten minutes on an H200. STAGES="tests prefill" runs some.
. benchmarks/gpu/common.sh
engine=tests/unit/engine
# They measure free memory, so nothing else may run on the GPU beside them.
alone=("$engine/test_engine_on_gpu.py::test_bfloat16_on_a_measured_pool" "$engine/test_prefill_graphs_on_gpu.py::test_memory_of_the_graphs_is_counted")
bench() { stage "$1" "$2" python3 -m baton bench engine --out "$RESULTS/$1.json" --commit "$COMMIT" "${@:3}"; }

if wanted tests; then
  stage tests 200 "${pytest[@]}" -v -n 15 tests/kernels --ignore=tests/kernels/test_compile_gate.py "$engine"/test_*_on_gpu.py "${alone[@]/#/--deselect=}"
  stage tests_alone 80 "${pytest[@]}" -v "${alone[@]}"
fi
if wanted prefill; then # first tokens with and without graphs of short prompts, decode steps
  bench prefill_graphs 90 --part prefill
  bench prefill_eager_and_decode 130 --part prefill --part decode --prefill-graph-tokens 0
fi
if wanted kernels; then
  stage kernels 110 python3 -m baton bench kernels --out "$RESULTS/kernels.json" --commit "$COMMIT"
fi
if wanted whole; then
  bench whole 190
fi
