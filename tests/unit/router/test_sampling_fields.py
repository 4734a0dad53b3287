"""What becomes of a request's sampling settings on their way to a worker, and of the model's recommended ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from baton.common.config import load_config
from baton.common.errors import ConfigError, InvalidRequest
from baton.common.sampling import SamplingParams
from protos import inference_pb2 as pb
from protos import worker_pb2 as wpb
from router.request_spec import spec_of
from router.sampling_defaults import SamplingDefaults
from router.sampling_fields import SamplingFields
from router.types import GenerationRequest, belongs_to
from tests.support.fake_worker import FakeWorker, answer
from tests.unit.router.conftest import EOS_ID, MODEL, Served, byte_tokenizer
from tests.unit.router.conftest import serving as serve_fake

EVERYTHING: dict[str, Any] = {
    "max_tokens": 9,
    "temperature": 0.5,
    "top_p": 0.25,
    "top_k": 7,
    "min_p": 0.125,
    "repetition_penalty": 1.5,
    "presence_penalty": -0.5,
    "frequency_penalty": 0.75,
    "seed": 5,
    "min_tokens": 3,
}


def resolve(defaults: SamplingDefaults | None = None, max_tokens: int = 16, **fields: Any) -> SamplingParams:
    asked = SamplingFields.model_validate(fields)
    return asked.resolve(
        defaults or SamplingDefaults(), max_tokens=max_tokens, eos_ids=frozenset({256}), vocab_size=300
    )


async def test_every_setting_reaches_the_worker_over_http_and_grpc(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    bias, stops = {"5": 1.5, "007": -2.0, "9": 0.0}, [11, 12]
    await served.complete(**EVERYTHING, logit_bias=bias, stop_token_ids=stops, logprobs=2, prompt_logprobs=4)
    sampling = pb.SamplingParams(**EVERYTHING, logit_bias={int(k): v for k, v in bias.items()}, stop_token_ids=stops)
    call = served.grpc.Generate(
        pb.GenerateRequest(
            model=MODEL, token_ids=pb.TokenIds(ids=[1, 2, 3]), sampling=sampling, logprobs=2, prompt_logprobs=4
        )
    )
    assert [response async for response in call][-1].finish_reason == "length"
    over_http, over_grpc = (command.spec for command in workers[0].received("generate"))
    assert dict(over_http.logit_bias) == {5: 1.5, 7: -2.0}
    assert list(over_http.stop_token_ids) == [11, 12, EOS_ID]
    assert (over_http.logprobs, over_http.prompt_logprobs) == (2, 4)
    for name, value in EVERYTHING.items():
        assert getattr(over_http, name) == value, name
    over_http.deadline_s = over_grpc.deadline_s = 0
    assert over_http == over_grpc


async def test_what_nobody_asked_for_is_off(workers: list[FakeWorker], served: Served) -> None:
    workers.append(FakeWorker("d0", script=answer))
    await served.attach(*workers)
    await served.complete(ignore_eos=True)
    await served.complete(ignore_eos=True, stop_token_ids=[7], logprobs=0)
    plain, other = (command.spec for command in workers[0].received("generate"))
    off = wpb.RequestSpec(temperature=1.0, top_p=1.0, top_k=-1, repetition_penalty=1.0, max_tokens=16)
    off.token_ids.extend([1, 2, 3])
    plain.seed = plain.deadline_s = 0
    assert plain == off
    assert list(other.stop_token_ids) == [7]
    assert other.HasField("logprobs")
    assert not other.HasField("prompt_logprobs")


def test_a_resubmission_keeps_the_settings_and_shrinks_the_limits() -> None:
    sampling = SamplingParams(max_tokens=10, min_tokens=4, seed=3, choice=2, frequency_penalty=1.0, logprobs=1)
    request = GenerationRequest("r", (1, 2), sampling, 60.0)
    first, later, last = (spec_of(request, emitted, 1.0) for emitted in ([], [7, 8, 9], [7] * 9))
    assert (first.num_emitted, first.max_tokens, first.min_tokens) == (0, 10, 4)
    assert (later.num_emitted, later.max_tokens, later.min_tokens) == (3, 7, 1)
    assert (last.num_emitted, last.max_tokens, last.min_tokens) == (9, 1, 0)
    assert list(later.token_ids) == [1, 2, 7, 8, 9]
    assert {(spec.seed, spec.choice, spec.frequency_penalty, spec.logprobs) for spec in (first, later)} == {
        (3, 2, 1, 1)
    }


def test_greedy_and_off_have_one_spelling_each() -> None:
    assert resolve(temperature=1e-9).temperature == 0
    assert [resolve(top_k=k).top_k for k in (-1, 0, 1)] == [-1, -1, 1]
    assert resolve(top_p=1e-30).top_p > 1e-7
    assert resolve(seed=-1).seed == 2**64 - 1
    assert resolve().seed != resolve().seed
    assert resolve(stop="a").stop_token_ids == resolve(stop_token_ids=[]).stop_token_ids == {256}


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"stop_token_ids": [299, 300]}, "stop_token_ids"), ({"logit_bias": {"300": 1.0}}, "logit_bias")],
)
def test_ids_that_no_token_has_are_refused(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest, match="300") as error:
        resolve(**fields)
    assert error.value.param == param


RECOMMENDED = {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.01, "repetition_penalty": 1.05}


def test_the_models_defaults_hold_where_the_request_says_nothing(tmp_path: Path) -> None:
    content = {**RECOMMENDED, "do_sample": True, "eos_token_id": [1, 2], "max_new_tokens": 2048, "top_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    defaults = SamplingDefaults.load(tmp_path)
    assert defaults.model_dump() == {**RECOMMENDED, "top_p": 1.0}
    untouched = resolve(defaults)
    assert (untouched.temperature, untouched.top_k, untouched.top_p) == (0.6, 20, 1.0)
    assert (untouched.min_p, untouched.repetition_penalty) == (0.01, 1.05)
    asked = resolve(defaults, temperature=0, top_k=-1, min_p=0, repetition_penalty=1, top_p=0.5)
    assert (asked.temperature, asked.top_k, asked.min_p, asked.repetition_penalty, asked.top_p) == (0, -1, 0, 1, 0.5)
    assert SamplingDefaults.load(tmp_path / "elsewhere") == SamplingDefaults()


@pytest.mark.parametrize(("key", "value"), [("temperature", -1), ("top_p", 2), ("top_k", "all"), ("min_p", True)])
def test_a_default_that_cannot_be_is_named(tmp_path: Path, key: str, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({key: value}))
    with pytest.raises(ConfigError, match=rf"generation_config\.json: {key}"):
        SamplingDefaults.load(tmp_path)


@pytest.mark.parametrize("setting", ["auto", "none"])
async def test_the_server_says_which_defaults_hold_and_can_ignore_the_models(
    tmp_path: Path, workers: list[FakeWorker], setting: str
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({**RECOMMENDED, "eos_token_id": [1, 2]}))
    config: dict[str, Any] = {"model": str(tmp_path), "served_model_name": MODEL, "generation_config": setting}
    workers.append(FakeWorker("d0", script=answer))
    async with serve_fake(**config) as served:
        await served.attach(*workers)
        await served.complete()
        (card,) = (await served.http.get("/v1/models")).json()["data"]
        listed = await served.grpc.ListModels(pb.ListModelsRequest())
    spec = workers[0].received("generate")[0].spec
    expected = RECOMMENDED if setting == "auto" else SamplingDefaults().model_dump()
    assert card["sampling_defaults"] == expected
    for name, value in expected.items():
        assert getattr(spec, name) == pytest.approx(value)
        assert getattr(listed.models[0].sampling_defaults, name) == pytest.approx(value)


def test_the_setting_is_a_flag_and_a_key() -> None:
    assert load_config(None, {"model": "m"}).generation_config == "auto"
    with pytest.raises(ConfigError, match="generation_config"):
        load_config(None, {"model": "m", "generation_config": "vllm"})


def test_a_group_is_known_by_its_id_alone() -> None:
    assert belongs_to("cmpl-abc", "cmpl-abc")
    assert belongs_to("cmpl-abc-12", "cmpl-abc")
    assert not belongs_to("cmpl-abc-12", "cmpl-ab")
    assert not belongs_to("cmpl-12345678901234567890123456789012", "cmpl")
    assert not belongs_to("cmpl-abc", "cmpl-abc-12")


def test_the_byte_tokenizer_of_these_tests_has_the_bytes() -> None:
    texts = byte_tokenizer().texts
    ids = byte_tokenizer().encode("a \u00e9\n")
    assert b"".join(map(texts.raw, ids)) == "a \u00e9\n".encode()
    assert texts.text(EOS_ID) == "<eos>"
    assert texts.raw(299) == b""
