#!/bin/bash
# Encode a data set to image tokens on Hugging Face Jobs, on one machine with eight GPUs, in a bucket.
#
#     DATASET=you/images BUCKET=you/tokens TOKENIZER=you/vfmtok-pipeline bash examples/jobs/extract_tokens.sh
#
# Eight processes share the files of the token set. What an attempt has written stays in the bucket, and the next one encodes
# the rest.
set -euo pipefail

hf jobs run --name vfmtok-tokens --flavor a100x8 --timeout 12h --attempts 3 --detach \
    --volume "hf://datasets/$DATASET:/data:ro" \
    --volume "hf://buckets/$BUCKET:/tokens" \
    --secrets HF_TOKEN \
    python:3.12 bash -c "pip install --quiet 'vfmtok-hf[train]' && \
        torchrun --nproc_per_node 8 --module vfmtok_hf.training.extract_tokens \
        --data /data --tokenizer $TOKENIZER --output /tokens/train --num_crops 4 --batch_size 64 --num_workers 8"
