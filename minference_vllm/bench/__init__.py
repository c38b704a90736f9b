# SPDX-License-Identifier: Apache-2.0
"""The same load on a dense and a sparse server, by `vllm bench serve`, and what both made of it.

load.py is what is sent, sender.py has vLLM send it, request.py is what came of each request, measure.py goes through
the points of a sweep, compare.py sets two servers' latencies side by side; report.py, page.py and plots.py show them.
"""
