# SPDX-License-Identifier: Apache-2.0
"""Lines of our JSON files. The first says how the file was made; a file made otherwise is never gone on with."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from minference_vllm.errors import ConfigError, shortened


class Line(BaseModel):
    """A line of a file."""

    # JSON has no word for what is no number: where a server sends such a thing, that is its error.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


AnyLine = TypeVar("AnyLine", bound=Line)


def read_line(kind: type[AnyLine], raw: bytes, where: str, what: str) -> AnyLine:
    """A line of a file. What it holds is not repeated: prompts and answers are nobody else's business.

    Args:
        where: file and number of the line, for messages.
        what: the file is to be.

    Raises:
        ConfigError: it is no such line.
    """
    try:
        return kind.model_validate_json(raw, strict=True)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        field = ".".join(shortened(part, str) for part in fault["loc"]) or kind.__name__
        raise ConfigError(f"{where} is no line of {what}: {field}: {fault['msg']}.") from None


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
