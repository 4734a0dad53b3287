# Sourced by the scripts beside it. Run them from the repository's root; RESULTS names the folder for what they write.
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export NCCL_NVLS_ENABLE=0 TORCH_SYMM_MEM_DISABLE_MULTICAST=1 NVSHMEM_DISABLE_NVLS=1
RESULTS=${RESULTS:-/tmp/baton-results}
COMMIT=${COMMIT:-$(cat COMMIT 2>/dev/null || git rev-parse --short HEAD)}
mkdir -p "$RESULTS"

# Plain pytest: the settings of pyproject.toml need plugins that the figures do not.
pytest=(python3 -m pytest -c /dev/null --rootdir="$PWD" -o asyncio_mode=auto -p no:cacheprovider --tb=short)

# stage NAME LIMIT_S COMMAND...: runs it with its log in RESULTS, then prints its exit code, seconds and the end of its log.
stage() {
  local name=$1 limit=$2 start code
  shift 2
  start=$(date +%s)
  timeout -k 5 "$limit" "$@" > "$RESULTS/$name.log" 2>&1
  code=$?
  echo "== $name: exit code $code, $(( $(date +%s) - start )) s"
  grep -av " INFO \|Warning\|[│┃━┡└]" "$RESULTS/$name.log" | tail -n 40 | cut -c1-250
}

# wanted NAME: whether STAGES, which is empty for all, holds it.
wanted() { [[ -z "${STAGES:-}" || " $STAGES " == *" $1 "* ]]; }
