#!/usr/bin/env bash
# What ten minutes of one accelerator are good for: tests on it, step times, trainings.
#
#   experiments/accelerator_run.sh [--toy] [OUT]
#
# OUT (default experiments/results/accelerator, or the environment variable OUT) gets, as it comes,
#   tests.json                 the tests marked "accelerator", run on the device
#   steps.json                 training steps at 800 x 1344, ours beside transformers', and the goals
#   main_shapes.json           rows of the embedded set's main table that are not done yet, and manifests/
#   log.txt, logs.txt          what was done when, and the end of what each part printed
# What is written stays when something fails or time runs out; run it again and the trainings go on.
# Nothing is downloaded. Environment: PYTHON (with this package's requirements and those of its tests,
# jax with its plug-in for PLATFORM, which is cuda), THEIR_PYTHON (with torch and transformers for their
# rows, and numpy; PYTHON), BUDGET (seconds, 540), TESTS and STEPS (seconds of it at most, 120 and 340),
# PARTS ("tests steps train"; "data" only draws the trainings' images), WORK (the trainings' folder,
# runs/accelerator), JOBS (trainings side by side, 8), ONLY (rows of main_shapes.py with these words),
# ROWS for other steps:
# "ours:FAMILY:VARIANT[:a.b=value]" and "theirs:FAMILY:MODE" with commas between them and semicolons
# between groups.
# --toy: tiny models on whatever there is, to try the script itself.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
TOY=""
if [ "${1:-}" = --toy ]; then
  TOY=--toy
  shift
