"""Schemathesis over the OpenAPI document: whatever is sent, nothing ends in a 5xx, and answers are what the document says."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from servers import Service, pictures, serving, zipped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from personalize.service.openapi import document
from personalize.service.options import Options

CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ENDLESS = "/api/events"  # a stream that ends with the service

pytestmark = pytest.mark.filterwarnings("ignore")  # of schemathesis, while it makes data


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with a dataset in it, whose jobs wait."""
    with serving(Options(tmp_path_factory.mktemp("contract") / "workspace")) as service:
        service.client.post("/api/datasets", files={"files": ("rex.zip", zipped(pictures()))})
        yield service


def check_operations(service: Service, examples: int) -> int:
    """Try every operation with so many requests; returns how many operations there are."""
    schema = schemathesis.openapi.from_url(f"{service.address}/api/openapi.json")
    count = 0
    for found in schema.get_all_operations():
        operation = found.ok()
        if operation.path == ENDLESS:
            continue
        try_operation(service, operation, examples)
        count += 1
    return count


def try_operation(service: Service, operation: Any, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, derandomize=True, phases=(Phase.generate,),
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(case=operation.as_strategy())
    def try_case(case: Any) -> None:
        response = case.call(base_url=service.address, timeout=60)
        case.validate_response(response, checks=CHECKS)
        if response.status_code >= 400:
            assert set(response.json()["error"]) == {"message", "type", "param", "code", "hint"}

    try_case()


def test_whatever_is_sent_is_answered(service: Service) -> None:
    assert check_operations(service, 4) > 40


@pytest.mark.slow
def test_much_of_whatever_is_sent_is_answered(service: Service) -> None:
    check_operations(service, 150)


def test_the_document_names_every_route(service: Service) -> None:
    from personalize.service.app import create_app

    paths = document(create_app(service.studio))["paths"]
    for path in ["/v1/files", "/v1/uploads/{upload_id}/parts", "/v1/fine_tuning/jobs/{job}/checkpoints", "/v1/models/{model}",
                 "/v1/images/edits", "/api/jobs/{id}/events", "/api/datasets/{dataset}/captions",
                 "/api/adapters/{id}/send", "/health"]:  # fmt: skip
        assert path in paths, path
    for operations in paths.values():
        for operation in operations.values():
            assert operation["description"] and "422" not in operation["responses"]
