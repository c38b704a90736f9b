# SPDX-License-Identifier: Apache-2.0
"""Lines of our JSON files. The first says how the file was made; a file made otherwise is never gone on with."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from minference_vllm.errors import ConfigError


class Line(BaseModel):
    """A line of a file."""

    # JSON has no word for what is no number: where a server sends such a thing, that is its error.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def refuse_other(path: Path, found: Line, wanted: Line) -> None:
    """Check that a file was made with what is asked for now.

    Raises:
        ConfigError: it was not; the message names each difference.
    """
    was, now = found.model_dump(mode="json"), wanted.model_dump(mode="json")
    differences = [f"{name} was {was[name]!r} and is now {now[name]!r}" for name in now if was[name] != now[name]]
    if differences:
        others = "; ".join(differences)
        raise ConfigError(f"{path} was made with other settings: {others}. Give the same, or another folder.")
