"""PEFT's adapters of parts: rows of tables, stacked experts, replicated layers, rotated inputs.

What the installed PEFT computes and saves is read here with the same logits, written again with the same tensors, and
loaded by PEFT with the same logits.
"""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_models
from safetensors.numpy import load_file

import lorajax as lj
from lorajax.io import peft
from lorajax.io.hf import open_checkpoint
from lorajax.models import adapter_names, model_from_hf, params_from_hf, replicate_layers, untied
from lorajax.variants import OFT, DoRA, LoRA, TrainableTokens

pytestmark = [
    pytest.mark.peft,
    # PEFT applies patterns to parameters, and warns that it does not; its tokens follow a tied head, and it warns too.
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Model( has|).*`tie_word_embeddings=True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'"),  # takes its own biases of B for incomplete tensors
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys.*lm_head.trainable_tokens_delta:UserWarning"),
]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 30,
         "max_position_embeddings": 12}  # fmt: skip
IDS = np.random.default_rng(0).integers(1, 30, (3, 7)).astype(np.int32)
FAMILIES: dict[str, Any] = {
    "llama": ("AutoModelForCausalLM", "llama", {"num_key_value_heads": 1}),
    "tied": ("AutoModelForCausalLM", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "apart": ("AutoModelForCausalLM", "llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),  # untied here
    "mixtral": ("AutoModelForCausalLM", "mixtral",
                {"num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2}),
    "bert": ("AutoModelForSequenceClassification", "bert",
             {"num_labels": 3, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Any:
    @functools.cache
    def folder(name: str) -> Path:
        auto, kind, more = FAMILIES[name]
        path = tmp_path_factory.mktemp(name)
        torch_models.build(auto, kind, **SIZES, **more).save_pretrained(path)
        return path

    return folder


def torch_model(base: Any, name: str) -> Any:
    import transformers

    return getattr(transformers, FAMILIES[name][0]).from_pretrained(base(name), attn_implementation="eager").eval()


def ours(base: Any, name: str, replication: Any = (), **overrides: Any) -> Any:
    """(model, params, sites, names) of a base."""
    config, tensors = open_checkpoint(base(name))
    model = model_from_hf(config, **(overrides | ({"num_labels": 3} if name == "bert" else {})))
    params, config = params_from_hf(model.config, tensors).variables, model.config  # type: ignore[attr-defined]
    if name == "apart":
        config, params = untied(config, params)
        model = type(model)(config)  # type: ignore[call-arg]
    if replication:
        config, params = replicate_layers(config, params, replication)
        model = type(model)(config)  # type: ignore[call-arg]
    sites = lj.sites(model.apply, params, IDS, jnp.ones_like(IDS))
    return model, params, sites, adapter_names(config)


def logits(model: Any, adapt: Any, trainable: Any, frozen: Any) -> np.ndarray:
    run = jax.jit(lambda tr: lj.lift(model.apply, strict=True)(adapt.bind(tr, frozen), IDS, jnp.ones_like(IDS)))
    return np.asarray(run(trainable))


def same_tensors(one: Path, other: Path, rounding: float = 0) -> None:
    mine, their = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    if "base_model.model.lm_head.trainable_tokens_delta" in their:  # the table's rows once more, for the tied head
        rows = their.pop("base_model.model.lm_head.trainable_tokens_delta")
        np.testing.assert_array_equal(rows, mine["base_model.model.model.embed_tokens.trainable_tokens_delta"])
    assert mine.keys() == their.keys()
    for key, x in their.items():
        np.testing.assert_allclose(mine[key], x, rtol=0, atol=rounding, err_msg=key)


QV = {"r": 2, "target_modules": ["q_proj", "v_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CASES: dict[str, Any] = {
    "tokens, tied head": ("tied", "LoraConfig", {**QV, "trainable_token_indices": [7, 3, 11]}),
    "tokens of table and head": ("llama", "LoraConfig",
                                 {**QV, "trainable_token_indices": {"embed_tokens": [7, 3], "lm_head": [2, 9, 4]}}),
    "tokens alone": ("tied", "TrainableTokensConfig", {"token_indices": [5, 1], "target_modules": ["embed_tokens"]}),
    "experts": ("mixtral", "LoraConfig",
                {**QV, "target_parameters": EXPERTS, "alpha_pattern": {"layers.1.mlp.experts.down_proj": 5}}),
    "experts of one kind": ("mixtral", "LoraConfig",
                            {"r": 3, "target_modules": [], "target_parameters": EXPERTS[1:], "use_rslora": True}),
    "replicated layers": ("llama", "LoraConfig", {**QV, "layer_replication": [[0, 2], [1, 2], [0, 1]]}),
    "table apart from its head": ("apart", "LoraConfig", {"r": 2, "target_modules": ["q_proj", "embed_tokens"]}),
    "head apart from its table": ("apart", "LoraConfig", {"r": 2, "target_modules": ["q_proj", "lm_head"]}),
    "table trained, head not": ("apart", "LoraConfig", {**QV, "modules_to_save": ["embed_tokens"]}),
    "biases of B": ("bert", "LoraConfig", {"r": 2, "target_modules": ["query", "dense"], "lora_bias": True}),
    "all biases, and a module saved": ("bert", "LoraConfig", {"r": 2, "target_modules": ["query"], "bias": "all",
                                                              "modules_to_save": ["classifier"]}),
    "scales of layers with biases": ("bert", "IA3Config", {"target_modules": ["key", "output.dense"],
                                                           "feedforward_modules": ["output.dense"]}),
    "one rank whatever the pattern": ("llama", "HiraConfig", {"r": 3, "target_modules": ["q_proj", "v_proj"],
                                                              "rank_pattern": {"v_proj": 2}}),
    "rotations": ("bert", "OFTConfig", {"oft_block_size": 6, "target_modules": ["query", "output.dense"],
                                        "use_cayley_neumann": False, "bias": "oft_only"}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`:UserWarning")  # 6 of 16 inputs: PEFT takes 4
@pytest.mark.parametrize("name", CASES)
def test_peft_and_back(base: Any, name: str, tmp_path: Path) -> None:
    import peft as torch_peft
    import torch

    family, kind, settings = CASES[name]
    theirs = torch_peft.get_peft_model(torch_model(base, family), getattr(torch_peft, kind)(**settings)).eval()
    before = torch_models.run(torch_model(base, family), input_ids=IDS, attention_mask=np.ones_like(IDS))
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape))
    want = torch_models.run(theirs, input_ids=IDS, attention_mask=np.ones_like(IDS))
    theirs.save_pretrained(tmp_path / "theirs")
    assert np.abs(want - before).max() > 1e-2

    replication = settings.get("layer_replication", ())
    model, params, sites, names = ours(base, family, replication)
    found = peft.read(tmp_path / "theirs", sites, names, replication)
    adapt = lj.adapt(sites, found.rules)
    trainable, frozen = peft.fill(found, *adapt.init(jax.random.key(0), params))
    np.testing.assert_allclose(logits(model, adapt, trainable, frozen), want, rtol=1e-4, atol=2e-5)

    peft.write(tmp_path / "ours", adapt, trainable, frozen, names, replication=replication, params=params,
               lora_bias=settings.get("lora_bias", False))
    same_tensors(tmp_path / "ours", tmp_path / "theirs", 1e-6 if "lora_bias" in settings else 0)
    again = torch_peft.PeftModel.from_pretrained(torch_model(base, family), tmp_path / "ours").eval()
    have = torch_models.run(again, input_ids=IDS, attention_mask=np.ones_like(IDS))
    np.testing.assert_allclose(have, want, rtol=1e-5, atol=1e-6)


