# SPDX-License-Identifier: Apache-2.0
"""What users, disks and other programs put where something sane is expected."""

import contextlib
import signal
from collections.abc import Iterator

# Of a setting, as words on a command line.
WORDS = (
    *("nan", "inf", "-inf", "-1", "0", "1", "2147483648", "9223372036854775808", "1e308", "1e-320"),
    *("100000000000000000000000", "-0.0", "0x10", "1_000", "½", "²", "True", "None", "[]", "{}"),
    *("", " ", "a" * 4000, "9" * 4000, "naïve \U0001f3b5 名前", "../../etc/passwd", "/dev/null"),
    *("~nobody-of-this-name/x", "a/b", ".", "..", "--", "-", "%s%n", "$(reboot)", "; rm -rf /"),
    *("\u202e", "\udcff", "a\nb", "1,234.5", "1e3", "lstm", "-1 -1"),
)
# Of a cell, as texts.
CELLS = (
    *("", "nan", "NaN", "inf", "-inf", "1e308", "1.8e308", "1e300", "1e37", "1e-200", "1e-320"),
    *("-1e30", "1e15", "9" * 30, "9" * 400, "1,234.5", "1.234,5", "5,1", "12 %", "$5", "true"),
    *("2024-01-01", "9999-12-31", "0001-01-01", "1700-01-01", "2024-02-30", "12:00", "-", "\ufeff"),
    *("\ud800", "\u202e", "a\tb", 'a"b', "a,b", "[1, 2]", '{"a": 1}', "null", "None", "x" * 5000),
)
# Of a cell, as a program has them; a value that is changed in place by no one.
OBJECTS = (
    *(None, float("nan"), float("inf"), 1.8e308, 1e300, -1e100, 1e-200, 5e-324, 1e15, 10**30),
    *(10**400, True, 1 + 2j, b"\xff\xfe", "\ud800", "x", "1,234.5", [1, 2], {"a": [1]}, (), {1}),
)
# Of bytes, within a file.
BYTES = (
    *(b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1f\x8b", b"PAR1", b"PK\x03\x04", b'"'),
    *(b"\n\n", b"\r", b",", b";", b"\t", b"{" * 2000, b"[" * 100_000, b"\\ud800", b"1e999"),
    *(b"9" * 5000, b"NaN", b'"a": 1, "a": 2', b"\xe2\x80\xae", b"\x1a", b"'", b"#"),
)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raises TimeoutError for what hangs."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"no end after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
