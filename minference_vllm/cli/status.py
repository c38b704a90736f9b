# SPDX-License-Identifier: Apache-2.0
"""Exit statuses that commands share."""

FAILED = 2
"""Nothing was done: a sentence on stderr says why. argparse exits so as well."""

NOT_SPARSE = 3
"""Two servers were compared, and nothing ran sparse on the sparse one."""

INCOMPLETE = 4
"""Two servers were compared, and some of what was sent to them has no answer."""

STOPPED = 130
"""By Ctrl-C or a signal, as shells have it for SIGINT."""
