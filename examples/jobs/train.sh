#!/bin/bash
# Train a generator on Hugging Face Jobs, on one machine with eight GPUs. Jobs need credit; `hf jobs hardware` lists prices.
#
#     DATASET=you/imagenet-tokens BUCKET=you/runs TOKENIZER=you/vfmtok-pipeline bash examples/jobs/train.sh
#
# The bucket keeps the run. Jobs repeats a failed attempt, and the next one continues from the newest checkpoint. After the
# timeout, run this script again.
set -euo pipefail

hf jobs run --name vfmtok-train --flavor a100x8 --timeout 24h --attempts 3 --detach \
    --volume "hf://datasets/$DATASET:/data:ro" \
    --volume "hf://buckets/$BUCKET:/runs" \
    --secrets HF_TOKEN \
    python:3.12 bash -c "pip install --quiet 'vfmtok-hf[train]' && \
        accelerate launch --multi_gpu --num_machines 1 --num_processes 8 --mixed_precision no --dynamo_backend no \
        --module vfmtok_hf.training.train_generator \
        --train_data /data --tokenizer $TOKENIZER --output /runs/generator --resume true \
        --model.hidden_size=768 --model.num_hidden_layers=12 --model.num_attention_heads=12 \
        --batch_size 64 --max_steps 750000 --mixed_precision bf16"
