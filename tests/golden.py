"""A case of tests/goldens, made with PEFT, as our model, parameters and batch; and what every variant is checked for.

    def test_dora() -> None:
        case = golden.load("dora_llama")
        case.check(DoRA(LoRA(rank=4, alpha=8)))

`check` reads the adapter by the names in the variant's leaf table (`Leaf.peft`) and compares logits, loss, gradients,
five AdamW steps and merged weights. Where names or shapes need more than that, pass `read`; see `Case.adapters`.
"""

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from safetensors.numpy import load_file

import lorajax as lj
from lorajax.models import hf_modules, model_from_hf, params_from_hf
from lorajax.models.checkpoint import layout, to_ours

ROOT = Path(os.environ.get("LORAJAX_GOLDENS") or Path(__file__).parent / "goldens")
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "pixel_values")
Read = Callable[[Any, str, Mapping[str, np.ndarray]], Any]


class Case(NamedTuple):
    """info: case.json. expected: expected.npz. params: the base. inputs: what the model is called with. labels: (B, T)
    or (B,). paths: PEFT's module name -> our path."""

    folder: Path
    info: dict[str, Any]
    expected: dict[str, np.ndarray]
    model: nn.Module
    params: Any
    inputs: dict[str, jax.Array]
    labels: jax.Array
    paths: dict[str, str]

    @property
    def targets(self) -> dict[str, str]:
        """Module -> path of what the case's adapter targets."""
        return {module: self.paths[module] for module in self.info["targeted_modules"]}

    def logits(self, bound: Any) -> jax.Array:
        """Of a bound tree, or of plain params."""
        return lj.lift(self.model.apply, strict=True)(bound, **self.inputs)

    def loss(self, bound: Any) -> jax.Array:
        """`loss_of` the logits."""
        return self.loss_of(self.logits(bound))

    def loss_of(self, logits: jax.Array) -> jax.Array:
        """`clm`, `cls`, `img` or `seq2seq` of the goldens' README: mean over the targets that are not -100."""
        labels = self.labels
        if self.info["loss"] == "clm":
            logits, labels = logits[:, :-1], labels[:, 1:]
        real = labels != -100
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(real, labels, 0))
        return jnp.where(real, each, 0.0).sum() / real.sum().astype(jnp.float32)

    def real(self, logits: Any) -> np.ndarray:
        """The logits that mean something: not those of padding."""
        masked = "attention_mask" in self.inputs and logits.ndim == 3 and "decoder_input_ids" not in self.inputs
        return np.asarray(logits)[np.asarray(self.inputs["attention_mask"]) == 1] if masked else np.asarray(logits)

    def tensors(self, folder: str = "adapter") -> dict[str, np.ndarray]:
        """The adapter's file, names without `base_model.model.`."""
        found = load_file(self.folder / folder / "adapter_model.safetensors")
        return {name.removeprefix("base_model.model."): array for name, array in found.items()}

    def gradients(self) -> dict[str, np.ndarray]:
        """PEFT's gradients under the names of `tensors`."""
        start = "grad/base_model.model."
        return {name.removeprefix(start): x for name, x in self.expected.items() if name.startswith(start)}

    def adapters(self, variant: Any, tensors: Mapping[str, np.ndarray], like: Any, read: Read | None = None) -> Any:
        """Path -> adapter NamedTuple, read from PEFT's tensors; `like` has the adapters' structure (`adapt.shapes()`).

        A leaf is `<module>.<Leaf.peft>`, (out, in, *window) there and (*window, in, out) here, given `like`'s shape.
        `read(variant, module, tensors)` -> fields replaces that, for what is stored otherwise.
        """
        found = {}
        for module, path in self.targets.items():
            if read is not None:
                fields = read(variant, module, tensors)
            else:
                fields = {
                    name: turned(tensors[f"{module}.{leaf.peft}"])
                    for name, leaf in variant.leaves.items() if getattr(like[path], name, None) is not None
                }  # fmt: skip
            found[path] = like[path]._replace(
                **{name: jnp.asarray(x).reshape(getattr(like[path], name).shape) for name, x in fields.items()}
            )
        return found

    def adapt(self, variant: Any) -> Any:
        """`lj.adapt` of the case's targets with one variant (or module -> variant)."""
        sites = lj.sites(lambda params, inputs: self.model.apply(params, **inputs), self.params, self.inputs)
        of = variant if isinstance(variant, Mapping) else dict.fromkeys(self.targets, variant)
        return lj.adapt(sites, [(path, of[module]) for module, path in self.targets.items()])

    def check(self, variant: Any, *, read: Read | None = None, shared: Any = None, merged: bool = True,
              steps: bool = True) -> None:
        """Everything that the golden knows of a variant whose adapter is trained at the case's targets.

        Tolerances are those of the goldens' README. Frozen arrays of the adapter are those that `init` makes;
        shared: those that sites share, slot -> leaf -> array, in their place.
        """
        adapt = self.adapt(variant)
        trainable, frozen = jax.jit(adapt.init)(jax.random.key(0), self.params)
        frozen = frozen if shared is None else frozen._replace(shared=shared)
        trainable = self.adapters(variant, self.tensors(), trainable, read)
        bind = functools.partial(adapt.bind, frozen=frozen)
        logits = jax.jit(lambda tr: self.logits(bind(tr)))(trainable)
        close(self.real(logits), self.real(self.expected["logits_adapter"]), atol=1e-4, rtol=1e-4)
        step = jax.jit(jax.value_and_grad(lambda tr: self.loss(bind(tr))))
        loss, grads = step(trainable)
        close(loss, self.expected["loss0"], atol=2e-5)
        jax.tree.map(
            lambda have, want: close(have, want, atol=5e-5, rtol=1e-3),
            grads, self.adapters(variant, self.gradients(), trainable, read),
        )  # fmt: skip
        if merged:
            self.check_merged(jax.jit(adapt.merge)(trainable, frozen))
        if steps:
            close(adamw(step, trainable, self.info["optimizer"]), self.expected["train_losses"], atol=1e-4)

    def check_merged(self, params: Any) -> None:
        """The case's sample weights and logits after merging."""
        flat = {jax.tree_util.keystr(path, simple=True, separator="/"): x
                for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}  # fmt: skip
        for module in self.info["merged_samples"]:
            path, want = self.paths[module], self.expected[f"merged/{module}.weight"]
            close(flat[path], to_ours(want, layout(self.model.config).tensors[path].form), atol=2e-5)  # type: ignore
        close(self.real(self.logits(params)), self.real(self.expected["logits_merged"]), atol=1e-4, rtol=1e-4)


