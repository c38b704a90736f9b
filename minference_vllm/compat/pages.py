# SPDX-License-Identifier: Apache-2.0
"""Salts the hashes by which vLLM identifies pages, so that pages which our layers compute differently are not shared.

vLLM hashes a page's tokens and all tokens before them, starting from a seed of the engine. The engine core does so for
its prefix cache and for connectors that share pages; LMCache does so in workers too. All of them get the seed from one
function: the engine core once it has its executor, a worker once it has its layers.
"""

import functools
import logging
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minference_vllm.config import MInferenceConfig

logger = logging.getLogger("vllm.minference")


class SaltedSeed:
    """Replaces vLLM's resolve_none_hash_seed, and adds our salt to the seed.

    It refers to engines weakly: a configuration holds the layers with their weights and scratch, and an engine may end
    before its process does.
    """

    def __init__(self, stock: Callable[[Any], str]) -> None:
        self._stock = stock
        self._noted: list[weakref.ref[Any]] = []

    def note(self, vllm_config: Any) -> None:
        """Remember an engine of this process."""
        self._noted = [weakref.ref(noted) for noted in self.engines() if noted is not vllm_config]
        self._noted.append(weakref.ref(vllm_config))

    def engines(self) -> list[Any]:
        """The configurations of the engines that still live, the newest last: vLLM's own seed is the newest's."""
        return [vllm_config for noted in self._noted if (vllm_config := noted()) is not None]

    def __call__(self, hash_fn: Any) -> str:
        """vLLM's seed, which PYTHONHASHSEED sets or which is random, followed by our salt if there is one."""
        seed = self._stock(hash_fn)
        if not self._noted:
            logger.warning(
                "MInference: block hashes begin before an engine is known: no minference.page_salt is in them."
            )
        engines = self.engines()
        salt = _salt_of(engines[-1]) if engines else ""
        return f"{seed}, minference {salt}" if salt else seed


def salt_block_hashes() -> None:
    """Make the seed of block hashes in this process depend on what our layers will compute."""
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.executor.abstract import Executor

    if isinstance(kv_cache_utils.resolve_none_hash_seed, SaltedSeed):
        return
    kv_cache_utils.resolve_none_hash_seed = SaltedSeed(kv_cache_utils.resolve_none_hash_seed)
    stock = Executor.__init__

    @functools.wraps(stock)
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        serve(vllm_config)
        stock(self, vllm_config, *args, **kwargs)

    Executor.__init__ = __init__


def serve(vllm_config: Any) -> None:
    """Remember the engine of this process: the salt is made from its settings when the seed is asked for."""
    from vllm.v1.core import kv_cache_utils

    if isinstance(kv_cache_utils.resolve_none_hash_seed, SaltedSeed):
        kv_cache_utils.resolve_none_hash_seed.note(vllm_config)


def require(config: "MInferenceConfig") -> None:
    """Check that pages can be salted, if the settings ask for it.

    Raises:
        ConfigError: this vLLM has no such seed, or registration could not reach it.
    """
    from vllm.v1.core import kv_cache_utils

    from minference_vllm.errors import ConfigError

    is_salted = isinstance(getattr(kv_cache_utils, "resolve_none_hash_seed", None), SaltedSeed)
    if config.page_salt != "off" and not is_salted:
        raise ConfigError(
            f'minference.page_salt="{config.page_salt}" has no effect on this vLLM: the log says why at registration. '
            'Set it to "off", and tell pages apart by PYTHONHASHSEED.'
        )


def require_noted(config: "MInferenceConfig", vllm_config: Any) -> None:
    """Check that vLLM has told us of this engine, if its pages are to be salted. Call it once it has layers.

    A worker that is a process of its own does not see what the engine core was told.

    Raises:
        ConfigError: vLLM has not told us, so none of the engine's pages is salted in this process.
    """
    from vllm.v1.core import kv_cache_utils

    from minference_vllm.compat import engine_id
    from minference_vllm.errors import ConfigError

    if config.page_salt == "off":
        return
    this = engine_id(vllm_config)
    if not any(engine_id(noted) == this for noted in kv_cache_utils.resolve_none_hash_seed.engines()):
        raise ConfigError(
            f'minference.page_salt="{config.page_salt}" has no effect on this engine: vLLM started it in a way that '
            'the plugin does not see. Set it to "off", and tell pages apart by PYTHONHASHSEED.'
        )


def is_selected(vllm_config: Any, ours: Any) -> bool:
    """Whether `ours`, our member of vLLM's AttentionBackendEnum, is selected for layers of at least one kind."""
    attention = vllm_config.attention_config
    return ours is attention.backend or ours in attention.backend_per_kind.values()


def _salt_of(vllm_config: Any) -> str:
    """The salt of an engine; empty if page_salt is off, or if our backend is not selected, so that pages are dense.

    Raises:
        ConfigError: the settings, or a pattern file that they name, are refused.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if not is_selected(vllm_config, AttentionBackendEnum.CUSTOM):
        return ""
    # Imported here, because these modules import PyTorch and every kernel, which a server of another backend does not
    # need.
    from minference_vllm.compat import served_model
    from minference_vllm.config import load_config
    from minference_vllm.patterns import AutoSettings, resolve
    from minference_vllm.salt import salt_of

    config = load_config(vllm_config.additional_config)
    if config.page_salt == "off":
        return ""
    is_auto = isinstance(config.method, AutoSettings)
    resolved = resolve(config.method, served_model(vllm_config, rank=0) if is_auto else None)
    salt = salt_of(config, resolved)
    whose = (
        f"with {salt[:16]}: servers of the same salt share pages" if config.page_salt == "method" else "by this start"
    )
    logger.info("MInference: block hashes are salted %s.", whose)
    return salt
