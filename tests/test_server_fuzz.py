"""Requests made from the server's own OpenAPI schema, right and wrong ones: none makes the server fail."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.server_process import Server, server_workspace, serving

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = server_workspace(tmp_path_factory.mktemp("workspace")).folder
    with serving(folder, "--chat", "generation.max_new_tokens=2", "--max-tokens", "64", "--timeout", "60") as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_no_request_makes_the_server_fail(server: Server, mode: GenerationMode) -> None:
    statuses: set[int] = set()
    operations = schemathesis.openapi.from_url(f"{server.address}/openapi.json").get_all_operations()
    paths = set()
    for operation in [result.ok() for result in operations if isinstance(result, Ok)]:
        paths.add(operation.path)
        if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            continue  # nothing in them can be wrong

        @settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
        @given(operation.as_strategy(generation_mode=mode))
        def check(case: Case[Any]) -> None:
            statuses.add(case.call_and_validate(checks=CHECKS, timeout=60).status_code)

        check()
    assert paths == {"/v1/models", "/v1/models/{name}", "/v1/completions", "/v1/chat/completions"}
    assert 200 in statuses if mode is GenerationMode.POSITIVE else statuses <= {200, 400, 404, 415}
