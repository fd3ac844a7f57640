#!/usr/bin/env bash
# Fine-tuning on published English data: trains on MedQuAD, MTS-Dialog, PubMedQA and the bilingual sample, evaluates on
# MMLU-medical, MedQA, MedMCQA and the 500 test questions of PubMedQA.
#     scripts/published_data.sh --data DIR [--out DIR] [--steps N] [--limit N]
# DIR contains medquad, mts_dialog, pubmedqa, mmlu_medical_en, medqa_usmle_en and medmcqa_en. --limit is the number of
# questions per task and of held-out records (100; "all" for all of them). Takes an hour or more on two cores. It can be
# stopped at any time and run again: finished stages are kept, and training resumes.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup_env.sh"

data="" out="runs/published-data" steps=300 limit=100
while (($#)); do
    (($# > 1)) || stop "$1 needs a value"
    case "$1" in
        --data) data="$2" ;;
        --out) out="$2" ;;
        --steps) steps="$2" ;;
        --limit) limit="$2" ;;
        *) stop "unknown option $1; the options are --data, --out, --steps and --limit" ;;
    esac
    shift 2
done
[[ -d "$data" ]] || stop "give --data the folder that contains the folders of the data sets; see the first lines of $0"
ensure_env run "" "about 0.25 GB to download, 1 GB on disk"
bimedix="$VENV/bin/bimedix"
mkdir -p "$out"

# once FILE COMMAND...: run the command unless FILE exists
once() {
    local result="$1"
    shift
    if [[ -e "$result" ]]; then
        echo "kept: $result" >&2
    else
        "$@"
    fi
}

limits=()
[[ "$limit" == all ]] || limits=(--limit "$limit")
measure=("$bimedix" eval run --model "$out/base" --base nf4 --heldout "$out/records/heldout.jsonl" --tasks all
    --data "$data" "${limits[@]}")

once "$out/base" "$bimedix" upcycle --out "$out/base"
once "$out/records" "$bimedix" data assemble published-data --data "$data" --out "$out/records"
once "$out/packed" "$bimedix" data pack --records "$out/records/train.jsonl" --tokenizer "$out/base" \
    --out "$out/packed" --sequence-length 1024
once "$out/before.json" "${measure[@]}" --out "$out/before.json"
resume=()
[[ -e "$out/run/config.json" ]] && resume=(--resume)
once "$out/run/adapter" "$bimedix" train quickstart --out "$out/run" --data "$out/packed" --model "$out/base" \
    --rows 2 --steps "$steps" --learning-rate 5e-4 --checkpoint-every 20 --set name=published-data \
    --set optimiser.warmup_steps=10 "${resume[@]}"
once "$out/after.json" "${measure[@]}" --adapter "$out/run/adapter" --compare "$out/before.json" --out "$out/after.json"
"$VENV/bin/python" - "$out" <<'PYTHON'
import json, pathlib, sys
from bimedix_jax.training.metrics_file import read_metrics
from bimedix_jax.training.picture import draw_run
out = pathlib.Path(sys.argv[1])
before, after = (json.loads((out / f"{name}.json").read_text())["heldout"]["bits_per_byte"] for name in ("before", "after"))
draw_run(read_metrics(out / "run"), before, after, out / "run.png", "Fine-tuning on published medical data")
PYTHON
echo "Picture: $out/run.png. Before: $out/before.json. After: $out/after.json. Training: $out/run/metrics.jsonl"
