"""The main experiment on meshes of eight devices: the numbers, the adapters and the ranks are those of one device."""

import json
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from safetensors.numpy import load_file
from tiny import glue_folder, model_folder

from experiments import glue
from lorajax.shard.mesh import MeshError

MESHES: dict[str, dict[str, int]] = {
    "data 8": {"data": -1},
    "fsdp 8": {"fsdp": 8},
    "tensor 4 x data 2": {"tensor": 4, "data": 2},
    "fsdp 2 x tensor 2 x data 2": {"fsdp": 2, "tensor": 2, "data": -1},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> Any:
    root = tmp_path_factory.mktemp("tiny")
    return model_folder(root / "model"), glue_folder(root / "data")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAJAX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
        before = jax.config.jax_compilation_cache_dir
        yield
        jax.config.update("jax_compilation_cache_dir", before)
        compilation_cache.reset_cache()


def words(files: Any, workdir: Path, name: str, *more: str) -> list[str]:
    what = "" if name == "full" else ",rank=2,targets=qv"
    return [f"--config=configs/{name}.py:task=sst2,model={files[0]}{what}", f"--config.data={files[1]}",
            f"--workdir={workdir}", "--config.max_length=16", "--config.batch=8", "--config.eval_batch=16",
            "--config.shapes=1", "--config.log_every=1", "--config.dropout=0.1", "--config.lr=1e-2",
            "--config.study=tiny", "--config.probe=false", *more]  # fmt: skip


def run(files: Any, workdir: Path, name: str, mesh: dict[str, int], *more: str) -> Path:
    sizes = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    glue.main(words(files, workdir, name, "--config.epochs=1", *sizes, *more))
    (folder,) = workdir.glob("tiny/*/seed=*")
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def same(one: Path, other: Path) -> None:
    """Losses to 1e-5; what is counted (ranks, accuracy) exactly; adapters, E's zeros included, as far as the losses."""
    assert one.parent.name == other.parent.name  # the mesh is not in the name: the same command goes on elsewhere
    for a, b in zip(rows(one), rows(other), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([b[k] for k in a], [a[k] for k in a], rtol=1e-5)
        assert [v for k, v in a.items() if k.startswith("eval/")] == [v for k, v in b.items() if k.startswith("eval/")]
    ours, theirs = ({name: x for file in (folder / "adapter").glob("*.safetensors") for name, x in
                     load_file(file).items()} for folder in (one, other))  # fmt: skip
    assert ours.keys() == theirs.keys()
    assert ours
    for name, x in ours.items():
        if "key/bias" in name or "key.bias" in name:
            continue  # no attention depends on it: its gradient is rounding alone, which Adam makes steps of
        np.testing.assert_allclose(theirs[name], x, rtol=1e-3, atol=1e-4, err_msg=name)
        if name.endswith("lora_E"):
            np.testing.assert_array_equal(theirs[name] == 0, x == 0)


def test_the_main_experiment_on_all_axes_at_once(files: Any, tmp_path: Path, capsys: Any) -> None:
    one = run(files, tmp_path / "one", "adalora", {})
    spread = run(files, tmp_path / "spread", "adalora", MESHES["fsdp 2 x tensor 2 x data 2"])
    assert re.search(r"attention/query/kernel +16,16 +fsdp, tensor +8,8 +2", capsys.readouterr().out)
    same(one, spread)
    with pytest.raises(MeshError, match="a batch of 8 rows does not divide among data 3 x fsdp 1: the nearest .* is 9"):
        run(files, tmp_path / "three", "adalora", {"data": 3})


def test_a_start_along_singular_vectors_has_the_signs_of_one_device(files: Any, tmp_path: Path) -> None:
    """LoRA-GA's A and B belong to different triplets, so that a sign changes what is learned."""
    one = run(files, tmp_path / "one", "lora_ga", {})
    same(one, run(files, tmp_path / "spread", "lora_ga", MESHES["fsdp 2 x tensor 2 x data 2"]))


def test_a_rule_that_takes_nothing_is_an_error_on_one_device_too(files: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text("from configs.lora import get_config as lora\n\ndef get_config(arg=None):\n    c = lora(arg)\n"
                   "    c.shard = {'a': {'paths': '.*/kwery/kernel', 'axes': 'tensor'}}\n    return c\n")
    (one, *rest) = words(files, tmp_path, "lora")
    with pytest.raises(MeshError, match="'.*/kwery/kernel' matches no weight"):
        glue.main([one.replace("configs/lora.py", str(own)), *rest])


@pytest.mark.slow
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["adalora", "dylora", "dora", "vera", "pissa", "lora_plus", "full"])
def test_methods_on_every_mesh(files: Any, tmp_path: Path, name: str, scan: bool) -> None:
    how = [f"--config.scan_layers={scan}", f"--config.lr={1e-3 if name == 'full' else 1e-2}",
           "--config.accumulate=2" if name == "dora" else "--config.steps_per_call=2"]  # fmt: skip
    one = run(files, tmp_path / "one", name, {}, *how)
    for said, mesh in MESHES.items():
        if name == "dora" and said in ("data 8", "fsdp 8"):
            continue  # four rows in a micro-batch
        same(one, run(files, tmp_path / said.replace(" ", ""), name, mesh, *how))
