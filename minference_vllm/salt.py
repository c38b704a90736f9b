# SPDX-License-Identifier: Apache-2.0
"""What tells the pages that a sparse server writes from those of servers that compute others."""

import hashlib
import hmac
import json
import multiprocessing

from minference_vllm.config import MInferenceConfig
from minference_vllm.patterns.auto import Resolved

SCHEME = 1
"""Raised when the same settings come to keep other keys."""

CHANGES_NO_PAGE = {"page_salt", "log_every", "debug"}


def salt_of(config: MInferenceConfig, resolved: Resolved) -> str:
    """The salt of these settings, 64 hexadecimal digits; empty where pages are to be known as everyone's.

    Args:
        config: the settings.
        resolved: what the setting `method` comes to; equal salts mean equal budgets of all heads, from whatever file.
    """
    if config.page_salt == "off":
        return ""
    settings = config.model_dump(mode="json", exclude={"method", *CHANGES_NO_PAGE})
    method = resolved.settings.model_dump(mode="json")
    heads = resolved.pattern and resolved.pattern.file.model_dump(mode="json", include={"method", "layers"})
    content = json.dumps([SCHEME, settings, method, heads], sort_keys=True).encode()
    if config.page_salt == "method":
        return hashlib.sha256(content).hexdigest()
    # Random, and the same in all processes that a server's first one starts.
    return hmac.new(multiprocessing.current_process().authkey, content, "sha256").hexdigest()
