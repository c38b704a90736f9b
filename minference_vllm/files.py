# SPDX-License-Identifier: Apache-2.0
"""Files that a user names."""

from pathlib import Path

from minference_vllm.errors import ConfigError

MAX_FILE_BYTES = 2**20


def read_file(path: Path, name: str) -> bytes:
    """What a file holds; `name` is how messages name it.

    Raises:
        ConfigError: it cannot be read, or is larger than MAX_FILE_BYTES.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # a zero byte in the path
        raise ConfigError(f"{name} cannot be read: {error}.") from None
    if len(content) > MAX_FILE_BYTES:
        raise ConfigError(f"{name} is larger than {MAX_FILE_BYTES:,} bytes: name another file.")
    return content
