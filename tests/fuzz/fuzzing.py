"""How the tests in this folder try inputs that nobody thought of: a few each time, the same ones, and many if asked.

A case that was found to fail stands as a test of its own, in tests/test_bad_input.py or beside the code it is about.
"""

import pytest
from hypothesis import HealthCheck, settings


def numbers(short: int, long: int):
    """Parametrizes a test by how many `examples` it tries: `short`, and `long` with `-m soak`."""
    return pytest.mark.parametrize("examples", [short, pytest.param(long, marks=pytest.mark.soak)])


def tries(examples: int):
    """Hypothesis' settings: the same `examples` every time, however long they take."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