fi
OUT=$(realpath -m "${1:-${OUT:-experiments/results/accelerator}}")
PYTHON=${PYTHON:-python3}
THEIR_PYTHON=${THEIR_PYTHON:-$PYTHON}
PLATFORM=${PLATFORM:-cuda}
BUDGET=${BUDGET:-540}
TESTS=${TESTS:-120}
STEPS=${STEPS:-340}
PARTS=${PARTS:-tests steps train}
WORK=${WORK:-runs/accelerator}
JOBS=${JOBS:-8}
ONLY=${ONLY:-${TOY:+detr_w4_ptq_mse}} # nothing that is trained
# A group compiles side by side and is then measured, row by row: the first hold what matters most.
ROWS=${ROWS:-"ours:detr:float recipe,ours:detr:lsq,theirs:detr:compiled,theirs:detr:eager;\
ours:detr:float,ours:detr:everything,theirs:deformable:eager,ours:deformable:float recipe;\
ours:deformable:lsq,theirs:deformable:compiled,ours:deformable:float;ours:deformable:everything"}
mkdir -p "$OUT" "$WORK/logs"
rm -f "$WORK"/logs/*.txt # of an earlier run
LOCK=$WORK/device.lock
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 TF_CPP_MIN_LOG_LEVEL=2
# A model hub would only be waited for.
export HF_HUB_OFFLINE=1
# Without its plug-in jax would take the CPU, and say little: then every row shall fail at once.
[ -n "$TOY" ] || export JAX_PLATFORMS=$PLATFORM,cpu
# Many processes share the card.
export XLA_PYTHON_CLIENT_PREALLOCATE=false
# Compiling is most of the run: what was compiled once in WORK is not compiled again.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$(realpath -m "$WORK")/compiled}
START=$SECONDS
GRACE=10
failed=0

say() { echo "$((SECONDS - START)) s: $*" | tee -a "$OUT/log.txt"; }
# Without what a command that is stopped may take to end.
left() { echo $((BUDGET - GRACE - SECONDS + START)); }
wants() { [[ " $PARTS " == *" $1 "* ]]; }

# limited SECONDS NAME COMMAND...: its output to a log of its own; asked to stop, then killed.
limited() {
  local seconds=$1 name=$2
  shift 2
  if [ "$seconds" -lt 5 ]; then
    say "$name: no time left"
    return 1
  fi
  timeout -k $GRACE "$seconds" "$@" >"$WORK/logs/$name.txt" 2>&1
  local rc=$?
  say "$name: exit $rc$([[ $rc = 124 || $rc = 137 ]] && echo ', out of time')"
  [ $rc = 0 ] || grep -v '^\s*$' "$WORK/logs/$name.txt" | tail -n 3 | cut -c1-300 | tee -a "$OUT/log.txt"
  return $rc
}

# The end of every log in one file.
keep_logs() {
  local log
  for log in "$WORK"/logs/*.txt; do
    [ -f "$log" ] && printf '\n===== %s\n' "$(basename "$log")" && tail -n 60 "$log" | cut -c1-2000
  done >"$OUT/logs.txt"
}
trap keep_logs EXIT

run_tests() {
  # As one that compiles: nothing is measured meanwhile.
  AQDETR_TEST_PLATFORM=$PLATFORM limited "$TESTS" tests flock -s "$LOCK" \
    "$PYTHON" -m pytest -m accelerator -vv -W default -n 4 --dist worksteal \
    tests/training tests/models tests/ops tests/losses tests/quant # what compiles longest first
  local rc=$?
  "$PYTHON" experiments/accelerator_rows.py tests "$WORK/logs/tests.txt" "$OUT/tests.json" |
    cut -c1-2000 | tee -a "$OUT/log.txt"
  return $rc
}

# One group of rows; half of what is left for the steps may go into compiling it.
run_group() {
  local pids=() limit=$1 rows row whose family variant override name options rc=0
  IFS=, read -ra rows <<<"$2"
  for row in "${rows[@]}"; do
    IFS=: read -r whose family variant override <<<"$row"
    name=${row//[:= ]/_}
    options=(--family="$family" --out="$OUT/steps.json" --lock="$LOCK" --deadline=$((limit / 2)))
    local python=$PYTHON
    if [ "$whose" = ours ]; then
      options+=(--variant="$variant" ${override:+"--label=, $override" "$override"})
    else
      python=$THEIR_PYTHON
      options+=(--mode="$variant")
    fi
    limited "$limit" "$name" "$python" "experiments/accelerator_$whose.py" "${options[@]}" $TOY &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || rc=1; done
  return $rc
}

run_steps() {
  local groups group end rc=0
  end=$((SECONDS + ($(left) < STEPS ? $(left) : STEPS)))
  IFS=';' read -ra groups <<<"$ROWS"
  for group in "${groups[@]}"; do run_group $((end - SECONDS)) "$group" || rc=1; done
  rm -f "$OUT/steps.lock"
  "$PYTHON" experiments/accelerator_rows.py show "$OUT" | tee -a "$OUT/log.txt"
  return $rc
}

data=(data.cache_dir="$WORK/data" data.num_threads=4)
[ -n "$TOY" ] && data+=(data.num_eval=8)

draw_data() {
  # Drawn once, by the CPUs, for all trainings.
  JAX_PLATFORMS=cpu limited "$(left)" data "$PYTHON" - "${data[@]}" <<'PYTHON'
import sys

from aqdetr_jax.data.open import open_dataset
from aqdetr_jax.training.experiment import load_experiment

for split in ("validation", "test"):
    words = (*sys.argv[1:], f"data.eval_split={split}")
    data = load_experiment("shapes_quickstart", words).data
    for train in (True, False):
        print(open_dataset(data, train=train).name)
PYTHON
}

# They share the rows that are left, and go on with those that were begun.
run_training() {
  local pids=() rc=0 number
  [ -f "$OUT/main_shapes.json" ] || [ -n "$TOY" ] ||
    cp experiments/results/main_shapes.json "$OUT/main_shapes.json"
  for number in $(seq "$JOBS"); do
    limited "$(left)" "train_$number" "$PYTHON" experiments/main_shapes.py --work="$WORK/main" \
      --out="$OUT/main_shapes.json" --manifests="$OUT/manifests" --only="$ONLY" "${data[@]}" &
    pids+=($!)
  done
  for pid in "${pids[@]}"; do wait "$pid" || rc=1; done
  grep -h '^=== .*: ' "$WORK"/logs/train_*.txt | tee -a "$OUT/log.txt"
  return $rc
}

say "start${TOY:+, toy}: $PARTS"
if wants train || wants data; then draw_data & drawing=$!; fi
if wants tests; then run_tests & testing=$!; fi
if wants steps; then run_steps || failed=1; fi
if wants tests; then wait $testing || failed=1; fi
[ -z "${drawing:-}" ] || wait "$drawing"
if wants train; then run_training || failed=1; fi
say "done$([ $failed = 0 ] || echo ', not all of it')"
exit $failed
