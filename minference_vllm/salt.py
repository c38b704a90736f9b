# SPDX-License-Identifier: Apache-2.0
"""The salt of page hashes: servers that compute different keys and values for the same tokens share no pages."""

import hashlib
import hmac
import json
import multiprocessing

from minference_vllm.config import MInferenceConfig
from minference_vllm.patterns.auto import Resolved

SCHEME = 1
"""To be increased when a change of the code makes the same settings keep other keys: older pages then have another
salt."""

CHANGES_NO_PAGE = {"page_salt", "log_every", "debug"}


def salt_of(config: MInferenceConfig, resolved: Resolved) -> str:
    """The salt of these settings, 64 hexadecimal digits; empty if page_salt is "off".

    Args:
        config: the settings.
        resolved: what the setting `method` resolves to. The salt depends on the content of a pattern file, not on its
            name.
    """
    if config.page_salt == "off":
        return ""
    settings = config.model_dump(mode="json", exclude={"method", *CHANGES_NO_PAGE})
    method = resolved.settings.model_dump(mode="json")
    heads = resolved.pattern and resolved.pattern.file.model_dump(mode="json", include={"method", "layers"})
    content = json.dumps([SCHEME, settings, method, heads], sort_keys=True).encode()
    if config.page_salt == "method":
        return hashlib.sha256(content).hexdigest()
    # The authkey is random, and the same in all processes that the server's first process starts.
    return hmac.new(multiprocessing.current_process().authkey, content, "sha256").hexdigest()
