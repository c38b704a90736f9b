# SPDX-License-Identifier: Apache-2.0
"""Exit statuses that commands share."""

FAILED = 2
"""Nothing was done: a sentence on stderr says why. argparse exits with this status too."""

NOT_SPARSE = 3
"""Two servers were compared, and nothing ran sparse on the sparse one."""

INCOMPLETE = 4
"""Two servers were compared, and some of what was sent to them has no answer."""

STOPPED = 130
"""The command was stopped by Ctrl-C or a signal; shells use this status for SIGINT."""
