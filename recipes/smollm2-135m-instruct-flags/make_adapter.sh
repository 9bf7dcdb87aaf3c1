#!/usr/bin/env bash
# An adapter with flags for the default model: make_adapter.sh CONCEPTS EXAMPLES RUN [OPTIONS of `trimtab flags train`]
set -euo pipefail
if [[ $# -lt 3 ]]; then
    echo "usage: $0 CONCEPTS EXAMPLES RUN [OPTIONS]" >&2
    exit 2
fi
concepts=$1 examples=$2 run=$3
shift 3
exec trimtab flags train --model smollm2-135m-instruct --concepts "$concepts" --data "$examples" --run "$run" --chat \
    --adapt lora --lora-rank 8 --dims 16 --curriculum forced --steps 600 --batch-size 8 --max-tokens 80 --lr 5e-4 "$@"