def test_a_table_that_is_the_head_is_not_read_as_one_of_them(base: Any, tmp_path: Path) -> None:
    """PEFT adapts the table and leaves the head, or the other way round; a tied model here would change both."""
    for rule in ((".*embed/embedding", LoRA(2)), (".*embed/embedding", lj.Full()), (".*head/kernel", LoRA(2))):
        _, params, sites, names = ours(base, "apart")
        adapt = lj.adapt(sites, [rule, (".*/query/kernel", LoRA(2))])
        peft.write(tmp_path / "a", adapt, *adapt.init(jax.random.key(0), params), names)
        _, params, sites, names = ours(base, "tied")
        with pytest.raises(peft.AdapterError, match="table and its head, .* lorajax.models.untied"):
            peft.read(tmp_path / "a", sites, names)
    adapt = lj.adapt(sites, [(".*embed/embedding", LoRA(2))])
    with pytest.raises(peft.AdapterError, match="the rules adapt .*untied.*or keep lorajax's own format"):
        peft.write(tmp_path / "a", adapt, *adapt.init(jax.random.key(0), params), names)
    with pytest.raises(ValueError, match="BertConfig is not tied"):
        untied(ours(base, "bert")[0].config, {})


@pytest.mark.parametrize("scan", [False, True])
def test_experts_trained_apart_are_written_side_by_side(base: Any, scan: bool, tmp_path: Path) -> None:
    """Gate and up have other ranks, scales and values here, and are one parameter there: exact, at the sum of ranks."""
    import peft as torch_peft

    model, params, sites, names = ours(base, "mixtral", scan_layers=scan)
    adapt = lj.adapt(sites, [(".*/gate/kernel", LoRA(2, 3.0)), (".*/up/kernel", LoRA(1)), (".*/query/kernel", LoRA(2))])
    trainable, frozen = adapt.init(jax.random.key(0), params)
    rng = np.random.default_rng(1)
    trainable = jax.tree.map(lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), trainable)
    peft.write(tmp_path / "ours", adapt, trainable, frozen, names)
    theirs = torch_peft.PeftModel.from_pretrained(torch_model(base, "mixtral"), tmp_path / "ours").eval()
    have = torch_models.run(theirs, input_ids=IDS, attention_mask=np.ones_like(IDS))
    np.testing.assert_allclose(have, logits(model, adapt, trainable, frozen), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"share": True}, {"terms": 0}, {"eps": 0.2}, {"terms": 3}, {"terms": 7}],
                         ids=str)  # fmt: skip
