"""Count the warnings that users see."""

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def one_line(pattern: str) -> Iterator[None]:
    """Assert that the block warns exactly once, with text that matches `pattern`."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        yield
    found = [str(one.message) for one in said]
    assert len(found) == 1, found
    assert re.search(pattern, found[0]), found
