#!/usr/bin/env bash
# The served figures on two GPUs of one host, about five minutes on H200s: one prefill and one decode worker, then two
# colocated. PLAN may name another plan of benchmarks/served/plans, SCALE shrinks the number of requests.
. benchmarks/gpu/common.sh
served() { stage "$1" "$2" python3 -m baton bench served "${PLAN:-benchmarks/served/plans/two_gpus.yaml}" --out "$RESULTS/$1" --no-raw --scale "${SCALE:-1}" --commit "$COMMIT" "${@:3}"; }

served 1p1d 220 --budget 195 --layout "1 prefill + 1 decode"
served colocated 122 --budget 100 --layout "2 colocated, budget 512"
