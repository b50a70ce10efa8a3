# The HTTP side of experiments.serve: an ASGI application in front of an engine, in OpenAI's shapes.

import argparse
import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import replace
from functools import partial
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from experiments.completions import Answer, ApiError, Asked, event, parse
from lorajax import language
from lorajax.io.tensors import AdapterError
from lorajax.serve.engine import Busy, Engine, Request, Stopped
from lorajax.serve.residents import Refused
from lorajax.serve.shelf import Found, Shelf
from lorajax.serve.text import Text

BASE = "base"
BODY_SECONDS = 30.0  # to send a request


class Metrics:
    # What /metrics shows: counters by adapter, and the engine's own numbers at the moment.
    def __init__(self, engine: Engine):
        self.engine, self.registry = engine, CollectorRegistry()
        named: dict[str, Any] = {"registry": self.registry, "namespace": "lorajax"}
        self.requests = Counter("requests", "Completions that ended, and how", ["adapter", "outcome"], **named)
        self.refused = Counter("refused", "Requests answered by an error, by its status", ["status"], **named)
        self.prompt = Counter("prompt_tokens", "Tokens of prompts", ["adapter"], **named)
        self.tokens = Counter("completion_tokens", "Tokens written", ["adapter"], **named)
        self.seconds = Histogram("request_seconds", "From the request to its end", ["adapter"], **named)
        self.first = Histogram("first_token_seconds", "From the request to its first token", ["adapter"], **named)

        def gauge(name: str, about: str, value: Any, *labels: str) -> None:
            made = Gauge(name, about, labels[:1], **named)
            (made.labels(labels[1]) if labels else made).set_function(value)

        counts = engine.counts
        gauge("running", "Slots in use", lambda: engine.load[0])
        gauge("waiting", "Requests in the queue", lambda: engine.load[1])
        gauge("slots", "Slots", lambda: engine.slots)
        gauge("adapters_on_device", "Adapters on the device", lambda: len(engine.residents.held))
        gauge("decode_steps", "Decoding steps", lambda: counts.steps)
        gauge("decode_rows", "Slots in use, summed over decoding steps", lambda: counts.rows)
        gauge("busy_seconds", "Seconds with something to do", lambda: counts.seconds)
        compiled = Gauge("compiled_programs", "Programs compiled", ["program"], **named)
        for name in engine.compiled:
            compiled.labels(name).set_function(partial(self.programs, name))

    def programs(self, name: str) -> int:
        return self.engine.compiled[name]


