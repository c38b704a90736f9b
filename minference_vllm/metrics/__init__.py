# SPDX-License-Identifier: Apache-2.0
"""What the sparse path did, in the server's log and on its /metrics page.

Worker processes count (counters.py) what an engine did (account.py), read what the GPU has told (density.py,
recall_meter.py, stopwatch.py) and publish (publisher.py); the process that serves /metrics sums over them
(exporter.py). What there is, families.py lists. Nothing here waits for the GPU.
"""
