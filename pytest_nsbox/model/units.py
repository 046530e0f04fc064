"""Sizes and durations as users write them."""

from __future__ import annotations

import re

from pytest_nsbox.errors import SpecError

_SIZE = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TIME = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_size(value: object) -> int:
    """Bytes from an int or a string with K, M, G or T (powers of 1024; "64M" is "64MiB").

    Raises SpecError for anything else.
    """
    allowed = "a size is bytes as an int, or a string like '64M' (K, M, G, T: powers of 1024)"
    if isinstance(value, int) and not isinstance(value, bool):
        number, factor = float(value), 1
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", str(value), re.I)
        if not isinstance(value, str) or not match:
            raise SpecError(allowed)
        number, factor = float(match[1]), _SIZE[match[2].upper()]
    if number < 0:
        raise SpecError(f"{allowed}, and not negative")
    return int(number * factor)


def parse_duration(value: object) -> float:
    """Seconds from a number or a string like "10s", "5m", "2h", "50d". Raises SpecError."""
    allowed = "a duration is seconds as a number, or a string like '10s', '5m', '2h', '50d'"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        seconds = float(value)
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", str(value))
        if not isinstance(value, str) or not match:
            raise SpecError(allowed)
        seconds = float(match[1]) * _TIME[match[2]]
    if not 0 <= seconds < float("inf"):
        raise SpecError(f"{allowed}, and not negative")
    return seconds


def format_size(size: int) -> str:
    """Bytes as a person reads them: "64 MiB", "63.9 MiB"."""
    value = float(size)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.1f}".removesuffix(".0") + f" {unit}"
        value /= 1024
    return f"{value:.1f}".removesuffix(".0") + " TiB"
