#!/bin/bash
# Encode a data set to image tokens on many GPUs of a Slurm cluster. Run this on the login node:
#
#     bash examples/slurm/extract_tokens.sh data/train tokens/train runs/tokenizer/model
#
# It lists the images, submits the jobs that encode them and ends: 64 tasks, of which 16 run at a time, and one for the index.
# It needs vfmtok-hf[datatrove]. Data, tokens and model must be on a file system that all nodes see. Logs are in .datatrove in
# the token folder. If tasks are lost, run the same command again: only missing files are written. Not inside a job: its
# settings, such as the memory of its nodes, would be passed on.
set -euo pipefail

vfmtok extract-tokens "$1" --output "$2" --model "$3" --device cuda \
    --num-crops 4 --batch-size 64 --num-workers 7 \
    --executor slurm --partition gpu --tasks 64 --workers 16 --gpus-per-task 1 --time 8:00:00
