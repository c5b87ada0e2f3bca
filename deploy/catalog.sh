#!/bin/sh
# A catalog on a rented card: pre-flight before anything large is fetched, then torch, then the weights, then the run.
#
# MANIFEST, RECIPE    what to draw, as for `millicent batch`
# KEEP                a folder that outlives the card: weights and ledger, so that a card that is taken away costs only its images
#                     in flight
# OUT                 where the pictures go: a folder, s3:// or gs://; KEEP/out where it is not set
# PRICE_USD           dollars for an hour of one card: what the bill counts with
# BUDGET              such as 20usd: no image is begun beyond it; no limit where it is not set
# MILLICENT           what pip installs: millicent where it is not set; or a source folder's or wheel's path
set -eu
: "${MANIFEST:?Set MANIFEST to the catalog file}" "${RECIPE:?Set RECIPE to the recipe}" "${KEEP:?Set KEEP to a lasting folder}"
: "${PRICE_USD:?Set PRICE_USD to the dollars for an hour of one card}"
MILLICENT=${MILLICENT:-millicent}
MODEL=qwen-image-edit-2511
LORA=$MODEL-lightning-4steps

preflight() {
    # 1 is a warning; 2 says that an edit will not work, and nothing more is fetched or paid
    millicent preflight --model "$MODEL" || [ $? -eq 1 ]
}

python3 -m venv "$HOME/millicent"
PATH=$HOME/millicent/bin:$PATH
pip install --quiet "$MILLICENT"
preflight
extras=engine,cloud
set -- --model "$KEEP/models/$MODEL" --price "$PRICE_USD" --ledger "$KEEP/ledger.sqlite"
if [ "$(nvidia-smi --list-gpus | wc -l)" -gt 1 ]; then
    extras=$extras,ray
    set -- "$@" --ray local
fi
pip install --quiet "${MILLICENT}[$extras]"
preflight
millicent pull "$MODEL" --to "$KEEP/models/$MODEL"
millicent pull "$LORA" --to "$KEEP/models/$LORA"
for file in "$KEEP/models/$LORA"/*.safetensors; do
    set -- "$@" --lora "$file"
done
if [ -n "${BUDGET:-}" ]; then
    set -- "$@" --budget "$BUDGET"
fi
# in this shell's place, so that the signal of a card that is taken away reaches it, and it finishes what is in flight
exec millicent batch "$MANIFEST" --out "${OUT:-$KEEP/out}" --recipe "$RECIPE" "$@"