class Call:
    # One completion on its way: the engine's thread writes into a queue of the event loop.
    def __init__(self, engine: Engine, tokenizer: Any, asked: Asked, ids: list[int], adapter: Found | None):
        self.engine, self.loop, self.queue = engine, asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.text, self.tokens, self.outcome = Text(tokenizer, ids, asked.stop), 0, "cancelled"
        self.began, self.first = time.monotonic(), 0.0
        self.request = Request(ids, adapter, asked.max_tokens, self.emit, self.post, temperature=asked.temperature,
                               top_p=asked.top_p, seed=asked.seed)

    def emit(self, token: int) -> bool:
        self.tokens += 1
        self.first = self.first or time.monotonic()
        piece = "" if token == self.engine.end else self.text.push(token)
        if piece:
            self.post(("text", piece))
        return self.text.stopped

    def post(self, item: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.loop.call_soon_threadsafe(self.queue.put_nowait, item)

    async def pieces(self, timeout: float) -> AsyncIterator[str]:
        # The text as it comes; afterwards `outcome` is why it ended. ApiError for one that could not run.
        while True:
            try:
                item = await asyncio.wait_for(self.queue.get(), self.began + timeout - time.monotonic())
            except TimeoutError:
                self.outcome = "timeout"
                raise ApiError(504, f"not done after {timeout:g} s: ask for fewer tokens, or when fewer requests wait",
                               "timeout", kind="timeout_error") from None
            if isinstance(item, tuple):
                yield item[1]
            elif isinstance(item, Exception):
                self.outcome = "error"
                raise refusal(item) from item
            else:
                if rest := self.text.rest():
                    yield rest
                self.outcome = item
                return


def refusal(error: Exception) -> ApiError:
    # What a client is told of an error between its request and its first token.
    if isinstance(error, Busy):
        return ApiError(429, str(error), "queue_full", kind="rate_limit_error")
    if isinstance(error, Stopped):
        return ApiError(503, str(error), "stopping", kind="server_error")
    if isinstance(error, FileNotFoundError):
        return ApiError(404, f"{error}", "model_not_found", "model")
    if isinstance(error, ValueError):  # the file's mistake, or one that cannot share the program (Refused)
        code = "adapter_refused" if isinstance(error, Refused) else "adapter_unreadable"
        return ApiError(400, f"this adapter cannot be served: {error}", code, "model")
    return ApiError(500, f"{type(error).__name__} while the model ran", "internal", kind="server_error")


class Server:
    # The handlers.
    def __init__(self, o: argparse.Namespace, model: language.Model, shelf: Shelf, engine: Engine):
        self.o, self.model, self.shelf, self.engine, self.metrics = o, model, shelf, engine, Metrics(engine)
        self.thread = threading.Thread(target=engine.run, name="engine")
        self.created = int(time.time())

    @contextlib.asynccontextmanager
    async def life(self, app: Starlette) -> AsyncIterator[None]:
        self.thread.start()
        reports = asyncio.create_task(self.report())
        yield
        reports.cancel()
        self.engine.stop()
        await asyncio.to_thread(self.thread.join)

    async def report(self) -> None:
        while self.o.report:
            before = replace(self.engine.counts)
            await asyncio.sleep(self.o.report)
            done, (running, waiting) = self.engine.counts.since(before), self.engine.load
            if done.tokens:
                print(f"{done.line(self.engine.slots)}; {running} running, {waiting} waiting", flush=True)

    def app(self) -> Starlette:
        routes = [Route("/v1/completions", self.completions, methods=["POST"]), Route("/v1/models", self.models),
                  Route("/metrics", self.show), Route("/health", self.health)]  # fmt: skip
        handlers: dict[Any, Any] = {ApiError: self.failed, HTTPException: self.failed, Exception: self.failed}
        return Starlette(routes=routes, exception_handlers=handlers, lifespan=self.life)

    async def failed(self, request: HttpRequest, error: Exception) -> Response:
        if isinstance(error, HTTPException):
            there = "there are POST /v1/completions and GET /v1/models, /metrics, /health"
            error = ApiError(error.status_code, f"{request.method} {request.url.path}: {error.detail}; {there}")
        if not isinstance(error, ApiError):
            error = ApiError(500, "a mistake of this server", "internal", kind="server_error")
        self.metrics.refused.labels(str(error.status)).inc()
        return JSONResponse(error.body, error.status, {"Retry-After": "1"} if error.status == 429 else None)

    async def health(self, request: HttpRequest) -> Response:
        return JSONResponse({"status": "ok"}) if self.thread.is_alive() else JSONResponse({"status": "stopped"}, 503)

    async def show(self, request: HttpRequest) -> Response:
        return Response(generate_latest(self.metrics.registry), media_type="text/plain; version=0.0.4")

    async def models(self, request: HttpRequest) -> Response:
        found = await asyncio.to_thread(self.shelf.list)
        rows = [(BASE, self.created, None)] + [(x.name, self.created, BASE) for x in found if x.name != BASE]
        data = [{"id": name, "object": "model", "created": at, "owned_by": "lorajax", "parent": parent,
                 "root": self.o.base} for name, at, parent in rows]  # fmt: skip
        return JSONResponse({"object": "list", "data": data})

    async def body(self, request: HttpRequest) -> bytes:
        parts, size = [], 0
        async for part in request.stream():
            size += len(part)
            if size > self.o.body:
                raise ApiError(413, f"the body has more than {self.o.body} bytes", "body_too_large")
            parts.append(part)
        return b"".join(parts)

    async def begin(self, request: HttpRequest) -> tuple[Asked, Call]:
        # A request that is in the engine's queue.
        try:
            body = await asyncio.wait_for(self.body(request), min(self.o.timeout, BODY_SECONDS))
        except TimeoutError:
            raise ApiError(408, "the body did not come", "timeout", kind="timeout_error") from None
        except ClientDisconnect:
            raise ApiError(499, "the client has gone", "cancelled") from None
        asked = parse(body, self.model.net.config.vocab_size)
        adapter, ids = None, asked.prompt
        if asked.model != BASE:
            try:
                adapter = await asyncio.to_thread(self.shelf.find, asked.model)
            except AdapterError as error:
                raise refusal(error) from None
            except ValueError as error:
                raise ApiError(404, f"{error}; and '{BASE}'", "model_not_found", "model") from None
        if isinstance(ids, str):
            ids = (await asyncio.to_thread(self.model.tokenizer.encode, ids)).ids
        call = Call(self.engine, self.model.tokenizer, asked, ids, adapter)
        try:
            self.engine.submit(call.request)
        except ValueError as error:
            raise ApiError(400, str(error), "context_length_exceeded", "prompt") from None
        except (Busy, Stopped) as error:
            raise refusal(error) from None
        return asked, call

    def ended(self, asked: Asked, call: Call) -> None:
        # However it ended: its slot is free, and it is counted.
        self.engine.cancel(call.request)
        name, now, m = asked.model, time.monotonic(), self.metrics
        m.requests.labels(name, call.outcome).inc()
        m.prompt.labels(name).inc(len(call.request.prompt))
        m.tokens.labels(name).inc(call.tokens)
        m.seconds.labels(name).observe(now - call.began)
        if call.first:
            m.first.labels(name).observe(call.first - call.began)

    async def completions(self, request: HttpRequest) -> Response:
        asked, call = await self.begin(request)
        answer, pieces = Answer(asked.model, len(call.request.prompt)), call.pieces(self.o.timeout)
        begun = False
        try:
            if asked.stream:  # what keeps it from running is still an answer of its own
                first = await unless_gone(request, anext(pieces, ""))
                begun = True
                return Events(self, asked, call, answer, first, pieces)
            text = "".join(await unless_gone(request, gathered(pieces)))
            answer.completion_tokens = call.tokens
            return JSONResponse({**answer.body(text, call.outcome), "usage": answer.usage()})
        finally:
            if not begun:
                self.ended(asked, call)


class Events(StreamingResponse):
    # A stream whose slot is given back however it ends, also before its first byte.
    def __init__(self, server: Server, asked: Asked, call: Call, answer: Answer, first: str, pieces: Any):
        super().__init__(self.events(asked, call, answer, first, pieces), media_type="text/event-stream",
                         headers={"Cache-Control": "no-cache"})
        self.end = lambda: server.ended(asked, call)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.end()

    async def events(self, asked: Asked, call: Call, answer: Answer, first: str, pieces: Any) -> AsyncIterator[bytes]:
        try:
            if first:
                yield event(answer.body(first, None))
            async for piece in pieces:
                yield event(answer.body(piece, None))
        except ApiError as error:
            yield event(error.body)
            return
        yield event(answer.body("", call.outcome))
        answer.completion_tokens = call.tokens
        if asked.usage:
            yield event({**answer.body("", None), "choices": [], "usage": answer.usage()})
        yield event(b"[DONE]")


async def gathered(pieces: AsyncIterator[str]) -> list[str]:
    return [piece async for piece in pieces]


async def unless_gone(request: HttpRequest, work: Awaitable[Any]) -> Any:
    # The work's result; it is cancelled when the client hangs up.
    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise ApiError(499, "the client has gone", "cancelled")
        return tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
