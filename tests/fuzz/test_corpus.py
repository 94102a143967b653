"""Inputs that once ended in a traceback or in no end; `make fuzz` finds more."""

import re
from pathlib import Path
from random import Random

import pytest
from readers import READERS

from nanoqlora.config.errors import HIDDEN, LONGEST, UserError

CORPUS = Path(__file__).with_name("corpus")
INPUTS = sorted(path.relative_to(CORPUS).as_posix() for path in CORPUS.glob("*/*"))


@pytest.mark.parametrize("name", INPUTS)
def test_a_wrong_file_is_refused_in_one_line(name: str, capsys: pytest.CaptureFixture[str]):
    """Or it is read; the reader itself asserts what must hold then."""
    data = (CORPUS / name).read_bytes()
    try:
        READERS[name.split("/")[0]][1](data, Random(data))
    except UserError as error:
        line = " ".join(str(error).split())
        assert line and len(line) <= LONGEST + 5 and not re.search(HIDDEN, line)
    capsys.readouterr()


def test_the_corpus_is_small_and_of_known_readers():
    sizes = [(CORPUS / name).stat().st_size for name in INPUTS]
    assert {name.split("/")[0] for name in INPUTS} <= set(READERS)
    assert max(sizes) <= 8 << 10 and sum(sizes) <= 256 << 10
