# SPDX-License-Identifier: Apache-2.0
"""Does sparse prefill change a model's answers? The same prompts to a dense and a sparse server, compared in pairs.

Samples are prepared once (prepare.py, tasks/) and answered by each server (client.py, answers.py, journal.py); what the
sparse server counted meanwhile is kept beside its answers (work.py). scores.py, paired.py and report.py compare.
Servers are spoken to by HTTP alone; serve.py starts them where asked to.
"""