def test_rotations_are_pefts(options: dict[str, Any]) -> None:
    import torch
    from peft.tuners.oft.layer import OFTRotationModule

    variant = OFT(block_size=4, **options)
    w = np.random.default_rng(0).normal(size=(12, 8)).astype(np.float32)
    q = 0.2 * np.random.default_rng(1).normal(size=variant.init(jax.random.key(0), w)[0].Q.shape).astype(np.float32)
    theirs = OFTRotationModule(
        q.shape[0], q.shape[1], 4, 12, coft=variant.eps > 0, eps=variant.eps, block_share=variant.share,
        use_cayley_neumann=variant.terms > 0, num_cayley_neumann_terms=variant.terms,
    )  # fmt: skip
    with torch.no_grad():
        theirs.weight.copy_(torch.tensor(q))
        want = theirs(torch.eye(12)).numpy() @ w  # rows x of the identity, rotated
    adapter = variant.init(jax.random.key(0), w)[0]._replace(Q=jnp.asarray(q))
    np.testing.assert_allclose(w + variant.delta(adapter, jnp.asarray(w)), want, atol=1e-5)


def test_what_cannot_be_exchanged_says_so(base: Any, tmp_path: Path) -> None:
    def write(name: str, rules: Any, **more: Any) -> Any:
        _, params, sites, names = ours(base, name)
        adapt = lj.adapt(sites, rules)
        trainable, frozen = adapt.init(jax.random.key(0), params)
        trainable = jax.tree.map(lambda x: x + 0.5, trainable)
        peft.write(tmp_path / "a", adapt, trainable, frozen, names, **more)
        return sites, names

    table, head = ".*embed/embedding", ".*head/kernel"
    for name, rules, words in (
        ("mixtral", [(".*/down/kernel", DoRA(LoRA(2)))], "stacks experts, for which PEFT has plain LoRA only"),
        ("llama", [(table, TrainableTokens((1,))), (".*/query/kernel", OFT(4))], "trained tokens.*not beside OFT"),
        ("llama", [(table, TrainableTokens((1,))), (head, TrainableTokens((2,)))], "differ in .'token_indices'."),
        ("llama", [(table, TrainableTokens((1,))), (head, lj.Full())], "train no whole weights beside them"),
    ):  # fmt: skip
        with pytest.raises(peft.AdapterError, match=words):
            write(name, rules)
    assert not list(tmp_path.iterdir())
    sites, names = write("llama", [(".*/query/kernel", LoRA(2))], replication=[[0, 2]])
    with pytest.raises(peft.AdapterError, match=r"layer_replication=\[\[0, 2\]\].*replicate_layers"):
        peft.read(tmp_path / "a", sites, names)
    with pytest.raises(ValueError, match=r"ranges \[\[1, 3\]\] of a model with 2 layers"):
        ours(base, "llama", [[1, 3]])
