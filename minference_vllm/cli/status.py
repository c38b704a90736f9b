# SPDX-License-Identifier: Apache-2.0
"""Exit statuses that all commands share."""

FAILED = 2
"""Nothing was done: a sentence on stderr says why. argparse exits so as well."""

STOPPED = 130
"""By Ctrl-C or a signal, as shells have it for SIGINT."""
