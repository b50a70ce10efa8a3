# The texts that a language model writes: prompts in batches, decoded under jit, to strings.

from functools import partial
from typing import Any

import jax
import numpy as np

import lorajax as lj
from lorajax import data, language
from lorajax.data.prompts import Prompts
from lorajax.models.generation import beam_search, generate


def make_writer(c: Any, model: language.Model) -> Any:
    # (params, bound or plain; batch of prompts) -> new tokens (B, max_new).
    decode = lj.lift(partial(model.net.apply, method="decode"))
    ends = {"max_new": c.max_new, "eos_id": model.end_id, "pad_id": model.end_id}

    def write(params: Any, batch: Any) -> jax.Array:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        step = partial(decode, params)
        cache = model.net.empty_cache(ids.shape[0], ids.shape[1] + c.max_new)
        # Of a prompt only the last token's logits are wanted.
        if ids.shape[1] > 1:
            _, cache = step(ids[:, :-1], cache, attention_mask=mask[:, :-1])
        logits, cache = step(ids[:, -1:], cache, attention_mask=mask[:, -1:])
        if c.beams == 1:
            return generate(step, cache, logits[:, -1], **ends)
        return beam_search(step, cache, logits[:, -1], **ends, beams=c.beams, length_penalty=c.length_penalty,
                           no_repeat_ngram=c.no_repeat_ngram)[0]  # fmt: skip

    return write


def written(write: Any, c: Any, model: language.Model, prompts: Prompts) -> list[str]:
    # The text behind every prompt, up to its end token. write: batch -> tokens.
    texts = [""] * len(prompts.lengths)
    for batch in data.Batches(prompts, c.generate_batch, shuffle=False, shapes=c.shapes).epoch():
        row = batch.pop("row")
        for i, ids in zip(row, np.asarray(write(model.place.batch(batch))), strict=True):
            ends = np.flatnonzero(ids == model.end_id)
            if i >= 0:
                texts[i] = model.tokenizer.decode(ids[: ends[0] if len(ends) else None].tolist()).strip()
    return texts


def table(model: language.Model, prompts: Prompts, texts: list[str], references: Any) -> list[dict[str, Any]]:
    # What texts.json shows.
    rows = [prompts.ids[a:b].tolist() for a, b in zip(prompts.offsets, prompts.offsets[1:], strict=False)]
    starts = [model.tokenizer.decode(row, skip_special_tokens=False) for row in rows]
    return [{"prompt": prompt, "text": text, "references": wanted} for prompt, text, wanted in
            zip(starts, texts, references, strict=True)]  # fmt: skip
