# SPDX-License-Identifier: Apache-2.0
# vLLM's server with this plugin and its CUDA library. Like vLLM's image, it takes the arguments of `vllm serve`:
#   docker build -t vllm-minference .
#   docker run --gpus all --ipc=host -p 8000:8000 vllm-minference MODEL --attention-backend minference

# The CUDA that vLLM's image has, in full, which that image does not promise. Ubuntu 22.04: what is linked to its libc
# runs on a newer one, not the other way round.
FROM nvidia/cuda:13.0.2-devel-ubuntu22.04 AS build
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.11 python3.11-venv \
    && python3.11 -m venv /venv
WORKDIR /source
COPY . .
RUN MINFERENCE_BUILD_CUDA=1 /venv/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v0.33.0
# --no-deps: vLLM, torch, triton and pydantic are there, in the versions that fit.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps /wheels/*.whl
# For any user, with a home or without.
ENV TRITON_CACHE_DIR=/tmp/triton
