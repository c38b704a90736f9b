# SPDX-License-Identifier: Apache-2.0
"""Runs one of RULER's generators: `python ruler_program.py GENERATOR [its options]`.

Generators that hide sentences in essays split the essays with NLTK, whose data must be downloaded. Without its data,
the essays are split at the ends of sentences by the rule below.
"""

import re
import runpy
import sys
from pathlib import Path

SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[\"'(]?[A-Z0-9])")


def split_sentences(text: str) -> list[str]:
    return SENTENCE_END.split(text)


def has_nltk_data() -> bool:
    """Whether NLTK can split English sentences on this machine."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english")
    except LookupError:
        return False
    return True


def main() -> None:
    generator = Path(sys.argv[1])
    if not has_nltk_data():
        import nltk.tokenize

        nltk.tokenize.sent_tokenize = split_sentences
    sys.argv = sys.argv[1:]
    # Python has put the folder of this file there, but a generator imports modules from its own folder.
    sys.path[0] = str(generator.parent)
    runpy.run_path(str(generator), run_name="__main__")


if __name__ == "__main__":
    main()
