"""`baton demo`: a cluster on the CPU, a few streamed requests over HTTP and gRPC, and where their time went."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import grpc
import httpx
from rich.console import Console
from rich.table import Table

from baton.cluster.serving import ServingCluster, serving_cluster
from baton.common.config import BatonConfig, load_config
from baton.demo_model import demo_model_path
from protos import inference_pb2, inference_pb2_grpc

_PROMPTS = ("music:", "### user\nWhat is a bridge?\n### assistant\n")  # the second as its chat template writes it
_SAMPLING: dict[str, Any] = {"max_tokens": 40, "temperature": 0.3, "top_p": 0.9, "seed": 1}


def demo() -> None:
    """Start router, one prefill and one decode worker on the CPU, stream requests, print their timelines, stop."""
    config = load_config(
        None,
        {
            "model": str(demo_model_path()),
            "cluster.device": "cpu",
            "cluster.prefill": 1,
            "cluster.decode": 1,
            "server.port": 0,
            "server.grpc_port": 0,
            "router.policy": "remote",
        },
    )
    asyncio.run(_demo(config))


async def _demo(config: BatonConfig) -> None:
    console = Console()
    async with serving_cluster(config, console.print, show_worker_logs=False) as cluster:
        base_url = f"http://{config.server.host}:{cluster.router.http_port}"
        async with httpx.AsyncClient(base_url=base_url, timeout=60.0) as http:
            ids = [await _over_http(console, http, config, prompt) for prompt in _PROMPTS]
            ids += [await _over_grpc(console, cluster, prompt) for prompt in _PROMPTS]
            records = [(await http.get(f"/v1/requests/{request_id}")).json() for request_id in ids]
            console.print(_timeline_table(records))
            for record in records:
                console.print(f"{record['id']}: {record['path']}, {record['reason']}", markup=False, highlight=False)
    console.print("stopped")


async def _over_http(console: Console, http: httpx.AsyncClient, config: BatonConfig, prompt: str) -> str:
    """Stream one completion over HTTP, print the text as it arrives and return the request's id."""
    body = {"model": config.model_name, "prompt": prompt, "stream": True, **_SAMPLING}
    request_id = ""
    _print_prompt(console, "HTTP", prompt)
    async with http.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            data = line.removeprefix("data: ")
            if data and data != "[DONE]":
                chunk = json.loads(data)
                request_id = chunk["id"]
                _print_text(console, "".join(choice["text"] for choice in chunk["choices"]))
    console.print()
    return request_id


async def _over_grpc(console: Console, cluster: ServingCluster, prompt: str) -> str:
    """The same over gRPC."""
    request = inference_pb2.GenerateRequest(
        model=cluster.config.model_name,
        text=prompt,
        sampling=inference_pb2.SamplingParams(**_SAMPLING),
    )
    request_id = ""
    _print_prompt(console, "gRPC", prompt)
    async with grpc.aio.insecure_channel(f"{cluster.config.server.host}:{cluster.router.grpc_port}") as channel:
        async for response in inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=60.0):
            request_id = response.request_id
            _print_text(console, response.text)
    console.print()
    return request_id


def _print_prompt(console: Console, transport: str, prompt: str) -> None:
    shown = prompt if len(prompt) <= 48 else prompt[:45] + "..."
    console.print(f"[bold]{transport}[/bold] {shown!r} ->", end=" ")


def _print_text(console: Console, text: str) -> None:
    # What a model writes goes to a terminal: let no control character through.
    console.print("".join(c if c.isprintable() else " " for c in text), end="", markup=False, highlight=False)


def _timeline_table(records: list[dict[str, Any]]) -> Table:
    """One row per request, in milliseconds: the parts of the time to the first token, then what followed."""
    table = Table(
        title="Where the time went, in ms",
        caption="queued + reserve + prefill + delivery = first token; transfer overlaps",
        padding=0,
    )
    for name in ("path", "queued", "reserve", "prefill", "delivery", "first", "transfer", "second", "last"):
        table.add_column(name, justify="left" if name == "path" else "right", no_wrap=True)
    for record in records:
        parts = record["ttft_parts_us"]
        spans = (
            parts["queued"] + parts["retries"],
            parts["reserve"],
            parts["prefill_queue"] + parts["prefill_compute"],
            parts["delivery"],
            record["ttft_us"],
            record["transfer_us"],
            record["second_token_us"],
            record["last_token_us"],
        )
        table.add_row(record["path"], *("-" if span is None else f"{span / 1000:.1f}" for span in spans))
    return table
