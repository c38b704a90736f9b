# SPDX-License-Identifier: Apache-2.0
# vLLM's server with this plugin and its CUDA library. Like vLLM's image, it takes the arguments of `vllm serve`:
#   docker build -t vllm-minference .
#   docker run --gpus all --ipc=host -p 8000:8000 vllm-minference MODEL --attention-backend minference
# It runs as no root; docs/deployment.md says where it writes.
ARG VLLM_VERSION=0.33.0

# The CUDA that vLLM's image has, in full, which that image does not promise. Ubuntu 22.04: what is linked to its libc
# runs on a newer one, not the other way round.
FROM nvidia/cuda:13.0.2-devel-ubuntu22.04 AS build
# No versions: Ubuntu's archive drops one when it has the next, and of this stage only the wheel is kept.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3.11 python3.11-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3.11 -m venv /venv
WORKDIR /source
COPY . .
RUN MINFERENCE_BUILD_CUDA=1 /venv/bin/pip wheel --no-deps --wheel-dir /wheels .

FROM vllm/vllm-openai:v${VLLM_VERSION}
ARG VLLM_VERSION
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="vllm-minference" \
      org.opencontainers.image.description="vLLM with sparse prefill for long prompts" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}-vllm${VLLM_VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="docker.io/vllm/vllm-openai:v${VLLM_VERSION}"

# --no-deps: vLLM, torch, triton and pydantic are there, in the versions that fit.
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    uv pip install --system --no-cache --no-deps /wheels/*.whl

# All caches lie under HOME by default. It belongs to group 0, since OpenShift runs a container as a user of any number in
# that group. Such a user has no line in /etc/passwd: USER is where torch then finds a name. 2000 is the number that vLLM
# gives its own user. A new volume for weights takes over what its folder has here.
ENV HOME=/var/lib/vllm \
    USER=vllm
RUN mkdir -p "$HOME/.cache/huggingface" && chown -R 2000:0 "$HOME" && chmod -R g=u "$HOME"
USER 2000:0
WORKDIR /var/lib/vllm

# As the user who will serve, and without leaving that user's caches in the image. A build has no GPU: what needs one is
# skipped.
RUN folder="$(mktemp -d)" \
    && HOME="$folder" TMPDIR="$folder" minference-vllm doctor --no-gpu \
    && rm -rf "$folder"

EXPOSE 8000
# For the default port; with another --port, give `docker run` a --health-cmd. Weights may take most of an hour to come.
HEALTHCHECK --start-period=1h --interval=30s --timeout=10s \
    CMD ["python3", "-c", "from http.client import HTTPConnection; server = HTTPConnection('127.0.0.1', 8000, timeout=5); server.request('GET', '/health'); raise SystemExit(server.getresponse().status != 200)"]
