# SPDX-License-Identifier: Apache-2.0
"""Reports what the sparse path did, in the server's log and on its /metrics page.

Worker processes count what an engine did (counters.py, account.py), read the measurements that have arrived from the
GPU (density.py, recall_meter.py, stopwatch.py) and publish them (publisher.py). The process that serves /metrics sums
over all workers (exporter.py). families.py lists the metrics. Nothing here waits for the GPU.
"""
