"""What the OpenAPI page says is what is answered, and no request makes the server fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings

from tests.serve.inside import Inside, Scripted

schemathesis = pytest.importorskip("schemathesis")
from schemathesis.specs.openapi.checks import positive_data_acceptance  # noqa: E402

# Not checked: that what is legal by its form is accepted. A video may not fit, a picture be none.

_ENDLESS = "/v1/events"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Inside]:
    folder = tmp_path_factory.mktemp("serve")
    running = Inside(folder / "own", Scripted(folder / "none"))
    yield running
    running.close()


def tried(server: Inside, examples: int, *, again: bool) -> int:
    """Try so many requests of each operation; returns how many operations there are."""
    described = schemathesis.openapi.from_url(f"{server.url}/openapi.json").exclude(path=_ENDLESS)
    operations = [result.ok() for result in described.get_all_operations()]
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=again,
            suppress_health_check=list(HealthCheck),
        )
        def holds(case: Any) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        holds()
    return len(operations)


def test_no_request_is_answered_by_a_failure(server: Inside) -> None:
    assert tried(server, 10, again=True) == 20


@pytest.mark.faults
def test_no_request_of_many_is_answered_by_a_failure(server: Inside) -> None:
    assert tried(server, 300, again=False) == 20
    print("\n300 requests of each of 20 operations, none answered by a failure")
