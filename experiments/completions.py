# OpenAI's completions: what a request may say, and how answers and errors look. Knows no HTTP and no model.

import difflib
import json
import secrets
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# What is accepted with null or the one value that changes nothing; anything else is refused.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,), "best_of": (1,), "echo": (False,), "logprobs": (None,), "suffix": ("",), "logit_bias": ({},),
    "presence_penalty": (0,), "frequency_penalty": (0,),
}  # fmt: skip
READ = ("model", "prompt", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "user")


class ApiError(Exception):
    # An answer that is an error. param: the field of the request that is wrong.
    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None,
                 kind: str = "invalid_request_error"):
        super().__init__(message)
        self.status, self.body = status, {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Asked(NamedTuple):
    # A request that was read. prompt: text or token ids. seed: drawn where none was given.
    model: str
    prompt: str | list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int
    stop: list[str]
    stream: bool
    usage: bool


def parse(body: bytes, vocabulary: int) -> Asked:
    # ApiError, naming the field, for anything that this server would otherwise ignore or misread.
    try:
        given = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}", "invalid_json") from None
    if not isinstance(given, dict):
        raise ApiError(400, f"the body is a JSON {type(given).__name__}: send an object", "invalid_json")
    for name, value in given.items():
        if name in NEUTRAL:
            good = any(value == x and isinstance(value, bool) == isinstance(x, bool) for x in NEUTRAL[name])
            if value is not None and not good:
                raise ApiError(400, f"{name}={value!r} is not supported: leave it out, or give {NEUTRAL[name][0]!r}",
                               "unsupported_parameter", name)
        elif name not in READ:
            near = difflib.get_close_matches(name, (*READ, *NEUTRAL), n=1)
            raise ApiError(400, f"unknown parameter {name!r}" + (f": did you mean {near[0]!r}?" if near else ""),
                           "unknown_parameter", name)

    def read(name: str, default: Any, good: Any, what: str) -> Any:
        value = given.get(name)
        if value is None:
            value = default
        if value is None or not good(value):
            shown = "it is missing" if value is None else f"got {json.dumps(value)[:80]}"
            raise ApiError(400, f"{name} has to be {what}: {shown}", "invalid_value", name)
        return value

    def whole(x: Any, low: int, high: int) -> bool:
        return type(x) is int and low <= x < high

    def number(x: Any, low: float, high: float) -> bool:
        return type(x) in (int, float) and low <= x <= high

    def text(x: Any) -> bool:
        return type(x) is str and bool(x) and not any("\ud800" <= c <= "\udfff" for c in x)  # half a character

    def prompt(x: Any) -> bool:
        return text(x) or (type(x) is list and bool(x) and all(whole(i, 0, vocabulary) for i in x))

    stop = read("stop", [], lambda x: text(x) or (type(x) is list and len(x) <= 4 and all(map(text, x))),
                "a text, or at most four")
    options = read("stream_options", {}, lambda x: type(x) is dict and not set(x) - {"include_usage"},
                   "an object with include_usage")
    return Asked(
        read("model", None, text, "the name of an adapter, or 'base'"),
        read("prompt", None, prompt, f"one text, or the ids of one, each below {vocabulary}, and not empty"),
        read("max_tokens", 16, lambda x: whole(x, 1, 2**31), "a whole number of at least 1"),
        float(read("temperature", 1.0, lambda x: number(x, 0, 2), "a number from 0 to 2")),
        float(read("top_p", 1.0, lambda x: number(x, 0, 1) and x > 0, "a number above 0, up to 1")),
        read("seed", secrets.randbits(32), lambda x: whole(x, 0, 2**32), f"a whole number from 0 to {2**32 - 1}"),
        [stop] if isinstance(stop, str) else stop,
        read("stream", False, lambda x: type(x) is bool, "true or false"),
        bool(options.get("include_usage")),
    )


@dataclass
class Answer:
    # Whole answers and chunks of one completion.
    model: str
    prompt_tokens: int
    completion_tokens: int = 0
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def body(self, text: str, reason: str | None) -> dict[str, Any]:
        choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": reason}
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.model,
                "choices": [choice]}

    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens,
                "total_tokens": self.prompt_tokens + self.completion_tokens}


def event(body: Any) -> bytes:
    # One server-sent event.
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"
