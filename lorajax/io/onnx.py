"""Reads the weights of an ONNX file that PyTorch exported, under the names that they had in PyTorch.

Read by the `onnx` package (extra: weights). Export gives the weights of linear layers up as anonymous constants, (in,
out); their names are those of the nodes that multiply by them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lorajax.io.hf import Checkpoint


def read_onnx(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Every initialiser: by its name or, for an anonymous matrix of a linear layer, `<module>.weight` as (out, in).

    Other anonymous constants are named `<module>.constant_<n>`, n counting those of that module.
    Errors: FileNotFoundError; ImportError without the `onnx` package; ValueError for a damaged file and for weights
    that are in other files.
    """
    try:
        import onnx
    except ImportError as error:
        raise ImportError("ONNX files are read by the package onnx: pip install 'lorajax[weights]'") from error
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"no file {str(file)!r}")
    try:
        graph = onnx.load(file, load_external_data=False).graph
        outside = [tensor.name for tensor in graph.initializer if onnx.external_data_helper.uses_external_data(tensor)]
        arrays = {} if outside else {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    except Exception as error:  # protobuf's errors have no public base class
        message = f"{str(file)!r} is truncated or not ONNX ({type(error).__name__}): download it again"
        raise ValueError(message) from error
    if not graph.node:
        raise ValueError(f"{str(file)!r} is truncated or not ONNX: it has no operations")
    if outside:
        raise ValueError(f"{str(file)!r} keeps {len(outside)} weights in other files: save it as one")
    found = {name: array for name, array in arrays.items() if not name.startswith("onnx::")}
    for node in graph.node:
        module = ".".join(node.name.strip("/").split("/")[:-1])
        for name in node.input:
            if name in arrays and name not in found and name.startswith("onnx::"):
                array = arrays.pop(name)
                if node.op_type == "MatMul" and array.ndim == 2:
                    found[f"{module}.weight"] = np.ascontiguousarray(array.T)
                else:
                    count = sum(other.startswith(f"{module}.constant_") for other in found)
                    found[f"{module}.constant_{count}"] = array
    return found


def open_dinov2(file: str | os.PathLike[str], prefix: str = "backbone.") -> Checkpoint:
    """A DINOv2 encoder in an ONNX file, its modules below `prefix`, in the layout of a Hugging Face folder.

    Whatever the file has beside the encoder (a decoder, a head) is in the tensors under its own name, to be ignored by
    name. Heads are 64 wide, as in every DINOv2.
    Errors: those of `read_onnx`; ValueError if there is no such encoder.
    """
    found = read_onnx(file)
    patch, table = f"{prefix}embeddings.patch_embeddings.projection.weight", f"{prefix}embeddings.position_embeddings"
    if patch not in found:
        raise ValueError(f"{os.fspath(file)!r} has no {patch!r}; it has {sorted(found)[:8]}")
    if table not in found:  # folded into its first row and the rest, which the graph resizes to the image
        parts = sorted((name for name in found if name.startswith(f"{prefix}embeddings.constant_")),
                       key=lambda name: found[name].shape[1])  # fmt: skip
        if len(parts) != 2 or found[parts[0]].shape[1] != 1:
            raise ValueError(f"{os.fspath(file)!r} has no position embeddings below {prefix!r}")
        found[table] = np.concatenate([found.pop(name) for name in parts], axis=1)
    return Checkpoint(_dinov2_config(found, prefix, patch, table), {  # type: ignore[arg-type]
        re.sub("^" + re.escape(prefix), "dinov2.", name): array for name, array in found.items()
    })  # fmt: skip


def _dinov2_config(found: Mapping[str, np.ndarray], prefix: str, patch: str, table: str) -> dict[str, Any]:
    width, channels, size, _ = found[patch].shape
    layers = {match.group(1) for name in found
              if (match := re.match(re.escape(prefix) + r"encoder\.layer\.(\d+)\.", name))}  # fmt: skip
    return {
        "model_type": "dinov2", "hidden_size": width, "num_channels": channels, "patch_size": size,
        "image_size": round((found[table].shape[1] - 1) ** 0.5) * size, "num_hidden_layers": len(layers),
        "num_attention_heads": width // 64, "hidden_act": "gelu", "layer_norm_eps": 1e-6,
        "mlp_ratio": found[f"{prefix}encoder.layer.0.mlp.fc1.weight"].shape[0] / width,
    }  # fmt: skip
