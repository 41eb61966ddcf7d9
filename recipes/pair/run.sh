#!/usr/bin/env bash
# Train, export and evaluate the pair from two folders of texts. Continues where it stopped when run again.
#   TEXTS=train DEV=dev OUT=run [GPUS=4] [ATTENTION=cudnn] bash pair/run.sh
# To be started in the folder above this one, with the `outrider` package importable.
set -euo pipefail
: "${TEXTS:?folder of training .txt files}" "${DEV:?folder of held-out .txt files}" "${OUT:?folder to write}"
GPUS=${GPUS:-4} ATTENTION=${ATTENTION:-any}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4} TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
tokenizer=$OUT/tokenizer.json tokens=$OUT/tokens.bin

[ -e "$tokenizer" ] || python3 -m pair.tokenizer --texts "$TEXTS" --out "$tokenizer"
[ -e "$tokens" ] || python3 -m pair.data --texts "$TEXTS" --tokenizer "$tokenizer" --out "$tokens"

train() {
    torchrun --standalone --nproc-per-node "$GPUS" -m pair.train \
        --data "$tokens" --tokenizer "$tokenizer" --attention "$ATTENTION" "$@"
}
train --model wide --tokens 2.4e9 --out "$OUT/wide.pt"
[ -e "$OUT/pruned.pt" ] || python3 -m pair.prune --checkpoint "$OUT/wide.pt" --data "$tokens" --hidden 576 --out "$OUT/pruned.pt"
train --model target --init "$OUT/pruned.pt" --teacher "$OUT/wide.pt" --sharpen 0 --rate 0.5 --tokens 2.4e8 --out "$OUT/target.pt"
python3 -m pair.export --checkpoint "$OUT/target.pt" --tokenizer "$tokenizer" --out "$OUT/target"
train --model draft --teacher "$OUT/target.pt" --sharpen 0.4 --tokens 1.2e9 --out "$OUT/draft.pt"
python3 -m pair.export --checkpoint "$OUT/draft.pt" --tokenizer "$tokenizer" --out "$OUT/draft"
python3 -m pair.evaluate --target "$OUT/target" --draft "$OUT/draft" --texts "$DEV" --out "$OUT/pair.jsonl"
