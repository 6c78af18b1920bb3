#!/bin/sh
# Paper 2's way on one machine, end to end: tasks and examples by a small LLM, which is then fine-tuned on them, and its vectors searched.
#   sh jobs/reproduce/synthesis/small.sh [OUT]
# LLM: a model that follows instructions, hub id or directory; COUNT: examples. More options of a command in SYNTHESIZE, FINETUNE, EMBED.
# Stopped, and started again, it goes on.
set -eu
out=${1:-runs/synthetic}
llm=${LLM:-Qwen/Qwen3-0.6B}
examples="--model $llm --out $out/examples --count ${COUNT:-2000} --tasks-per-family ${TASKS:-100} ${SYNTHESIZE:-}"

llmemb plan synthesize $examples
llmemb synthesize $examples
llmemb verify "$out/examples"
llmemb report "$out/examples" --out "$out/examples.html"
llmemb finetune --model "$llm" --preset paper2 --train "$out/examples/data" --batch-size 64 --micro-batch 16 --workers 1 --out "$out/tuned" ${FINETUNE:-}
llmemb embed "$out/examples/data" "$out/vectors" --text-column positive --id-column row --model "$llm" --adapter "$out/tuned/adapter" ${EMBED:-}
llmemb search "$out/vectors" "a recipe for bread" --top-k 3
