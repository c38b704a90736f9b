# SPDX-License-Identifier: Apache-2.0
"""The current time, in the form that reports and files of replies use."""

import datetime


def now() -> str:
    """The time in UTC, to the second. All times have this one form, so that sorted as texts they are in order."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
