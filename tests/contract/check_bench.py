# SPDX-License-Identifier: Apache-2.0
"""This release's client for benchmarks sends what `minference-vllm bench` asks it to, and writes what that reads."""

from tests.unit.bench.test_vllm_client import *  # noqa: F403 - the same holds in this release
