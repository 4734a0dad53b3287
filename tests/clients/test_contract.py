"""schemathesis sends what the OpenAPI document allows and forbids: no 5xx, and every answer is as documented."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from router.sampling_fields import MAX_CHOICES, MAX_TOKENS
from tests.clients.conftest import MODEL
from tests.support.serving import ServeProcess

pytestmark = pytest.mark.clients
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


OPERATIONS = [
    "POST /v1/completions",
    "POST /v1/chat/completions",
    "POST /tokenize",
    "POST /detokenize",
    "GET /v1/models",
    "GET /v1/requests/{request_id}",
    "GET /v1/workers",
    "GET /health",
    "GET /ready",
    "GET /metrics",
]
_EXAMPLES = 40


@pytest.fixture(scope="module")
def document(server: ServeProcess) -> schemathesis.BaseSchema:
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_every_endpoint_is_documented(document: schemathesis.BaseSchema) -> None:
    results: list[Any] = list(document.get_all_operations())
    found = [result.ok() for result in results]
    assert sorted(f"{one.method.upper()} {one.path}" for one in found) == sorted(OPERATIONS)


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["allowed", "forbidden"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_server_keeps_its_contract(document: schemathesis.BaseSchema, operation: str, mode: GenerationMode) -> None:
    method, path = operation.split()
    if mode is GenerationMode.NEGATIVE and method == "GET":
        pytest.skip("it takes nothing that could be wrong")

    @settings(
        max_examples=_EXAMPLES if method == "POST" else 3,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(document[path][method].as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        _make_likelier(case.body)
        case.call_and_validate(checks=CHECKS, timeout=60)

    check()


def _make_likelier(body: object) -> None:
    """Most requests name the model that is served, and are short: what follows the first check is worth testing too."""
    if not isinstance(body, dict):
        return
    if isinstance(body.get("model"), str) and len(body["model"]) % 4 != 1:
        body["model"] = MODEL
    for name, limit, largest in (
        ("max_tokens", 4, MAX_TOKENS),
        ("max_completion_tokens", 4, MAX_TOKENS),
        ("n", 3, MAX_CHOICES),
    ):
        if isinstance(body.get(name), int) and limit < body[name] <= largest:  # what is forbidden stays so
            body[name] = limit