def load(name: str, **overrides: Any) -> Case:
    """The case `name`; `overrides` are fields of the model's configuration."""
    folder = ROOT / "cases" / name
    info = json.loads((folder / "case.json").read_text())
    base = ROOT / "bases" / Path(info["base"]).name
    model = model_from_hf(json.loads((base / "config.json").read_text()), **overrides)
    params = params_from_hf(model.config, load_file(base / "model.safetensors")).variables  # type: ignore[attr-defined]
    arrays = {file.stem: np.load(file) for file in folder.glob("*.npy")}
    inputs = {key: jnp.asarray(x if x.dtype == np.float32 else x.astype(np.int32))
              for key, x in arrays.items() if key in INPUTS}  # fmt: skip
    with np.load(folder / "expected.npz") as file:
        expected = {key: file[key] for key in file}
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].transpose(0, 2, 3, 1)
    modules = hf_modules(model.config)  # type: ignore[attr-defined]
    paths = {theirs: ours for ours, names in modules.items() for theirs in names}
    return Case(folder, info, expected, model, params, inputs, jnp.asarray(arrays["labels"].astype(np.int32)), paths)


def variables(model: nn.Module, *inputs: Any, scale: float = 0.3, seed: int = 0) -> Any:
    """Normal random variables of the shapes that `model.init(key, *inputs)` would give; variances positive."""
    rng = np.random.default_rng(seed)

    def draw(path: Any, like: Any) -> jax.Array:
        x = rng.normal(0, scale, like.shape).astype(np.float32)
        return jnp.asarray(np.abs(x) + 0.5 if path[-1].key == "var" else x)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), *inputs))


def adamw(step: Callable[[Any], tuple[jax.Array, Any]], trainable: Any, settings: Mapping[str, Any]) -> np.ndarray:
    """The losses before each step of `settings['steps']` AdamW steps, and after the last."""
    tx = optax.adamw(settings["lr"], *settings["betas"], eps=settings["eps"], weight_decay=settings["weight_decay"])
    update, state, losses = jax.jit(tx.update), tx.init(trainable), []
    for _ in range(settings["steps"]):
        loss, grads = step(trainable)
        losses.append(loss)
        with jax.numpy_dtype_promotion("standard"):  # optax's bias correction mixes a float with its counter
            updates, state = update(grads, state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    return np.asarray([*losses, step(trainable)[0]])


def turned(array: np.ndarray) -> np.ndarray:
    """(out, in, *window) -> (*window, in, out); a vector as it is."""
    return array if array.ndim < 2 else to_ours(array, "conv")


def close(have: Any, want: Any, *, atol: float, rtol: float = 0.0) -> None:
    np.testing.assert_allclose(have, want, atol=atol, rtol=rtol)
