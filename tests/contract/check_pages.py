# SPDX-License-Identifier: Apache-2.0
"""By what this release knows pages, salted. Run by test_vllm_033.py, with that release on the path."""

import vllm

from tests.contract.wheel import VERSION
from tests.unit.test_page_salt import *  # noqa: F403 - the same holds in this release


def test_the_release_is_the_one_to_check() -> None:
    assert vllm.__version__ == VERSION
