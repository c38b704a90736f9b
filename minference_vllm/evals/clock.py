# SPDX-License-Identifier: Apache-2.0
"""The time, as reports and files of replies have it."""

import datetime


def now() -> str:
    """In UTC, to the second, in the one form in which texts sort as times do."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
