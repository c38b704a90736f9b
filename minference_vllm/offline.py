# SPDX-License-Identifier: Apache-2.0
"""vLLM in this process, for tools that put a chooser of their own into its layers."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from minference_vllm import plugin
from minference_vllm.compat import engines
from minference_vllm.config import CONFIG_KEY, load_config
from minference_vllm.errors import ConfigError
from minference_vllm.metrics.snapshot import Snapshot
from minference_vllm.reason import Reason

logger = logging.getLogger("vllm.minference.offline")

# Whatever a server's gate, all of a prompt goes sparse here but a last token that comes alone.
OPEN_GATE = {"min_seq_len": 0, "min_chunk": 1, "measure_recall": True}


def start_engine(model: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """vLLM with our backend; it is not compiled, and remembers no prompt.

    Args:
        model: directory, or name on the hub.
        settings: of the plugin, over those of MINFERENCE_CONFIG.
        options: arguments of vllm.LLM, over those that are set here.

    Raises:
        ConfigError: the settings are refused, or vLLM does not start.
    """
    load_config({CONFIG_KEY: settings})  # an engine takes a while to say so
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the chooser is put into this process
    plugin.register()  # vLLM does so where the package is installed, not where it only lies in the path
    try:
        return engines.offline_engine(
            model, settings, {"enforce_eager": True, "enable_prefix_caching": False, **options}
        )
    except ConfigError:
        raise
    except Exception as error:  # vLLM has no one kind of exception for what it refuses
        logger.debug("vLLM did not start", exc_info=True)
        raise ConfigError(f"vLLM does not start {model!r} with these options: {error}") from None


def our_layers(llm: Any, model: str) -> list[Any]:
    """The implementations of our layers, in the order in which they run.

    Raises:
        ConfigError: there are none.
    """
    ours = engines.our_layers(llm)
    if not ours:
        raise ConfigError(f"None of the attention layers of {model!r} is the plugin's: the log says why.")
    return ours


def sound_snapshot(runtime: Any) -> Snapshot:
    """What a runtime has counted.

    Raises:
        ConfigError: its sparse path raised an exception, so that something ran dense which was to run sparse.
    """
    counted: Snapshot = runtime.counters.snapshot()
    if any(reason == Reason.SPARSE_FAULT for _, reason in counted.tokens):
        raise ConfigError("The sparse path raised an exception, and its result is not used: the log has its traceback.")
    return counted
