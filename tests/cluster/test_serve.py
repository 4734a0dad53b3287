"""`baton serve` as users start it: a subprocess, real Ray, gRPC, HTTP and gloo, two workers of each role."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import httpx
import pytest

from tests.cluster.load import Answer, Job, mixed_jobs, run_jobs
from tests.support.at_rest import wait_at_rest
from tests.support.oracle import GreedyOracle
from tests.support.serving import ServeProcess, serve
from tests.support.tiny_model import make_tiny_llama

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(400)]


def _check(jobs: list[Job], answers: list[Answer], model: Path) -> GreedyOracle:
    oracle = GreedyOracle.load(model)
    for job, answer in zip(jobs, answers, strict=True):
        assert len(answer.token_ids) == answer.completion_tokens == job.max_tokens
        assert answer.prompt_tokens == len(job.prompt)
        assert answer.finish_reason == "length"
        if job.temperature == 0:
            oracle.check(list(job.prompt), list(answer.token_ids))
    print(f"{oracle.checked_tokens} greedy tokens checked, {oracle.near_ties} near-ties")
    return oracle


def test_mixed_load_equals_transformers_and_leaves_nothing(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path / "tiny")
    jobs = mixed_jobs(200, seed=1)
    with serve(model, "--prefill", "2", "--decode", "2", "--device", "cpu", "--policy", "remote") as server:
        answers = asyncio.run(run_jobs(server.url, server.grpc_target, "tiny", jobs, concurrency=32))
        asyncio.run(wait_at_rest(server.url, num_workers=4, timeout_s=5.0))
        _check(jobs, answers, model)
        assert sum(answer.path == "remote" for answer in answers) > 150, "the hand-over was hardly used"

        sampled = [job for job in jobs if job.temperature > 0][:8]
        again = asyncio.run(run_jobs(server.url, server.grpc_target, "tiny", sampled, concurrency=1))
        first = [answer.token_ids for job, answer in zip(jobs, answers, strict=True) if job in sampled]
        assert [answer.token_ids for answer in again] == first, "a seed must give the same tokens on any worker"

        _names_of_actors_are_visible(server)
        _nothing_of_ours_listens_on_every_interface(server)
        listening = server.listening()
        assert server.interrupt() == 0, server.text()
        assert not server.processes(), [process.cmdline() for process in server.processes()]
    for port in {server.http_port, server.grpc_port} & {port for _, port in listening}:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"http://127.0.0.1:{port}/health")


def _names_of_actors_are_visible(server: ServeProcess) -> None:
    titles = [" ".join(process.cmdline()) for process in server.processes()]
    for role in ("PrefillWorker", "DecodeWorker"):
        assert sum(title.startswith(f"ray::{role}") for title in titles) == 2, titles


def _nothing_of_ours_listens_on_every_interface(server: ServeProcess) -> None:
    """Ray's own port in every worker process is the one exception that we cannot set."""
    for process in server.processes():
        title = " ".join(process.cmdline())
        if title.startswith(("ray::PrefillWorker", "ray::DecodeWorker")):
            open_ports = [c for c in process.net_connections(kind="tcp") if c.status == "LISTEN"]
            everywhere = [c.laddr for c in open_ports if c.laddr.ip in ("0.0.0.0", "::")]
            assert len(everywhere) <= 1, everywhere


def test_a_colocated_server_that_lets_a_long_answer_end(tmp_path: Path) -> None:
    """No prefill worker. After SIGTERM the answer takes longer than the three seconds of Ray's own handler."""
    model = make_tiny_llama(tmp_path / "tiny", max_position_embeddings=8192, num_hidden_layers=8)
    jobs = mixed_jobs(12, seed=2)
    (tmp_path / "patient.yaml").write_text("cluster: {drain_timeout_s: 200}")
    arguments = ("--config", str(tmp_path / "patient.yaml"), "--prefill", "0", "--decode", "1", "--device", "cpu")
    with serve(model, *arguments, "--served-model-name", "m") as server:
        assert "colocated: 0 prefill + 1 decode on cpu" in server.text()
        answers = asyncio.run(run_jobs(server.url, server.grpc_target, "m", jobs, concurrency=6))
        assert {answer.path for answer in answers} == {"local"}
        _check(jobs, answers, model)

        num_tokens, took = _terminated_amid_an_answer(server, max_tokens=1500)
        assert num_tokens == 1500
        assert took > 4.0, f"the answer ended {took:.1f} s after SIGTERM: too soon to show anything"
        assert server.process.wait(60) == 0, server.text()
        assert not server.processes()


def _terminated_amid_an_answer(server: ServeProcess, max_tokens: int) -> tuple[int, float]:
    """Tokens of an answer at whose first one the server is sent SIGTERM, and the seconds until its end."""
    body = {"model": "m", "prompt": [1], "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    num_tokens, terminated_at = 0, 0.0
    with (
        httpx.Client(base_url=server.url, timeout=120.0) as http,
        http.stream("POST", "/v1/completions", json={**body, "return_token_ids": True}) as response,
    ):
        for line in response.iter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                assert "choices" in event, event
                num_tokens += sum(len(choice["token_ids"]) for choice in event["choices"])
                if not terminated_at:
                    server.terminate()
                    terminated_at = time.monotonic()
    return num_tokens, time.monotonic() - terminated_at


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["--block-size", "17"], "engine.block_size"),
        (["--port", "70000"], "server.port"),
        (["--dtype", "int4"], "engine.dtype"),
        (["--decode", "0"], "cluster.decode"),
        (["--policy", "sometimes"], "router.policy"),
    ],
)
def test_a_wrong_flag_is_one_line_that_names_its_key(
    arguments: list[str], key: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from baton.cli.main import main

    monkeypatch.setattr("sys.argv", ["baton", "serve", "some-model", *arguments])
    with pytest.raises(SystemExit) as exit_info:
        main()
    assert exit_info.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert key in lines[0]
