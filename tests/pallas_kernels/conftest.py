"""What the tests of the ops share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from jaxtyping import config


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """As users call the ops: what does not fit is the op's own error, no annotation's."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)
