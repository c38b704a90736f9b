# SPDX-License-Identifier: Apache-2.0
"""Everything in the plugin that depends on the vLLM release, or on parts of vLLM that are no stable interface."""

import functools
import importlib.metadata
import logging
import math
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minference_vllm.compat import pages
from minference_vllm.pipeline import ONE_STAGE, Pipeline

if TYPE_CHECKING:
    from minference_vllm.patterns import ServedModel

TESTED = ((0, 32), (0, 33))
WHOLE_PROMPT = ("full_attention", "attention")  # names that model configurations give to such layers

logger = logging.getLogger("vllm.minference")


def installed_version() -> str:
    """The version of the vLLM that is installed."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:  # a source tree in the path, or a build of another name
        import vllm

        return str(vllm.__version__)


def is_tested(version: str) -> bool:
    """Whether this release of the plugin was tested with that release of vLLM."""
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) in TESTED


def tested_versions() -> str:
    """The tested releases as text, for messages."""
    return " and ".join(".".join(map(str, release)) for release in TESTED)


@functools.cache
def warn_if_untested() -> None:
    """Log one warning if the installed vLLM is not a release that this plugin was tested with."""
    version = installed_version()
    if not is_tested(version):
        logger.warning(
            "MInference is tested with vLLM %s; this is %s. It will try all the same.", tested_versions(), version
        )


def layer_index(layer_name: str) -> int | None:
    """Index of a layer in the whole model (across pipeline stages), None if its name holds no single number."""
    from vllm.model_executor.models.utils import extract_layer_index

    try:
        return extract_layer_index(layer_name)
    except AssertionError:
        return None


def reports_metrics() -> bool:
    """Whether this worker reports for its pipeline stage: one tensor-parallel rank does, all see the same tokens."""
    from vllm.distributed.parallel_state import get_tp_group

    return get_tp_group().rank_in_group == 0


def engine_id(vllm_config: Any) -> int:
    """A number that identifies the engine of this configuration for as long as the engine lives.

    vLLM creates several configurations for one engine, for parts of its model and for its draft model, and gives each
    its own `instance_id`. All of them share the dictionary that holds the engine's layers, so the id of that dictionary
    is used.
    """
    return id(vllm_config.compilation_config.static_forward_context)


def pipeline(vllm_config: Any) -> Pipeline:
    """This worker's pipeline stage, and how vLLM divides the model's layers among all stages."""
    from vllm.distributed.parallel_state import get_pp_group
    from vllm.distributed.utils import get_pp_indices

    stages, model = get_pp_group(), vllm_config.model_config
    if stages.world_size == 1:
        return ONE_STAGE
    num_layers, text = model.model_arch_config.total_num_hidden_layers, model.hf_text_config
    kinds = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    whole = frozenset(number for number, kind in enumerate(kinds) if kind in WHOLE_PROMPT) or range(num_layers)
    bounds = (get_pp_indices(num_layers, stage, stages.world_size) for stage in range(stages.world_size))
    return Pipeline(stages.rank_in_group, tuple(frozenset(range(*each)).intersection(whole) for each in bounds))


def served_model(vllm_config: Any, rank: int | None = None) -> "ServedModel":
    """Names and geometry of the whole model, and the tensor-parallel rank: this worker's unless `rank` is given."""
    from vllm.distributed.parallel_state import get_tp_group

    from minference_vllm.patterns import Geometry, ServedModel  # imports PyTorch, which registration does not need

    model = vllm_config.model_config
    aliases = model.served_model_name or ()
    names = (model.model, *([aliases] if isinstance(aliases, str) else aliases))
    arch = model.model_arch_config
    geometry = Geometry.model_construct(  # not validated: the bounds are for pattern files only
        num_layers=arch.total_num_hidden_layers,
        num_qo_heads=arch.total_num_attention_heads,
        num_kv_heads=arch.total_num_kv_heads,
        head_dim=arch.head_size,
    )
    return ServedModel(names, geometry, get_tp_group().rank_in_group if rank is None else rank)


def batch_invariant() -> bool:
    """Whether the user asked for results independent of batching. Sparse results do depend on the chunks."""
    from vllm import envs

    return bool(envs.VLLM_BATCH_INVARIANT)


def flash_attention(head_dim: int) -> Callable[..., Any]:
    """vLLM's FlashAttention over pages, in the version that vLLM picks here for this head size."""
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

    return functools.partial(flash_attn_varlen_func, fa_version=get_flash_attn_version(head_size=head_dim))


def attention_layers(vllm_config: Any) -> dict[str, Any]:
    """This worker's attention layers by name, in the order in which they run: ours, and decoders of other backends.

    Layers of draft models are included. Layers of other backends need not be vLLM's `Attention`, nor have an `impl`.
    """
    layers = vllm_config.compilation_config.static_forward_context  # in the order of construction
    return {name: layer for name, layer in layers.items() if is_ours(layer) or _is_decoder(layer)}


def is_ours(layer: Any) -> bool:
    """Whether a layer of vLLM's runs our implementation, or one that vLLM derived from it."""
    package = __name__.partition(".")[0] + "."
    return any(base.__module__.startswith(package) for base in type(getattr(layer, "impl", None)).__mro__)


