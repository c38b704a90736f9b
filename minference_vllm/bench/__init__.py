# SPDX-License-Identifier: Apache-2.0
"""Sends the same load to a dense and a sparse server with `vllm bench serve`, and compares what both made of it.

load.py says what is sent, sender.py has vLLM send it, request.py reads what came of each request, measure.py goes
through the points of a sweep, compare.py compares two servers' latencies; report.py, page.py and plots.py show the
results.
"""
