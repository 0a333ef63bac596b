"""What is told of other libraries' errors."""

import pytest

from synthgen.errors import one_line


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("two\n  lines\tand a tab"), "two lines and a tab"),
        (ValueError(), "ValueError"),
        (KeyError(), "KeyError"),
        (OSError("s3://me:hunter2@bucket says no"), "s3://***@bucket says no"),
        (RuntimeError("long " * 100), ("long " * 100)[:300]),
    ],
)
def test_an_error_is_one_line_without_secrets(error, told):
    assert one_line(error) == told
