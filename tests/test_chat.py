"""Chat templates against `transformers`; which tokens of a conversation are learned, against the text itself."""

import json
import os

import chats
import numpy as np
import pytest

from lorajax.data import CHATML, ChatTemplate, Marked, completion, load_chat_template, load_gsm8k, supervise
from lorajax.io.assets import cache_folder
from lorajax.io.gguf import open_gguf

TOKENIZER = chats.tokenizer()
PAIRS = [(name, talk) for name in chats.TEMPLATES for talk in chats.CONVERSATIONS]


def said(messages):
    """What the assistant says in these templates, by hand: they add nothing inside but Llama 2 a space on each side."""
    return [message["content"] for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize(("name", "talk"), PAIRS)
def test_what_is_learned_is_what_the_assistant_says(name, talk):
    source, tokens = chats.TEMPLATES[name]
    template, messages = ChatTemplate(source, tokens), chats.CONVERSATIONS[talk]
    marked = template.marked(messages)
    space = " " if name == "llama2" else ""
    want = [f"{space}{content}{space}{tokens['eos_token']}" for content in said(messages)]
    assert [marked.text[a:b] for a, b in marked.spans] == want
    assert marked.text == template.render(messages)
    rows = supervise([marked], TOKENIZER, max_length=400)
    decoded = [TOKENIZER.decode([i], skip_special_tokens=False) for i in rows.ids]
    assert TOKENIZER.decode(rows.ids.tolist(), skip_special_tokens=False) == marked.text
    assert rows.split == 0 and rows.ids.tolist() == TOKENIZER.encode(marked.text, add_special_tokens=False).ids
    learned = TOKENIZER.decode(rows.ids[rows.completion].tolist(), skip_special_tokens=False)
    assert learned == "".join(want)
    # the first turn's prompt is what generation starts from, token for token
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    prompt = TOKENIZER.encode(template.render(messages[:first], add_generation_prompt=True), add_special_tokens=False)
    start = int(np.argmax(rows.completion))
    assert rows.ids[:start].tolist() == prompt.ids, decoded


def test_chatml_by_hand():
    template = ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})
    prompt = "<|im_start|>user\nThe capital of France?<|im_end|>\n<|im_start|>assistant\n"
    assert template.render(chats.ONE[:1], add_generation_prompt=True) == prompt
    marked = template.marked(chats.ONE)
    assert marked == Marked(prompt + "It is Paris.<|im_end|>\n", ((len(prompt), len(prompt) + 22),))
    without = ChatTemplate(CHATML).marked(chats.ONE)  # no end-of-turn token is known: the turn as it is written
    assert without.spans == ((len(prompt), len(prompt) + 23),)


def test_no_token_is_on_both_sides_of_a_border():
    """'\\n' and '\\nso', ' ' and 'yes' would be one token each; then each side is encoded by itself."""
    apart = [completion("Is it? ", "yes"), completion("Is it?", " yes")]
    rows = supervise(apart, TOKENIZER, max_length=40)
    assert TOKENIZER.encode("Is it? yes").ids == rows.ids[rows.offsets[1] :].tolist()
    for row, (prompt, text) in enumerate([("Is it? ", "yes"), ("Is it?", " yes")]):
        at = slice(*rows.offsets[row : row + 2])
        assert rows.ids[at][~rows.completion[at]].tolist() == TOKENIZER.encode(prompt).ids
        assert rows.ids[at][rows.completion[at]].tolist() == TOKENIZER.encode(text).ids
    assert rows.split == 1


