# SPDX-License-Identifier: Apache-2.0
"""The entry point that vLLM loads in each of its processes: makes `--attention-backend minference` mean our backend."""

import logging
import os
from collections.abc import Callable
from typing import Any

NAME = "MINFERENCE"
VARIABLES = "MINFERENCE_"
RAY_PREFIXES = "VLLM_RAY_EXTRA_ENV_VAR_PREFIXES_TO_COPY"
GPU_BACKEND = "minference_vllm.backend.MInferenceBackend"
CPU_BACKEND = "minference_vllm.cpu.MInferenceCPUBackend"

# vLLM attaches its log handlers to the "vllm" logger only, so ours must be a child of it to be seen.
logger = logging.getLogger("vllm.minference")


def register() -> None:
    """Register the backend. Never raises: vLLM would not catch it, and calls this wherever the package is installed."""
    try:
        _register()
    except Exception:
        logger.exception("MInference could not register; --attention-backend minference will not be available.")
        return
    for step, consequence in STEPS:
        try:
            step()
        except Exception as error:
            logger.warning("MInference is registered, but %s: %r", consequence, error)


def _register() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    _take_over(AttentionBackendEnum.CUSTOM)
    # An alias of CUSTOM, not a new member: spawned processes unpickle the configuration, which names the member by its
    # value, before they load plugins. At that point they know CUSTOM, but would not know a new member.
    AttentionBackendEnum._member_map_.setdefault(NAME, AttentionBackendEnum.CUSTOM)


def _take_over(custom: Any) -> None:
    """Make CUSTOM, a member of vLLM's AttentionBackendEnum, our backend; say so if it was another plugin's."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import register_backend

    path = CPU_BACKEND if current_platform.is_cpu() else GPU_BACKEND
    if custom.is_overridden() and custom.get_path() != path:
        logger.warning(
            "Attention backend CUSTOM is taken by %s; MInference takes it over. Only one plugin can use it: "
            "list the plugins to load in VLLM_PLUGINS.",
            custom.get_path(),
        )
    register_backend(custom, path)


def load_plugins() -> None:
    """Have vLLM load its plugins, as it does first in each of its processes."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


def selected_path() -> str | None:
    """The class that `--attention-backend minference` selects in this process; None if vLLM does not know the name."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    member = AttentionBackendEnum.__members__.get(NAME)
    return None if member is None else str(member.get_path())


def _check_version() -> None:
    from minference_vllm.compat import warn_if_untested

    warn_if_untested()


def _reach_ray_workers() -> None:
    """Add our prefix to those by which vLLM selects the environment variables that it copies to Ray's workers."""
    prefixes = os.environ.get(RAY_PREFIXES, "")
    if VARIABLES not in prefixes.split(","):
        os.environ[RAY_PREFIXES] = ",".join(filter(None, [prefixes, VARIABLES]))


def _keep_selection() -> None:
    """Let vLLM's platform return our backend whenever it is selected.

    Without it, a plugin that loads after this one can take CUSTOM, and the CPU platform ignores what is selected.
    """
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    platform, custom = type(current_platform), AttentionBackendEnum.CUSTOM
    stock = platform.get_attn_backend_cls
    if getattr(stock, "keeps_custom", False):
        return

    def get_attn_backend_cls(cls: Any, selected_backend: Any, *args: Any, **kwargs: Any) -> str:
        if selected_backend is not custom:
            return stock(selected_backend, *args, **kwargs)
        _take_over(custom)
        selector = kwargs.get("attn_selector_config", args[0] if args else None)
        if current_platform.is_cpu() and not getattr(selector, "use_mla", False):
            return custom.get_path()
        return stock(selected_backend, *args, **kwargs)

    get_attn_backend_cls.keeps_custom = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _pass_for_flash_attention() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from minference_vllm.compat import pass_for_flash_attention

    if not current_platform.is_cpu():  # on a CPU our backend is not FlashAttention's
        pass_for_flash_attention(AttentionBackendEnum.CUSTOM, AttentionBackendEnum.FLASH_ATTN)


def _report_models_without_our_layers() -> None:
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from minference_vllm.compat import report_models_without_our_layers

    report_models_without_our_layers(type(current_platform), AttentionBackendEnum.CUSTOM)


def _salt_block_hashes() -> None:
    from minference_vllm.compat.pages import salt_block_hashes

    salt_block_hashes()


def _install_metrics() -> None:
    from minference_vllm.metrics.exporter import install

    install()


# The other steps of registration, in every process, each with the consequence that the log names if it fails. The
# backend stays available whichever of them fails.
STEPS: tuple[tuple[Callable[[], None], str], ...] = (
    (_check_version, "it cannot tell whether it was tested with this vLLM"),
    (_reach_ray_workers, "its environment variables do not reach Ray's workers"),
    (_keep_selection, "a plugin that loads later, or vLLM's CPU platform, may run another backend in its place"),
    (_pass_for_flash_attention, "models that need another version of FlashAttention, as Gemma 4, may be refused"),
    (_report_models_without_our_layers, "it will not say so if none of a model's layers is its own"),
    (_salt_block_hashes, "its setting page_salt can only be off"),
    (_install_metrics, "/metrics lacks its metrics"),
)
