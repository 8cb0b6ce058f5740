"""Requests that the OpenAPI document allows, and some that it does not, drawn by schemathesis."""

from __future__ import annotations

from contextlib import suppress

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import Case, GenerationMode

from tests import patience
from tests.server.live import serving
from tests.server.test_broken_requests import check_unharmed

EXAMPLES = 10  # of each operation and mode
LEFT_ALONE = {"/terminate", "/sleep", "/wakeup"}  # they would end or stop the server that other tests use
LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens", "max_new_tokens", "request_output_len")
BOUNDED = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def send(case: Case, url: str) -> int:
    """The answer's status; no answer is longer than a few tokens."""
    if isinstance(case.body, dict):
        case.body |= {name: 3 for name in LENGTHS if isinstance(case.body.get(name), int)}
        if not any(name in case.body for name in LENGTHS):
            case.body["max_tokens"] = 3
    return case.call(base_url=url, timeout=patience.PATIENCE).status_code


@pytest.fixture(scope="module")
def live(pipe):
    with serving(pipe.frontend, enable_abort_handling=True) as live:
        yield live


def test_no_drawn_request_breaks_the_server(live, pipe):
    schema = schemathesis.openapi.from_dict(patience.get(live.url + "/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]
    asked = [operation for operation in operations if operation.path not in LEFT_ALONE]
    assert len(asked) >= 15, "the document has lost its routes"
    statuses: set[int] = set()
    for operation in asked:
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):

            @BOUNDED
            @given(case=operation.as_strategy(generation_mode=mode))
            def ask(case: Case) -> None:
                status = send(case, live.url)
                assert status < 500, case.as_curl_command()
                statuses.add(status)

            with suppress(Unsatisfiable):  # a route that takes nothing cannot be given anything wrong
                ask()
    assert {200, 400} <= statuses, "all of them failed, or none did"
    check_unharmed(live, pipe)


def test_schemas_have_names_of_their_own(live):
    """Two bodies of one name would be told apart by their modules, which clients are generated from."""
    schemas = patience.get(live.url + "/openapi.json").json()["components"]["schemas"]
    assert [name for name in schemas if "__" in name] == []