def test_templates_that_cannot_be_read_off():
    forgets = "{% for m in messages %}{{ m.role + ': ' + (m.content if loop.last else 'x') + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match="renders turn 1 differently .*put {% generation %}"):
        ChatTemplate(forgets + "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}").marked(chats.TWO)
    with pytest.raises(ValueError, match=r"conversation of \['user'\] has no assistant turn"):
        ChatTemplate(CHATML).marked(chats.ONE[:1])
    with pytest.raises(ValueError, match=r"refuses a conversation of \['assistant'\]: .*roles must alternate"):
        ChatTemplate(chats.LLAMA2, {"bos_token": "<s>", "eos_token": "</s>"}).render(chats.ONE[1:])
    with pytest.raises(ValueError, match="not Jinja: .*line 1"):
        ChatTemplate("{% for %}")
    with pytest.raises(ValueError, match=r"no chat template.*lorajax\.data\.CHATML"):
        ChatTemplate("")


@pytest.mark.parametrize("source", ["{{ messages.__class__.__mro__ }}", "{{ messages.append(1) }}",
                                    "{{ ''.__class__.__base__.__subclasses__() }}"])  # fmt: skip
def test_a_template_is_not_trusted(source):
    with pytest.raises(ValueError, match="refuses a conversation .*unsafe"):
        ChatTemplate(source).render(chats.ONE)


