# SPDX-License-Identifier: Apache-2.0
"""Block hashes of sparse servers, made by the vLLM that is installed. The contract tests run it too."""

import gc
import multiprocessing
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from minference_vllm.compat import pages
from minference_vllm.config import MInferenceConfig
from minference_vllm.errors import ConfigError
from minference_vllm.patterns import AutoSettings, PatternFile, resolve
from minference_vllm.patterns.auto import Pattern, Resolved
from minference_vllm.salt import salt_of
from tests.conftest import import_or_skip

kv_cache_utils = import_or_skip("vllm.v1.core.kv_cache_utils")
abstract = import_or_skip("vllm.v1.executor.abstract")
hashing = import_or_skip("vllm.utils.hashing")
registry = import_or_skip("vllm.v1.attention.backends.registry")

Backend = registry.AttentionBackendEnum
TOKENS = tuple(range(16))
HASH_SEED = "PYTHONHASHSEED"
METHOD, SERVER = {"page_salt": "method"}, {"page_salt": "server"}


@pytest.fixture
def salting(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has loaded the plugin; undone at the end."""
    for owner, name in ((kv_cache_utils, "resolve_none_hash_seed"), (abstract.Executor, "__init__")):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    monkeypatch.setattr(kv_cache_utils, "NONE_HASH", b"", raising=False)
    monkeypatch.setattr(kv_cache_utils, "_NONE_HASH_SEED", None)
    monkeypatch.delenv(HASH_SEED, raising=False)
    monkeypatch.delenv("MINFERENCE_CONFIG", raising=False)
    pages.salt_block_hashes()


class Config(SimpleNamespace):
    """A VllmConfig that can be referred to weakly, as vLLM's can."""


def engine(settings: dict[str, Any] | None, backend: Any = Backend.CUSTOM, **of_kinds: Any) -> Any:
    """The parts of a VllmConfig that are asked for."""
    return Config(
        additional_config={} if settings is None else {"minference": settings},
        attention_config=SimpleNamespace(backend=backend, backend_per_kind=of_kinds),
        model_config=None,
    )


def first_hash(config: Any) -> bytes:
    """The hash of a prompt's first page in an engine, on which all others follow."""
    pages.serve(config)
    kv_cache_utils.init_none_hash(hashing.sha256)
    return bytes(kv_cache_utils.hash_block_tokens(hashing.sha256, None, TOKENS))


def dense() -> bytes:
    return first_hash(engine(METHOD, Backend.FLASH_ATTN))


pytestmark = pytest.mark.usefixtures("salting")


def test_by_default_pages_are_known_as_without_the_plugin() -> None:
    stock = kv_cache_utils.DEFAULT_NONE_HASH_SEED
    for config in (engine(None), engine({"page_salt": "off"})):
        first_hash(config)
        assert kv_cache_utils.get_none_hash_seed() == stock


def test_pages_of_a_method_are_known_to_servers_of_the_same_settings_alone() -> None:
    ours = first_hash(engine(METHOD))
    others = [{"method": {"name": "block", "share": 0.9}}, {"method": "vertical_slash"}, {"min_seq_len": 1}]
    others += [{"min_chunk": 1}, {"recall_floor": 0.5}, {"measure_recall": False}, {"dense_layers": 2}]
    hashes = [ours, dense(), first_hash(engine(None)), *(first_hash(engine(METHOD | other)) for other in others)]
    assert len(set(hashes[:2] + hashes[3:])) == len(hashes) - 1
    assert hashes[1] == hashes[2]
    assert first_hash(engine(METHOD)) == first_hash(engine(METHOD | {"method": "block"})) == ours


@pytest.mark.parametrize("setting", [{"log_every": 1.0}, {"debug": True}], ids=str)
def test_what_changes_no_page_changes_no_salt(setting: dict[str, Any]) -> None:
    assert first_hash(engine(METHOD)) == first_hash(engine(METHOD | setting))


def test_every_setting_is_in_the_salt_or_said_to_change_no_page() -> None:
    """A setting that is added must not be forgotten."""
    spared = {"log_every", "debug", "page_salt"}
    plain = MInferenceConfig(page_salt="method")
    changes = {
        name: 1 if isinstance(value, int | float) and not isinstance(value, bool) else "other"
        for name, value in plain.model_dump().items()
        if name not in spared | {"method"}
    } | {"measure_recall": False}
    salt = salt_of(plain, Resolved(plain.method))
    for name, value in changes.items():
        changed = plain.model_copy(update={name: value})
        assert salt_of(changed, Resolved(plain.method)) != salt, name
    assert {*changes, "method"} | spared == set(MInferenceConfig.model_fields)


def test_a_backend_for_layers_of_full_attention_alone_is_ours_too() -> None:
    mixed = first_hash(engine(METHOD, None, full_attention=Backend.CUSTOM))
    assert mixed == first_hash(engine(METHOD)) != dense()


def test_the_seed_that_the_user_set_counts_too(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = first_hash(engine(METHOD)), dense()
    monkeypatch.setenv(HASH_SEED, "7")
    seven = first_hash(engine(METHOD)), dense()
    assert len({*plain, *seven}) == 4
    assert first_hash(engine(METHOD)) == seven[0]


def test_peers_that_compare_seeds_see_the_salt() -> None:
    first_hash(engine(METHOD))
    sparse = kv_cache_utils.get_none_hash_seed()
    dense()
    assert sparse != kv_cache_utils.get_none_hash_seed()


def test_without_a_cryptographic_hash_the_seed_stays_random() -> None:
    config = engine(METHOD)
    pages.serve(config)
    one, other = (kv_cache_utils.resolve_none_hash_seed(hashing.xxhash) for _ in range(2))
    assert one != other


def test_pages_of_a_server_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = first_hash(engine(SERVER))
    assert ours == first_hash(engine(SERVER))  # another engine of this server, or another process
    others = [dense(), first_hash(engine(METHOD)), first_hash(engine(SERVER | {"min_chunk": 1}))]
    monkeypatch.setattr(multiprocessing.current_process(), "authkey", b"of another server")
    assert len({ours, first_hash(engine(SERVER)), *others}) == 5


def test_the_processes_of_a_server_share_what_its_salt_is_made_of() -> None:
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("spawn").Process(target=_key_to, args=(there,))
    child.start()
    assert here.recv_bytes() == bytes(multiprocessing.current_process().authkey)
    child.join()


def _key_to(connection: Any) -> None:
    connection.send_bytes(bytes(multiprocessing.current_process().authkey))


# Pattern files


@pytest.fixture
def pattern() -> PatternFile:
    heads = ((0.9, 0.8), (0.7, 0.6))
    return PatternFile.model_validate(
        {
            "version": 1,
            "models": (),
            "geometry": {"num_layers": 2, "num_qo_heads": 2, "num_kv_heads": 1, "head_dim": 64},
            "provenance": {"source": "a test"},
            "method": {"name": "block"},
            "layers": heads,
        }
    )


def salt_with(file: PatternFile, name: str = "file.json", rank: int = 0) -> str:
    config = MInferenceConfig(method=AutoSettings(pattern_file=name), page_salt="method")
    return salt_of(config, Resolved(file.settings, Pattern(file, name, rank)))


def test_a_pattern_file_counts_by_what_heads_keep(pattern: PatternFile) -> None:
    other = pattern.model_copy(update={"layers": ((0.9, 0.8), (0.7, 0.5))})
    noted = pattern.model_copy(update={"provenance": pattern.provenance.model_copy(update={"source": "another"})})
    assert salt_with(pattern) == salt_with(noted, "copy.json", rank=1) != salt_with(other)


def test_auto_without_a_file_is_the_method_that_it_comes_to() -> None:
    plain = MInferenceConfig(page_salt="method")
    auto = MInferenceConfig(method=AutoSettings(), page_salt="method")
    assert salt_of(auto, Resolved(plain.method, why="no file")) == salt_of(plain, resolve(plain.method, None))


# Where it is put into vLLM


class NoWorkers(abstract.Executor):
    """An executor that begins nothing."""

    def _init_executor(self) -> None:
        pass


NoWorkers.__abstractmethods__ = frozenset()


def test_an_engine_core_is_known_by_its_executor() -> None:
    names = "model cache lora load parallel scheduler device speculative observability"
    others = {f"{name}_config": None for name in names.split()}
    config = Config(**(vars(engine(METHOD)) | {name: None for name in others if name != "model_config"}))
    NoWorkers(config)
    kv_cache_utils.init_none_hash(hashing.sha256)
    found = kv_cache_utils.hash_block_tokens(hashing.sha256, None, TOKENS)
    assert bytes(found) == first_hash(engine(METHOD))


@pytest.mark.parametrize("mode", ["off", "method", "server"])
def test_the_log_says_what_pages_are_shared_by(mode: str, log_lines: list[tuple[str, str]]) -> None:
    first_hash(engine({"page_salt": mode}))
    first_hash(engine({"page_salt": mode}, Backend.FLASH_ATTN))
    config = MInferenceConfig(page_salt=mode)
    salt = salt_of(config, resolve(config.method, None))
    by = {"off": [], "server": ["by this start"], "method": [f"with {salt[:16]}: servers of the same salt share pages"]}
    assert log_lines == [("INFO", f"MInference: block hashes are salted {what}.") for what in by[mode]]


def test_salting_twice_salts_once() -> None:
    ours, resolve_seed = first_hash(engine(METHOD)), kv_cache_utils.resolve_none_hash_seed
    pages.salt_block_hashes()
    assert kv_cache_utils.resolve_none_hash_seed is resolve_seed
    assert first_hash(engine(METHOD)) == ours


def test_vllms_configurations_can_be_referred_to_weakly() -> None:
    kind = import_or_skip("vllm.config").VllmConfig
    vllm_config = kind.__new__(kind)
    assert weakref.ref(vllm_config)() is vllm_config


def test_an_engine_that_ended_is_not_kept() -> None:
    config = engine(METHOD)
    first_hash(config)
    gone = weakref.ref(config)
    del config
    gc.collect()
    assert gone() is None
    assert kv_cache_utils.resolve_none_hash_seed(hashing.sha256) == kv_cache_utils.DEFAULT_NONE_HASH_SEED


def test_settings_that_are_refused_stop_the_engine() -> None:
    with pytest.raises(ConfigError, match="page_salt"):
        first_hash(engine({"page_salt": "sometimes"}))


def test_a_vllm_that_cannot_be_salted_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    config = MInferenceConfig(page_salt="method")
    pages.require(config)
    monkeypatch.setattr(kv_cache_utils, "resolve_none_hash_seed", lambda hash_fn: "stock")
    pages.require(MInferenceConfig())
    with pytest.raises(ConfigError, match=r'minference\.page_salt="method" .* Set it to "off"'):
        pages.require(config)


def test_an_engine_that_vllm_did_not_tell_of_is_refused() -> None:
    ours, part, other = (engine(METHOD) for _ in range(3))
    layers: dict[str, Any] = {}
    for config, context in ((ours, layers), (part, layers), (other, {"another's": None})):
        config.compilation_config = SimpleNamespace(static_forward_context=context)
    config = MInferenceConfig(page_salt="method")
    with pytest.raises(ConfigError, match=r'minference\.page_salt="method" has no effect on this engine'):
        pages.require_noted(config, ours)
    pages.require_noted(MInferenceConfig(), ours)
    pages.serve(ours)
    pages.serve(other)
    for told in (ours, part, other):  # vLLM has several configurations of an engine
        pages.require_noted(config, told)


def test_hashes_before_an_engine_is_known_are_told_of(log_lines: list[tuple[str, str]]) -> None:
    # Checks before this one have noted engines with the one that is in place.
    seed = pages.SaltedSeed(lambda hash_fn: "vLLM's own")
    assert seed(hashing.sha256) == "vLLM's own"
    noted = engine(METHOD)
    seed.note(noted)
    assert seed(hashing.sha256) != "vLLM's own"
    assert [line for level, line in log_lines if level == "WARNING"] == [
        "MInference: block hashes begin before an engine is known: no minference.page_salt is in them."
    ]
