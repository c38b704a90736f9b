# SPDX-License-Identifier: Apache-2.0
"""What ends an evaluation before its report."""


class ServerError(RuntimeError):
    """A server did not come up, or cannot be reached any more. What it has answered so far is on disk."""
