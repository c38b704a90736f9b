# SPDX-License-Identifier: Apache-2.0
"""A method that stands in the registry can be configured and made; nothing else names it."""

import subprocess
import sys

# In a process of its own: the settings are made from the registry when they are imported.
SCRIPT = """
from typing import Literal
from pydantic import Field
from minference_vllm import methods

class DummySettings(methods.MethodSettings):
    name: Literal["dummy"] = "dummy"
    size: int = Field(default=7, ge=1, le=9)
    '''How many.'''

class Dummy(methods.VerticalSlash):
    Settings = DummySettings

methods.METHODS += (Dummy,)

from minference_vllm.config import MInferenceConfig, load_config
from minference_vllm.errors import ConfigError
from minference_vllm.ops import Kernel

def refusal(**settings):
    try:
        return load_config({"minference": settings}, {})
    except ConfigError as error:
        return str(error)

config = load_config({"minference": {"method": {"name": "dummy", "size": 3}}}, {})
made = methods.make_method(config.method, Kernel.REFERENCE)
assert type(made) is Dummy and made.settings.size == 3
assert load_config({"minference": {"method": "dummy"}}, {}).method == DummySettings()
assert MInferenceConfig.model_validate_json(config.model_dump_json()) == config
assert "'vertical_slash' or 'dummy' or 'auto'" in refusal(method="other")
assert "size=10 is not allowed" in refusal(method={"name": "dummy", "size": 10})
assert "is a setting of the method dummy" in refusal(size=3)
assert "dummy" in MInferenceConfig.model_json_schema()["properties"]["method"]["discriminator"]["mapping"]
"""


def test_one_line_registers_a_method() -> None:
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
