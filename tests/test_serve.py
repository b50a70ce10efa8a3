"""The server as a process of its own, by a real HTTP client: many clients, many adapters, faults, and its end."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import serving
from serving import PROMPTS, World

from experiments import serve
from experiments.completions import NEUTRAL, READ, ApiError, parse
from lorajax.serve.engine import Busy, Counts, Stopped
from lorajax.serve.residents import Refused

httpx = pytest.importorskip("httpx", reason="httpx is not installed (extra: test)")
pytest.importorskip("uvicorn", reason="uvicorn is not installed (extra: serve)")
endpoint: Any = pytest.importorskip("experiments.endpoint")

ROOT = Path(__file__).parents[1]
CLIENTS, EACH, NEW = 32, 2, 12
SLOTS, QUEUE, LENGTH = 4, 40, 128
SAMPLED = {"temperature": 0.9, "top_p": 0.8}


def start(world: World, *more: str) -> tuple[subprocess.Popen[str], str]:
    words = [sys.executable, "-m", "experiments.serve", "--base", str(world.base), "--adapters", str(world.adapters),
             "--port", "0", "--slots", str(SLOTS), "--places", "5", "--length", str(LENGTH), "--queue", str(QUEUE),
             "--rank", "4", "--body", "20000", *more]  # fmt: skip
    server = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(world.base / "cache")})
    assert server.stdout is not None
    said = ""
    for line in server.stdout:
        said += line
        if found := re.search(r"listening on (http\S+)", line):
            return server, found[1]
    server.communicate()
    raise AssertionError(said)


def ask(model: str, prompt: Any = "the quick", **more: Any) -> dict[str, Any]:
    return {"model": model, "prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}


async def post(client: Any, body: Any, status: int = 200) -> dict[str, Any]:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer = await client.post("/v1/completions", content=content)
    assert answer.status_code == status, answer.text
    return answer.json()


async def events(client: Any, body: Any, found: list[dict[str, Any]], after: Any = None) -> str:
    """The text of a stream; its chunks go to `found`, and `after` is called behind the first with text."""
    async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
        last = ""
        async for line in answer.aiter_lines():
            if not line:
                continue
            assert line.startswith("data: ")
            last = line.removeprefix("data: ")
            if last != "[DONE]":
                found.append(json.loads(last))
                if after is not None and found[-1]["choices"][0]["text"]:
                    await after()
                    after = None
        assert last == "[DONE]"
    return "".join(chunk["choices"][0]["text"] for chunk in found if chunk["choices"])


async def numbers(client: Any) -> dict[str, float]:
    text = (await client.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"^(lorajax_\S+) (\S+)$", text, re.MULTILINE)}


async def idle(client: Any) -> dict[str, float]:
    while True:
        found = await numbers(client)
        if not found["lorajax_running"] and not found["lorajax_waiting"]:
            return found
        await asyncio.sleep(0.02)


class Job(NamedTuple):
    body: dict[str, Any]
    text: str
    reason: str
    prompt_tokens: int


def jobs_of(world: World, number: int) -> list[Job]:
    """What a client asks, one behind the other: greedy and sampled, as text and as ids, with a stop string or not."""
    names, rng, made = list(world.params), np.random.default_rng(number), []
    for i in range(EACH):
        name, prompt = names[(number + 6 * i) % len(names)], PROMPTS[rng.integers(len(PROMPTS))]
        drawn: Any = {**SAMPLED, "seed": int(rng.integers(2**32))} if (number + i) % 2 else {}
        tokens = world.alone(name, prompt, NEW, **drawn)
        text, reason = world.text(tokens), "stop" if world.end in tokens else "length"
        body = ask(name, world.ids(prompt) if i else prompt) | drawn
        if number % 4 < 2 and len(text) > 4:
            body["stop"] = ["never this", text[3:5]]
            text, reason = text[: text.find(text[3:5])], "stop"
        made.append(Job(body, text, reason, len(world.ids(prompt))))
    return made


async def many_clients(url: str, work: list[list[Job]]) -> None:
    async def one(number: int, jobs: list[Job]) -> None:
        async with httpx.AsyncClient(base_url=url, timeout=300) as client:
            for job in jobs:
                if number % 3:
                    answer = await post(client, job.body)
                    assert answer["choices"][0]["text"] == job.text, job
                    assert answer["choices"][0]["finish_reason"] == job.reason
                    assert answer["model"] == job.body["model"]
                    assert answer["usage"]["prompt_tokens"] == job.prompt_tokens
                else:
                    chunks: list[dict[str, Any]] = []
                    assert await events(client, job.body, chunks) == job.text, job
                    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
                    assert reasons == [*[None] * (len(chunks) - 1), job.reason]

    await asyncio.gather(*[one(number, jobs) for number, jobs in enumerate(work)], faults(url))


REFUSED: list[tuple[Any, int, str, str]] = [
    (b"{no", 400, "invalid_json", "no JSON"), (b"[1]", 400, "invalid_json", "JSON list"),
    (b"[" * 9000, 400, "invalid_json", "no JSON"), (b" " * 20001, 413, "body_too_large", "more than 20000 bytes"),
    (ask("two-3"), 404, "model_not_found", "no adapter 'two-3'; there are: one-0, one-1"),
    (ask("../adapters/one-0"), 404, "model_not_found", "no adapter"),
    (ask("x" * 1000), 404, "model_not_found", "no adapter 'xxx"),
    (ask("a" + "é" * 150 + "@1"), 404, "model_not_found", "no adapter"),
    (ask("one-0", "x" * 600), 400, "context_length_exceeded", "slots hold 128 together"),
    (ask("base", max_tokens=128), 400, "context_length_exceeded", "max_tokens=128"),
    (ask("base", ""), 400, "invalid_value", "prompt has to be one text"),
    (ask("base", ["a", "b"]), 400, "invalid_value", "prompt has to be one text"),
    (ask("base", [1, 5000]), 400, "invalid_value", "each below 300"),
    (b'{"model": "base", "prompt": "\\ud800"}', 400, "invalid_value", "prompt has to be one text"),
    ({"prompt": "a"}, 400, "invalid_value", "model has to be .*: it is missing"),
    (ask("base", temperature=float("nan")), 400, "invalid_value", "temperature has to be"),
    (ask("base", top_p=0), 400, "invalid_value", "top_p has to be"),
    (ask("base", seed=-1), 400, "invalid_value", "seed has to be"),
    (ask("base", max_tokens=True), 400, "invalid_value", "max_tokens has to be"),
    (ask("base", stop=["a"] * 5), 400, "invalid_value", "stop has to be"),
    (ask("base", n=2), 400, "unsupported_parameter", "n=2 is not supported: leave it out, or give 1"),
    (ask("base", logprobs=1), 400, "unsupported_parameter", "logprobs=1"),
    (ask("base", temprature=1), 400, "unknown_parameter", "'temprature': did you mean 'temperature'"),
]


async def faults(url: str) -> None:
    """Bodies that are refused in OpenAI's shape, and clients that hang up."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        for body, status, code, words in REFUSED:
            error = (await post(client, body, status))["error"]
            assert set(error) == {"message", "type", "param", "code"} and error["code"] == code, error
            assert re.search(words, error["message"]), error["message"]
        assert (await client.get("/v1/completions")).json()["error"]["message"].startswith("GET /v1/completions: Meth")
        assert (await client.get("/nowhere")).status_code == 404
        for i in range(4):
            async with client.stream("POST", "/v1/completions", json=ask(f"one-{i}", max_tokens=100, stream=True)) as s:
                async for _ in s.aiter_lines():
                    break  # and hang up
    host, port = re.findall(r"//(.*):(\d+)", url)[0]
    _, half = await asyncio.open_connection(host, int(port))
    half.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 90\r\n\r\n{")
    await half.drain()
    half.close()  # in the middle of a body


async def adapters_come_and_go(url: str, world: World, tmp: Path) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        async def listed() -> list[str]:
            return [row["id"] for row in (await client.get("/v1/models")).json()["data"]]

        assert await listed() == ["base", *sorted(f"one-{i}" for i in range(16))]
        want = world.text(world.alone("one-3", "fox", 24))

        async def removed() -> None:
            (world.adapters / "one-3").rename(tmp / "one-3")
            assert "one-3" not in await listed()
            await post(client, ask("one-3"), 404)

        assert await events(client, ask("one-3", "fox", max_tokens=24), [], removed) == want
        shutil.copytree(tmp / "one-3", tmp / "new")
        (tmp / "new").rename(world.adapters / "new")
        assert "new" in await listed()
        assert (await post(client, ask("new", "fox", max_tokens=24)))["choices"][0]["text"] == want
        # Another adapter under the same name is another adapter.
        shutil.rmtree(world.adapters / "new")
        shutil.copytree(world.adapters / "one-6", world.adapters / "new")
        other = world.text(world.alone("one-6", "fox", 24))
        assert (await post(client, ask("new", "fox", max_tokens=24)))["choices"][0]["text"] == other != want
        (tmp / "one-3").rename(world.adapters / "one-3")
        # A version of a library; one that is damaged.
        second = world.text(world.alone("one-2", PROMPTS[0], NEW))
        assert (await post(client, ask("one-2@1")))["choices"][0]["text"] == second
        await post(client, ask("one-2@7"), 404)
        shutil.copytree(world.adapters / "one-0", world.adapters / "bad")
        file = world.adapters / "bad/adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:200])
        error = (await post(client, ask("bad"), 400))["error"]
        assert error["code"] == "adapter_unreadable" and "safetensors" in error["message"]
        assert (await post(client, ask("bad", stream=True), 400))["error"]["code"] == "adapter_unreadable"


async def too_many(url: str) -> None:
    """More than run and wait are told to come back; those that hung up leave nothing behind."""
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as client:
        tasks = [asyncio.create_task(client.post("/v1/completions", json=ask("base", max_tokens=120)))
                 for _ in range(SLOTS + QUEUE + 40)]
        refused = []
        while len(refused) < 5:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert len(done) < len(tasks)
            refused = [task for task in done if task.result().status_code == 429]
        answer = refused[0].result()
        assert answer.json()["error"]["code"] == "queue_full" and answer.headers["retry-after"] == "1"
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def the_end(url: str, world: World, server: Any) -> None:
    """SIGTERM: what runs is finished, nothing new is taken."""
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:
        async def ends() -> None:
            server.send_signal(signal.SIGTERM)
            async with httpx.AsyncClient(base_url=url) as late:
                while True:
                    try:
                        answer = await late.get("/health")
                        assert answer.status_code == 200
                    except httpx.TransportError:
                        return

        want = world.text(world.alone("one-4", "a cat sleeps on", 24))
        assert await events(client, ask("one-4", "a cat sleeps on", max_tokens=24), [], ends) == want


def test_many_clients_many_adapters_and_faults(tmp_path: Path) -> None:
    world = serving.world(tmp_path / "world")
    work = [jobs_of(world, number) for number in range(CLIENTS)]
    server, url = start(world)
    try:
        assert url.startswith("http://127.0.0.1:")

        async def all_of_it() -> None:
            async with httpx.AsyncClient(base_url=url, timeout=300) as client:
                await many_clients(url, work)
                await idle(client)
                await adapters_come_and_go(url, world, tmp_path)
                await too_many(url)
                found = await idle(client)
                for name in world.params:  # after all that, as if nothing had been
                    answer = await post(client, ask(name))
                    assert answer["choices"][0]["text"] == world.text(world.alone(name, PROMPTS[0], NEW))
                assert {name: found[f'lorajax_compiled_programs{{program="{name}"}}'] for name in
                        ("prefill", "decode", "write")} == {"prefill": 2, "decode": 1, "write": 1}  # fmt: skip
                assert found["lorajax_adapters_on_device"] == 5
                assert found['lorajax_refused_total{status="429"}'] >= 5
                assert 'lorajax_refused_total{status="500"}' not in found
                assert sum(v for k, v in found.items() if "requests_total" in k and '"cancelled"' in k) >= 8
                assert found["lorajax_decode_rows"] > 1.5 * found["lorajax_decode_steps"]
                await the_end(url, world, server)

        asyncio.run(all_of_it())
        said, _ = server.communicate(timeout=60)
        assert server.returncode == 0, said
        assert re.search(r"stopped: \d+ tokens in .* tokens/s, slots \d+ % full", said), said
        assert "Traceback" not in said, said
    finally:
        server.kill()
        print(server.communicate()[0])


def test_null_is_the_default() -> None:
    null = {name: None for name in (*READ, *NEUTRAL) if name not in ("model", "prompt")}
    seed = {"seed": 3}
    assert parse(json.dumps({"model": "a", "prompt": "b", **null, **seed}).encode(), 9) == parse(
        json.dumps({"model": "a", "prompt": "b", **seed}).encode(), 9)


def test_what_takes_too_long_and_what_fails_has_an_answer() -> None:
    """Of an engine that never answers: no body, no tokens, no room in the queue."""
    cancelled: list[Any] = []
    busy: list[Exception] = []

    def submit(request: Any) -> None:
        if busy:
            raise busy[0]

    engine: Any = SimpleNamespace(
        counts=Counts(), slots=1, load=(0, 0), compiled={}, residents=SimpleNamespace(held=()), end=None, submit=submit,
        cancel=cancelled.append, run=lambda: None, stop=lambda: None)  # fmt: skip
    tokenizer = serving.tokenizer_of_words()
    model: Any = SimpleNamespace(tokenizer=tokenizer, net=SimpleNamespace(config=SimpleNamespace(vocab_size=300)))
    o: Any = SimpleNamespace(timeout=60.0, body=1000, base="x", report=0)
    server = endpoint.Server(o, model, None, engine)

    async def run() -> None:
        transport = httpx.ASGITransport(server.app(), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            o.timeout = 0.0
            assert (await post(client, ask("base"), 408))["error"]["message"] == "the body did not come"
            o.timeout = 60.0
            for error, status, code in ((Busy("full"), 429, "queue_full"), (Stopped("going"), 503, "stopping"),
                                        (KeyError("x"), 500, "internal")):  # fmt: skip
                busy[:] = [error]
                assert (await post(client, ask("base"), status))["error"]["code"] == code
            busy.clear()
            asked = parse(json.dumps(ask("base")).encode(), 300)
            call = endpoint.Call(engine, tokenizer, asked, [1, 2], None)
            with pytest.raises(ApiError, match="not done after 0 s: ask for fewer tokens"):
                await anext(call.pieces(0.0))
            server.ended(asked, call)
            assert cancelled == [call.request] and call.outcome == "timeout"
            assert 'requests_total{adapter="base",outcome="timeout"} 1.0' in (await client.get("/metrics")).text
            assert (await client.get("/health")).status_code == 503  # nobody started the engine

    asyncio.run(run())
    for error, status, code in (
        (Refused("rank"), 400, "adapter_refused"), (FileNotFoundError("gone"), 404, "model_not_found"),
        (RuntimeError("device"), 500, "internal"),
    ):  # fmt: skip
        found = endpoint.refusal(error)
        assert (found.status, found.body["error"]["code"]) == (status, code)


def test_the_command_line_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--adapters=.*nowhere is no folder: make one"):
        serve.main(["--base", "tiny", "--adapters", str(tmp_path / "nowhere"), "--port", "0"])
    with pytest.raises(ValueError, match="--port=99999 is none: take one up to 65535"):
        serve.main(["--base", "tiny", "--adapters", str(tmp_path), "--port", "99999"])
    with pytest.raises(ValueError, match="8 slots may need as many adapters at once, and the device holds 2"):
        serve.main(["--base", "tiny", "--adapters", str(tmp_path), "--port", "0", "--places", "2"])
