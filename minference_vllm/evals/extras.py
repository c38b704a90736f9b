# SPDX-License-Identifier: Apache-2.0
"""Packages that only evaluation needs; vLLM brings most of them."""

import importlib
from typing import Any

from minference_vllm.errors import ConfigError


def need(module: str, extra: str = "eval") -> Any:
    """A module of an optional package.

    Args:
        module: its dotted name.
        extra: the extra of this package that brings it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}. It comes with an extra: pip install 'minference-vllm[{extra}]'.") from None
