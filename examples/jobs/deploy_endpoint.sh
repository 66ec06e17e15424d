#!/bin/bash
# Deploy `vfmtok serve` as an Inference Endpoint.
#
#     REPO=you/vfmtok-pipeline IMAGE=you/vfmtok-serve:latest bash examples/jobs/deploy_endpoint.sh
#
# IMAGE is built from serving/Dockerfile and pushed to a registry that Hugging Face can read. The endpoint mounts the
# repository at /repository, which the image serves. `hf endpoints hardware` lists vendors, regions and instances.
set -euo pipefail

docker build --file serving/Dockerfile --tag "$IMAGE" .
docker push "$IMAGE"
hf endpoints deploy vfmtok --repo "$REPO" \
    --framework custom --custom-image "$IMAGE" --health-route /health --port 8000 \
    --vendor aws --region us-east-1 --accelerator gpu --instance-type nvidia-l4 --instance-size x1 \
    --min-replica 0 --max-replica 2 --scale-to-zero-timeout 15
