"""PEFT's side of experiments.bench.speed: one row, timed in a process of its own. Needs the extra `peft`.

    python -m experiments.bench.theirs ROW [--how eager layers] [--file FILE] [--blocks 25]

How it is run: `eager`; `amp`, eager with float32 adapters under autocast, as PEFT makes them (the others have adapters
in the type of the base, which is faster); `layers`, each layer and the loss compiled; `model`, the whole model
compiled with its loss; `graphs`, that again, its step (optimizer included) captured as a CUDA graph; `limit` is no
PEFT, but the products and the attention of a step alone. A line of JSON for each, as soon as it is measured.
"""

import gc
import resource
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
import transformers
from safetensors.torch import load_file

from experiments.bench import work as shared
from experiments.bench.limit import limit
from experiments.bench.work import ALPHA, RATE, ROWS, Work

CHUNK = 1 << 24


def build(work: Work, how: str, device: str, file: Path | None = None) -> Any:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    settings = dict(work.config)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    auto = "AutoModelForCausalLM" if work.decoder else "AutoModelForSequenceClassification"
    with torch.device(device):
        model = getattr(transformers, auto).from_config(config, dtype=dtype, attn_implementation="sdpa")
    fill(model, load_file(file) if file else {})
    if work.method != "full":
        qv = ["q_proj", "v_proj"] if work.decoder else ["query", "value"]
        wanted = peft.LoraConfig(
            r=work.rank, lora_alpha=ALPHA, target_modules=qv if work.targets == "qv" else "all-linear",
            use_dora=work.method == "dora", task_type="CAUSAL_LM" if work.decoder else "SEQ_CLS",
        )  # fmt: skip
        model = peft.get_peft_model(model, wanted, autocast_adapter_dtype=how == "amp")
        fill(model, {}, only="lora_")
    model.train()
    if work.remat:
        names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")  # the newer first
        enable = next(getattr(model, name) for name in names if hasattr(model, name))
        enable({"use_reentrant": False})
    return model


@torch.no_grad()
def fill(model: Any, real: dict[str, Any], only: str = "") -> None:
    for name, p in model.named_parameters():
        if only not in name or "magnitude" in name:
            continue
        name = name.removeprefix("base_model.model.").replace(".default", "")
        if (x := real.get(name.removeprefix("bert."))) is not None:
            p.copy_(x)
            continue
        if shared.kind(name, p.ndim) == "ones":
            p.fill_(1)
            continue
        flat, number = p.view(-1), shared.seed(name)
        for first in range(0, p.numel(), CHUNK):
            index = torch.arange(first, min(first + CHUNK, p.numel()), device=p.device)
            # Adapters start from the values that the base's type has, whatever their own.
            drawn = shared.drawn(index, number, torch.Tensor.float).to(torch.bfloat16 if p.is_cuda else p.dtype)
            flat[first : first + CHUNK] = drawn.to(p.dtype)


class Prepared(NamedTuple):
    """step: -> its loss. first: seconds of the first forward and backward pass, which compile. start: the first losses
    and the norm of the first gradient."""

    step: Callable[[], Any]
    wait: Callable[[Any], Any]
    first: float
    start: dict[str, Any]


def prepare(work: Work, how: str, device: str, file: Path | None = None) -> Prepared:
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = 64  # as many layers may differ
    model = build(work, how, device, file)
    batch = {name: torch.tensor(x, device=device).long() for name, x in work.batch().items()}
    labels = batch["input_ids"] if work.decoder else batch["label"]
    more = {"use_cache": False} if work.decoder else {}
    if how == "layers":
        inner = model if work.method == "full" else model.base_model.model
        for layer in inner.model.layers if work.decoder else inner.bert.encoder.layer:
            layer.compile(dynamic=False)
        if work.decoder:
            inner.loss_function = torch.compile(inner.loss_function, dynamic=False)
    elif how == "model":
        model.compile(dynamic=False)

    def forward() -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=how == "amp"):
            return model(input_ids=batch["input_ids"], labels=labels, **more).loss

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01, fused=True, capturable=device == "cuda")

    def step() -> Any:
        loss = forward()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(_: Any) -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    forward().backward()
    wait(None)
    first = time.perf_counter() - began
    norm = torch.linalg.vector_norm(torch.stack([p.grad.float().norm() for p in trained])).item()
    optimizer.zero_grad(set_to_none=True)
    start = {"losses": [step().item() for _ in range(3)], "grad_norm": norm, "trained": sum(p.numel() for p in trained)}
    return Prepared(step, wait, first, start)


def measure(prepared: Prepared, how: str, blocks: int) -> dict[str, Any]:
    call = captured(prepared.step) if how == "graphs" else prepared.step
    found = shared.timed(call, prepared.wait, blocks)
    on_gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_initialized() else 0  # a step on the CPU: nothing
    peak = on_gpu or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {**found, "compile s": prepared.first - found["ms"] / 1e3, "peak GiB": peak / 2**30, **prepared.start}


def captured(step: Callable[[], Any]) -> Callable[[], Any]:
    """The step as a CUDA graph, on inputs that stay where they are."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def main(argv: list[str] | None = None) -> None:
    o = shared.options(__doc__, argv)
    work = ROWS[o.row]
    device = "cuda" if work.device == "cuda" else "cpu"
    if device == "cpu":
        torch.set_num_threads(min(2, torch.get_num_threads()))  # OMP_NUM_THREADS=1 on a busy machine
    where = {name: globals()[name].__version__ for name in ("torch", "peft", "transformers")}
    where |= {"gpu": torch.cuda.get_device_name()} if device == "cuda" else {"threads": torch.get_num_threads()}
    hows = work.theirs if o.how is None else o.how
    kept: dict[str, Prepared] = {}  # a captured step is that of the compiled model
    for how in hows:
        begun = time.perf_counter()
        try:
            if how == "limit":
                found = limit(work, device, o.blocks)
            else:
                key = "model" if how == "graphs" else how
                if key not in kept:
                    kept.clear()
                    gc.collect()
                    if device == "cuda":
                        torch.cuda.empty_cache()
                    kept[key] = prepare(work, key, device, work.checkpoint(o.weights))
                found = measure(kept[key], how, o.blocks)
        except Exception as error:  # one way may not work on this machine: the others count
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        shared.tell(o, {"side": "PEFT", "how": how, **found, "seconds": time.perf_counter() - begun, "setting": where})


if __name__ == "__main__":
    main()
