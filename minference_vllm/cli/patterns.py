# SPDX-License-Identifier: Apache-2.0
"""`minference-vllm patterns`: makes pattern files from MInference's lists, and shows what a pattern file holds."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

from minference_vllm.cli.status import FAILED
from minference_vllm.errors import ConfigError, shortened
from minference_vllm.files import read_file, write_file

IMPORT = f"""\
Makes a pattern file from a list that MInference's search has written. Checkpoints of Qwen with a context of a million
tokens hold such a list too, in sparse_attention_config.json or in config.json. The file's notes, which are printed, say
how entries without an equivalent in this package were converted.
Exit status: 0 written, {FAILED} not."""

PUBLISHED = """\
Makes the pattern files that come with this package again, from MInference's unpacked release:
MINFERENCE_SKIP_CUDA_BUILD=TRUE pip download --no-binary :all: --no-deps --no-build-isolation minference==0.1.6.0"""


def run_import(options: argparse.Namespace) -> int:
    """Import one list."""
    from pydantic import ValidationError

    from minference_vllm.compat import engines
    from minference_vllm.patterns.file import Geometry, Provenance
    from minference_vllm.patterns.importer import import_list, write
    from minference_vllm.tuning.heads import from_config

    try:
        config = engines.text_config(options.model)
        heads = from_config(config)
        geometry = Geometry(
            num_layers=config.num_hidden_layers,
            num_qo_heads=heads.num_qo_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.head_dim,
        )
    except Exception as error:  # vLLM and transformers have no common exception for a refusal
        raise ConfigError(
            f"Layers and heads of {options.model!r} cannot be read from its config.json: {error}"
        ) from None
    try:
        source = Provenance(source=options.source, file=options.list.name, licence=options.licence)
    except ValidationError as error:
        fault = error.errors()[0]
        raise ConfigError(
            f"--{fault['loc'][0]} {shortened(fault['input'])} cannot stand in a file: {fault['msg']}."
        ) from None
    content = read_file(options.list, str(options.list))
    file = import_list(content, str(options.list), geometry, options.name or [options.model], source)
    write_file(options.out, write(file), str(options.out))
    print(f"{options.out}: {describe(file)}")
    return 0


def run_published(options: argparse.Namespace) -> int:
    """Import all lists of MInference's release."""
    from minference_vllm.patterns.importer import write
    from minference_vllm.patterns.published import published

    for name, file in published(options.sdist):
        write_file(options.out / name, write(file), str(options.out / name))
        print(f"{options.out / name}: {describe(file)}")
    return 0


def run_show(options: argparse.Namespace) -> int:
    """Say what a pattern file holds."""
    from minference_vllm.patterns.file import read_pattern

    print(f"{options.file}: {describe(read_pattern(options.file))}")
    return 0


def describe(file: Any) -> str:
    """Models, geometry, the commonest heads and the notes of a pattern file."""
    from minference_vllm.patterns.file import DENSE

    heads = Counter(head for layer in file.layers if layer != DENSE for head in layer)
    kinds = [f"{count} of {_kind(head)}" for head, count in heads.most_common(5)]
    if others := len(heads) - len(kinds):
        kinds.append(f"and {others} other")
    dense = f", {len(file.dense_layers)} of them dense" if file.dense_layers else ""
    lines = [
        f"for {', '.join(file.models) or 'no model by name'}",
        f"{file.geometry.num_layers} layers{dense}; heads: {', '.join(kinds)}",
        f"from {file.provenance.source} {file.provenance.file}",
        *(f"note: {note}" for note in file.provenance.notes),
    ]
    return "\n  ".join(lines)


def _kind(head: Any) -> str:
    return f"share {head:g}" if isinstance(head, float) else " / ".join(map(str, head))


def add_parser(commands: Any) -> None:
    """Add this command to those of an argparse parser."""
    command = commands.add_parser("patterns", help="pattern files: how much each head of a model keeps")
    actions = command.add_subparsers(required=True, metavar="ACTION")
    action = actions.add_parser("import", description=IMPORT, help="make a pattern file from one of MInference's lists")
    action.set_defaults(run=run_import)
    action.add_argument("list", type=Path, help="the list")
    action.add_argument("--model", required=True, help="directory, or name on the hub; its config.json has the heads")
    action.add_argument("--name", action="append", help='name by which "auto" finds the file; default: --model')
    action.add_argument("--out", type=Path, required=True, help="the pattern file")
    action.add_argument("--source", default="imported by hand", help="where the list is from, to be noted in the file")
    action.add_argument("--licence", default="", help="licence of the list, to be noted in the file")
    action = actions.add_parser("published", description=PUBLISHED, help="make the pattern files of this package again")
    action.set_defaults(run=run_published)
    action.add_argument("sdist", type=Path, help="the unpacked release")
    action.add_argument("--out", type=Path, required=True, help="a folder")
    action = actions.add_parser("show", help="say what a pattern file holds")
    action.set_defaults(run=run_show)
    action.add_argument("file", type=Path)
