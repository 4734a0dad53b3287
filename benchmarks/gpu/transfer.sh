#!/usr/bin/env bash
# All figures of docs/transfer_performance.md on two GPUs of one host, about six minutes on H200s. STAGES as in engine.sh.
. benchmarks/gpu/common.sh
bench() { stage "$1" "$2" python3 -m baton bench transfer --context 1024 --no-plot --commit "$COMMIT" --out "$RESULTS/$1.json" "${@:3}"; }

if wanted short; then
  bench transfer 95 --repeats 11 --window-s 1.2 --tokens 512 --tokens 2048 --tokens 8192 --part raw --part idle --part batch --part steps --part packing --part epochs
fi
if wanted hops; then # where the time goes: every change of threads of every chunk, in the JSON
  bench transfer-hops 60 --hops --repeats 7 --window-s 1 --tokens 512 --tokens 8192 --part raw --part idle --part batch
fi
if wanted long; then # 118 GB of GPU memory
  bench transfer-long 125 --repeats 2 --window-s 1 --tokens 32768 --tokens 131008 --batch 16 --part raw --part long
fi
if wanted kills; then # ten with float32, tokens against transformers, and ten with bfloat16, the divergence printed
  stage kills 180 "${pytest[@]}" -s tests/cluster/test_kills.py
fi
if wanted doctor; then
  stage doctor 60 python3 -m baton doctor
fi
