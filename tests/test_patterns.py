"""Patterns from files: the same truth as Python's `re`, in a bounded number of steps."""

import itertools
import re

import numpy as np
import pytest

from lorajax.io.patterns import match_ends, matches
from lorajax.io.peft_config import Config
from lorajax.io.tensors import AdapterError

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.11.mlp.down_proj", "lm_head", "h.1.attn.c_attn", "a", "", "aab",
    "model.vision_tower.encoder.layers.3.self_attn.v_proj", "encoder.block.0.layer.1.DenseReluDense.wi_0",
]  # fmt: skip
PATTERNS = [
    r"(?:.*\.(q_proj|v_proj))\Z", r"(.*\.)?(q_proj|layers\.[0-3]\..*)$", r"^(?!.*(vision|lm_head)).*_proj$", r"(a+)+b",
    r"(?=.*attn).*proj", r"model\.layers\.(?P<n>[\d]{1,2})\.(?:mlp|self_attn)\.\w+", r"(^|.*\.)lm_head($|\..*)",
    r".*?\.[^.]*\.(\d+)\.", r"(a|a)*b", r"(a*)*", r"a{2}b", r"a{,1}", r"a{1,}b?", r"\bmodel\b.*", r"[^]a]+", r"", r"|a",
    r"(?:.*?(?:language|vision).*?(?:self_attn|mlp).*?(?:q_proj|v_proj)).*?", r".*\.wi_[01]", r"(a?){30}b", r"(\b|a)*b",
    r"(a|ab)(c|bcd)*", r"x*$", r"\Amodel", r".*\BReluD.*", r"[\w.]+\Z", r"()+a", r"((a)?|b)*",
]  # fmt: skip


@pytest.mark.parametrize("regex", PATTERNS)
def test_truth_and_ends_are_those_of_re(regex):
    for name in NAMES:
        ends = match_ends(regex, name)
        assert bool(ends) == matches(regex, name) == (re.match(regex, name) is not None), name
        # an end is where the pattern, told to end there, matches; anchors and lookahead see the whole name
        want = {end for end in range(len(name) + 1) if re.match(rf"(?:{regex})(?<=(?s:^.{{{end}}}))", name)}
        assert ends == want, name


def test_random_patterns():
    """Over the letters a and b, against `re` on all short texts."""
    rng = np.random.default_rng(0)

    def make(depth):
        kind = rng.integers(0, 7) if depth else 0
        if kind < 2:
            return str(rng.choice(["a", "b", ".", "[ab]", "a?", "b*", "^", "$"]))
        if kind == 2:
            return f"(?:{make(depth - 1)}|{make(depth - 1)})"
        if kind == 3:
            return f"(?:{make(depth - 1)}){rng.choice(['*', '+', '?', '{1,2}', '{2}', '*?'])}"
        if kind == 4:
            return f"({rng.choice(['?=', '?!'])}{make(depth - 1)})"
        return make(depth - 1) + make(depth - 1)

    texts = ["".join(text) for n in range(5) for text in itertools.product("ab", repeat=n)]
    patterns = [make(3) for _ in range(300)]
    assert len(set(patterns)) > 150
    for regex in patterns:
        for text in texts:
            assert bool(match_ends(regex, text)) == bool(re.match(regex, text)), (regex, text)


EVIL = [
    r"(a+)+\Z", r"(a|a)*\Z", r"(a|aa)+\Z", r"(a*)*(a*)*(a*)*\Z", r"(a?){99}a{99}\Z", r"(((((a*)*)*)*)*)*b",
    r".*.*.*.*.*.*.*.*.*b", r"(a{1000000000}){2,1000000000}", "(a|a)" * 60 + "b", "a?" * 60 + "b",
]  # fmt: skip


@pytest.mark.parametrize("regex", EVIL)
def test_what_python_would_not_finish(regex):
    assert not match_ends(regex, "a" * 60 + "!") and not matches(regex, "a" * 60 + "!")


def test_what_is_refused():
    with pytest.raises(AdapterError, match="takes more than 20000 steps on 'aaa.*name the modules in a list"):
        match_ends("a*" * 3000 + "b", "a" * 60)
    for regex, words in [("(a", "no regular expression"), ("a" + "(" * 5000 + ")" * 5000, "no regular expression"),
                         (r"(a)\1", "at character 3, which is not read"), ("(?i)a", "at character 0"),
                         ("(?<=a)b", "at character 0"), ("(?i:a)", "at character 0"), ("a{99999999999}", "no reg")]:
        with pytest.raises(AdapterError, match=words):
            match_ends(regex, "aa")


def test_a_config_is_read_by_them():
    config = Config({"target_modules": r"(a+)+\.q", "rank_pattern": {r"(a|a)*b": 4}, "layers_to_transform": [3],
                     "layers_pattern": "(h+)+"}, "adapter_config.json")  # fmt: skip
    name = "a" * 60 + ".k"
    assert config.targeted([name, "aa.q"]) == {"aa.q"}
    assert config.by_module("r", 8, "rank_pattern", name) == 8 and config.by_module("r", 8, "rank_pattern", "aab") == 4
    config.settings["target_modules"] = ["q"]
    assert config.targeted(["x.hh.3.q", "x.hh.4.q", f"x.{'h' * 60}.q"]) == {"x.hh.3.q"}