def _is_decoder(layer: Any) -> bool:
    """Whether a layer attends to the sequence's earlier tokens. Others hold a state or an index's keys, or encode."""
    from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
    from vllm.model_executor.layers.mamba.abstract import MambaBase

    if not isinstance(layer, AttentionLayerBase) or isinstance(layer, MambaBase):
        return False
    has_heads = any(hasattr(layer, name) for name in ("impl", "num_heads", "n_heads"))
    return has_heads and getattr(layer, "attn_type", "decoder") == "decoder"


def foreign_layers(vllm_config: Any) -> dict[str, str]:
    """The main model's attention layers that are not ours, by name, with the name of their backend's class."""
    return {
        name: layer.get_attn_backend().__name__
        for name, layer in attention_layers(vllm_config).items()
        if not is_ours(layer) and not is_draft_layer(name, layer, vllm_config)
    }


def is_loading_drafter() -> bool:
    """Whether the layers that are being made now belong to a draft model. Only to be asked in a layer's constructor."""
    from vllm.compilation import backends

    tag = getattr(backends, "model_tag", "")
    return tag in ("draft_model", "extract_hidden_states") or tag.endswith("_head")


def is_draft_layer(name: str, layer: Any, vllm_config: Any) -> bool:
    """Whether a layer belongs to a draft model, once all layers are made.

    vLLM marks such layers, but 0.32 does so under its V2 runner only, and our layers note it when they are constructed.
    All others are recognised by name: vLLM numbers a drafter's layers on from the main model's, or names them
    differently.
    """
    if getattr(layer, "is_draft_layer", False) or getattr(getattr(layer, "impl", None), "is_of_drafter", False):
        return True
    if getattr(vllm_config, "speculative_config", None) is None:
        return False  # a model that runs its layers in loops numbers those of later loops on, too
    index = layer_index(name)
    num_layers = getattr(vllm_config.model_config.hf_text_config, "num_hidden_layers", math.inf)
    if index is not None and index >= num_layers:
        return True
    first = next(iter(attention_layers(vllm_config)), name)  # of the main model, whose layers vLLM makes first
    return _before_index(name) != _before_index(first)


def _before_index(layer_name: str) -> str:
    return re.split(r"\.\d+(?:\.|$)", layer_name)[0]


def pass_for_flash_attention(ours: Any, flash_attention: Any) -> None:
    """Let vLLM's settings for single models see FLASH_ATTN where our backend is selected.

    Some of these settings look for the name FLASH_ATTN before they choose the version of FlashAttention that their
    layers need, others refuse every name that they do not know. They run when a configuration is made, long before vLLM
    calls a backend.

    Args:
        ours, flash_attention: members of vLLM's AttentionBackendEnum.
    """
    from vllm.config import VllmConfig

    stock = VllmConfig.try_verify_and_update_config
    if getattr(stock, "passes_ours_for_flash_attention", False):
        return

    @functools.wraps(stock)
    def try_verify_and_update_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        attention = getattr(self, "attention_config", None)
        if attention is None or attention.backend is not ours:
            return stock(self, *args, **kwargs)
        attention.backend = flash_attention
        try:
            return stock(self, *args, **kwargs)
        finally:
            if attention.backend is flash_attention:
                attention.backend = ours

    try_verify_and_update_config.passes_ours_for_flash_attention = True  # type: ignore[attr-defined]
    VllmConfig.try_verify_and_update_config = try_verify_and_update_config


def report_models_without_our_layers(platform: Any, ours: Any) -> None:
    """Make a worker report it if our backend is selected and none of the layers is ours.

    No code of our backend runs in that case. A method of vLLM's platform is wrapped instead, which every executor calls
    to settle the page size once a worker has its layers.

    Args:
        platform: class of vLLM's current platform.
        ours: our member of vLLM's AttentionBackendEnum.
    """
    stock = platform.update_block_size_for_backend
    if getattr(stock, "reports_models_without_our_layers", False):
        return

    def update_block_size_for_backend(cls: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(vllm_config, *args, **kwargs)
        try:
            pages.serve(vllm_config)
        except Exception as error:
            logger.warning("MInference cannot note the engine for its minference.page_salt: %r", error)
        try:
            _report_if_none_is_ours(vllm_config, ours)
        except Exception as error:
            logger.warning("MInference cannot tell which of the model's layers are its own: %r", error)
        return result

    update_block_size_for_backend.reports_models_without_our_layers = True  # type: ignore[attr-defined]
    platform.update_block_size_for_backend = classmethod(update_block_size_for_backend)


def _report_if_none_is_ours(vllm_config: Any, ours: Any) -> None:
    if not pages.is_selected(vllm_config, ours):
        return
    layers = attention_layers(vllm_config)
    if any(is_ours(layer) and not is_draft_layer(name, layer, vllm_config) for name, layer in layers.items()):
        return
    if not (reports_metrics() and pipeline(vllm_config).speaks()):
        return
    if foreign := foreign_layers(vllm_config):
        which = f"none of the model's {len(foreign)} attention layers is ours (they choose their own backend: "
        which += ", ".join(sorted(set(foreign.values()))) + ")"
    else:
        which = "the model has no attention layers that could be ours"
    logger.warning("MInference: %s; everything runs as without the plugin.", which)
