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

# Whatever the gate of a server, all of a prompt runs sparse here, except a last token in a step of its own.
OPEN_GATE = {"min_seq_len": 0, "min_chunk": 1, "measure_recall": True}


def start_engine(model: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Start vLLM with our backend, in eager mode and without a prefix cache.

    Args:
        model: directory, or name on the hub.
        settings: settings of the plugin; they override those of MINFERENCE_CONFIG.
        options: arguments of vllm.LLM; they override those that are set here.

    Raises:
        ConfigError: the settings are refused, or vLLM does not start.
    """
    load_config({CONFIG_KEY: settings})  # an engine would refuse bad settings too, but only after a while
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine must run in this process, where the chooser is
    plugin.register()  # vLLM calls it for an installed package, not for one that is only on sys.path
    try:
        return engines.offline_engine(
            model, settings, {"enforce_eager": True, "enable_prefix_caching": False, **options}
        )
    except ConfigError:
        raise
    except Exception as error:  # vLLM raises various types of exceptions when it refuses something
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
        ConfigError: its sparse path raised an exception, so that rows ran dense which should have run sparse.
    """
    counted: Snapshot = runtime.counters.snapshot()
    if any(reason == Reason.SPARSE_FAULT for _, reason in counted.tokens):
        raise ConfigError("The sparse path raised an exception, and its result is not used: the log has its traceback.")
    return counted
