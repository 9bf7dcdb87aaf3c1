#!/usr/bin/env bash
# An adapter with flags for the default model: make_adapter.sh EXAMPLES RUN [OPTIONS of `trimtab flags train`]
set -euo pipefail
if [[ $# -lt 2 ]]; then
    echo "usage: $0 EXAMPLES RUN [OPTIONS]" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
examples=$1 run=$2
shift 2
exec trimtab flags train --model smollm2-135m-instruct --concepts "$here/concepts.txt" --data "$examples" --run "$run" \
    --chat --adapt lora --lora-rank 8 --dims 16 --from-layer 5 --ramp-scale 5 --loss normalised_squared \
    --curriculum "$here/curriculum.json" --flag-lr-factor 30 --lr 1e-3 --steps 300 --batch-size 8 --max-tokens 80 \
    --autocast "$@"