def test_folder(tmp_path):
    with pytest.raises(ValueError, match="neither chat_template.jinja nor in tokenizer_config.json.*CHATML"):
        load_chat_template(tmp_path)
    assert load_chat_template(tmp_path, default=CHATML) == ChatTemplate(CHATML, {"eos_token": "<|im_end|>"})
    config = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": "<s>", "pad_token": None}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"unk_token": "<unk>", "eos_token": "other"}))
    several = [{"name": "default", "template": chats.LLAMA2}, {"name": "rag", "template": chats.LLAMA3}]
    for given, name, source in [(chats.LLAMA2, "default", chats.LLAMA2), (several, "rag", chats.LLAMA3)]:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": given}))
        found = load_chat_template(tmp_path, name=name)
        assert found == ChatTemplate(source, {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"})
    (tmp_path / "chat_template.jinja").write_text(chats.SMOLLM2)  # the newer place wins
    assert load_chat_template(tmp_path).source == chats.SMOLLM2
    with pytest.raises(ValueError, match="no chat template 'tool_use'; it has default, rag"):
        load_chat_template(tmp_path, name="tool_use")


# --- too long, nothing to learn ---


def lengths_and_completions(**named):
    pairs = [("the capital of France", " is Paris"), ("the " * 20, "Lima"), ("yes, ", "it")]
    texts = [completion(*pair) for pair in pairs]
    return supervise(texts, TOKENIZER, max_length=12, **named)


def test_too_long_is_decided_by_the_caller():
    with pytest.raises(ValueError, match=r"1 of 3 texts have more than max_length=12 .*number 1, has .*'drop'"):
        lengths_and_completions()
    with pytest.raises(ValueError, match="1 of 3 texts, the first number 1, have no token to learn within max_"):
        lengths_and_completions(too_long="keep_start")
    dropped = lengths_and_completions(too_long="keep_start", drop=True)
    assert dropped.rows.tolist() == [0, 2] and (dropped.truncated, dropped.dropped) == (0, 1)
    end = lengths_and_completions(too_long="keep_end")
    assert end.rows.tolist() == [0, 1, 2] and (end.truncated, end.dropped) == (1, 0)
    assert end.lengths[1] == 12 and TOKENIZER.decode(end.ids[end.offsets[1] : end.offsets[2]].tolist()).endswith("Lima")
    shorter = lengths_and_completions(too_long="drop")
    assert shorter.rows.tolist() == [0, 2] and (shorter.truncated, shorter.dropped) == (0, 1)
    with pytest.raises(ValueError, match="none of 1 texts is left"):
        supervise([completion("yes", "")], TOKENIZER, max_length=12, drop=True)
    with pytest.raises(ValueError, match="too_long='cut' is none of error, drop"):
        lengths_and_completions(too_long="cut")


def test_a_first_token_cannot_be_learned():
    """Nothing precedes it."""
    with pytest.raises(ValueError, match="have no token to learn .*completions are empty"):
        supervise([completion("", "</s>")], TOKENIZER, max_length=12)


def test_batch_by_hand():
    rows = supervise([completion("Is it?", " yes")], TOKENIZER, max_length=12)
    ids = rows.ids.tolist()
    batch = rows.batch(np.array([0, 0]), np.array([True, False]), len(ids) + 2)
    assert batch["input_ids"].tolist() == [[*ids, 0, 0]] * 2
    assert batch["labels"].tolist() == [[*ids[1:], 0, 0, 0]] * 2
    prompt = len(TOKENIZER.encode("Is it?").ids)
    weight = [0.0] * (prompt - 1) + [1.0] * (len(ids) - prompt) + [0.0] * 3
    assert batch["weight"].tolist() == [weight, [0.0] * len(weight)]
    assert batch["positions"].tolist() == [[*range(len(ids)), 0, 0]] * 2
    assert batch["segments"].tolist() == [[1] * len(ids) + [0, 0]] * 2
    assert {name: x.dtype.name for name, x in batch.items()} == {
        "input_ids": "int32", "positions": "int32", "segments": "int32", "labels": "int32", "weight": "float32"
    }  # fmt: skip


def test_fingerprint_tells_rows_apart():
    base = supervise([completion("yes", " it is"), completion("of", " course")], TOKENIZER, max_length=12)
    other = supervise([completion("yes it", " is"), completion("of", " course")], TOKENIZER, max_length=12)
    assert other.ids.tolist() == base.ids.tolist()
    prints = {base.fingerprint(), other.fingerprint(), base.take(np.array([1, 0])).fingerprint()}
    assert len(prints) == 3 and base.take(np.array([0, 1])).fingerprint() == base.fingerprint()


# --- a real tokenizer ---


@pytest.mark.slow
@pytest.mark.data
def test_no_turn_of_smollm2_has_to_be_split():
    """SmolLM2's own template and tokenizer on GSM8K: what is learned is the answer with its end-of-turn token."""
    file = next(iter(cache_folder().glob("smollm2/*/model.gguf")), None)
    if file is None or not os.environ.get("LORAJAX_DATA"):
        pytest.skip("needs the cached asset smollm2 and LORAJAX_DATA")
    found = open_gguf(file)
    template = ChatTemplate(found.chat_template, found.special_tokens)
    assert template == ChatTemplate(chats.SMOLLM2, template.tokens) and template.tokens["eos_token"] == "<|im_end|>"
    pairs = load_gsm8k()["validation"]
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    rows = supervise([template.marked(messages) for messages in turns], found.tokenizer, max_length=1024)
    assert rows.split == rows.dropped == rows.truncated == 0
    for i, (_, answer) in enumerate(pairs):
        at = slice(*rows.offsets[i : i + 2])
        learned = found.tokenizer.decode(rows.ids[at][rows.completion[at]].tolist(), skip_special_tokens=False)
        assert learned == answer + "<|im_end|>"


# --- against transformers ---


@pytest.mark.peft
@pytest.mark.parametrize(("name", "talk"), PAIRS)
def test_rendering_and_ids_equal_transformers(name, talk, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed (extra: peft)")
    source, tokens = chats.TEMPLATES[name]
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, chat_template=source, **tokens)
    template, messages = ChatTemplate(source, tokens), chats.CONVERSATIONS[talk]
    for given, prompt in [(messages, False), (messages[:-1], True), (messages[:-1], False)]:
        want = theirs.apply_chat_template(given, tokenize=False, add_generation_prompt=prompt)
        assert template.render(given, add_generation_prompt=prompt) == want
    rows = supervise([template.marked(messages)], TOKENIZER, max_length=400)
    want = theirs.apply_chat_template(messages, tokenize=True, return_dict=True,
                                      return_assistant_tokens_mask=name == "tagged")  # fmt: skip
    assert rows.ids.tolist() == want["input_ids"]
    if name == "tagged":
        assert rows.completion.tolist() == [bool(x) for x in want["assistant_masks"]]
    theirs.save_pretrained(tmp_path)
    assert load_chat_template(tmp_path) == template
