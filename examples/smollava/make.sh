#!/bin/sh
# From pictures to SmolLaVA, its draft and the draft's figures: sh make.sh DATA OUT
# A run that was interrupted goes on where it stopped.
set -eu
data=$(realpath "$1")
mkdir -p "$2"
out=$(realpath "$2")
cd "$(dirname "$0")"
# Memory that was freed is kept, which makes training on a CPU steadier.
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000

# The tower sees every picture once (3.5 GB); then projector and LoRA.
[ -d "$out/cache" ] || { python cache_features.py --data "$data" --out "$out/cache.part" && mv "$out/cache.part" "$out/cache"; }
python train_target.py --cache "$out/cache" --out "$out/target" --answer-minutes 25

# Pictures and questions; the target answers, and reads the texts that it was trained on.
python write_requests.py --data "$data" --out "$out/requests"
asked="--model demo:$out/target --dtype bfloat16 --image-root $out/requests/pictures"
vispec train collect $asked --source "$out/requests/requests.jsonl" --extension "" --max-new-tokens 200 \
    --temperatures 0 1 --max-repeated 0.3 --batch-size 48 --shard-size 144 --limit 1200 --out "$out/answers"
vispec train collect $asked --source "$out/requests/requests.jsonl" --extension "" --max-new-tokens 200 \
    --read --max-repeated 0.3 --limit 1500 --out "$out/read"

resume=
[ ! -d "$out/draft/checkpoints" ] || resume=--resume
vispec train fit --model "demo:$out/target" --dtype bfloat16 --config draft.yaml \
    --data "$out/answers" "$out/read" --out "$out/draft" $resume
vispec train eval $asked --source "$out/requests/held_out.jsonl" --extension "" --limit 48 --max-new-tokens 64 \
    --max-repeated 0.3 --draft "$out/draft" --out "$out/figures.json"
