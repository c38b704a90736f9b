# SPDX-License-Identifier: Apache-2.0
"""How this release tells salted pages apart, and servers. Run by test_vllm_033.py, with that release on the path."""

import ast
from pathlib import Path

import pytest
import vllm

from minference_vllm.errors import ConfigError
from tests.contract.fakes import NAME, make_builder, make_impl, make_runtime
from tests.contract.wheel import VERSION
from tests.unit.test_page_salt import *  # noqa: F403 - the same holds in this release


def test_the_release_is_the_one_to_check() -> None:
    assert vllm.__version__ == VERSION


def function(file: str, name: str) -> ast.FunctionDef:
    """A function of the release, by where it is."""
    tree = ast.parse((Path(vllm.__file__).parent / file).read_text())
    [found] = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == name]
    return found


def test_nixls_handshake_compares_what_the_document_lists() -> None:
    # See docs/compatibility.md: none of our settings is among what is compared.
    file = "distributed/kv_transfer/kv_connector/v1/nixl/metadata.py"
    hashed = function(file, "compute_nixl_compatibility_hash")
    [factors] = [node for node in ast.walk(hashed) if isinstance(node, ast.Dict)]
    assert {key.value for key in factors.keys if isinstance(key, ast.Constant)} == {
        "vllm_version", "nixl_connector_version", "model", "dtype", "num_kv_heads", "head_size", "num_hidden_layers",
        "attn_backend_name", "cache_dtype", "is_hma_enabled", "speculative_config", "transfer_mode",
    }  # fmt: skip


def test_what_the_profiling_run_allocates_stays_while_a_server_sleeps() -> None:
    # So our scratch memory stays too. Only what is allocated in a memory pool of its own is freed for the sleep.
    source = ast.unparse(function("v1/worker/gpu_worker.py", "determine_available_memory"))
    assert "profile_run(" in source
    assert "memory_pool" not in source


def test_a_builder_of_an_engine_that_vllm_did_not_tell_of_refuses_to_salt_its_pages() -> None:
    runtime = make_runtime(page_salt="method")
    with pytest.raises(ConfigError, match=r'minference\.page_salt="method" has no effect on this engine'):
        make_builder({NAME.format(0): make_impl(runtime)})
