"""How many programs a whole run compiles, and that the next run compiles none of them again."""

import os
import threading
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_glue import files, folder, own_cache, rows, words  # noqa: F401

from experiments import glue
from lorajax import config
from lorajax.train.compiled import PRESETS, Ahead, Ready, compile_cache, compiler_flags


class Compiled:
    """Programs that XLA was asked for inside, by the name of the jitted function; hits: taken from the cache."""

    def __enter__(self):
        self.names, self.hits, self.threads = Counter(), 0, Counter()
        jax.monitoring.register_event_duration_secs_listener(self._seconds)
        jax.monitoring.register_event_listener(self._event)
        return self

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._seconds)
        jax.monitoring.unregister_event_listener(self._event)

    def _seconds(self, name, _, **more):
        if name.endswith("backend_compile_duration"):
            name = more.get("fun_name", "")
            self.names[name] += 1
            self.threads[name, threading.current_thread().name.split("_")[0]] += 1

    def _event(self, name, **_):
        self.hits += name.endswith("cache_hits")


@pytest.mark.parametrize(("method", "views", "n"), [
    ("adalora", 0, 2),  # the budget shrinks at every step and ranks die: masks, never shapes
    ("dylora", 1, 1),  # a rank is drawn at every step, and each evaluation is also at each of the ranks: masks again
])  # fmt: skip
def test_a_whole_run_compiles_a_program_for_each_length(files, tmp_path, method, views, n):  # noqa: F811
    """One step and one evaluation for each padded length (twice that for a method with views: one program for all its
    ranks) and nothing again, for two epochs, evaluations, checkpoints, the best state taken back, the summary."""
    with Compiled() as seen:
        glue.main(words(files, tmp_path, method, ",rank=2,targets=qv", "--config.shapes=2", "--config.probe=false",
                        "--config.eval_batch=8", "--config.eval_every=8", "--config.save_every=3",
                        f"--config.steps_per_call={n}"))  # fmt: skip
    step = "jit(many)" if n > 1 else "jit(one)"
    assert len([row for row in rows(tmp_path) if "eval/accuracy" in row]) == 2
    assert seen.names[step] == 2, seen.names
    assert seen.names["jit(evaluate)"] == 2 * (1 + views), seen.names
    assert seen.threads[step, "compile"] == seen.threads["jit(evaluate)", "compile"] == 2, seen.threads
    rest = {name: count for name, count in seen.names.items() if name not in (step, "jit(evaluate)")}
    assert rest["jit(init)"] == 1 and max(rest.values()) <= 2, seen.names  # single operations
    # None for the fingerprint, for whether steps were finite, for what is logged of a call (some of DyLoRA's ranks).
    single = {"jit(gather)", "jit(_reduce_all)", *(() if views else ("jit(dynamic_slice)", "jit(squeeze)"))}
    assert rest.keys().isdisjoint(single), rest
    assert seen.threads["jit(init)", "compile"] == 1, seen.threads  # beside the step, and before the loop


def test_a_call_waits_for_its_program():
    """Ahead, by one thread that is busy at first; of an argument that is donated before it begins; once."""
    begin, ready = threading.Event(), Ready(jax.jit(lambda x, key: x + jax.random.uniform(key), donate_argnums=0))
    slow = Ready(jax.jit(lambda x: x if begin.wait(20) else None))
    x, key = jnp.ones(3), jax.random.key(0)
    with Compiled() as seen, Ahead(1) as ahead:
        ahead(slow, x)  # traces until it may go on
        ahead(ready, x, key)
        assert ahead(ready, x, key) is ready.made[next(iter(ready.made))]
        x.delete()
        begin.set()
        found = ready(jnp.ones(3), key)
        np.testing.assert_array_equal(found, 1 + jax.random.uniform(key))
        assert ready.bytes(jnp.ones(3), key) > 0
        np.testing.assert_array_equal(ready(jnp.ones(4), key), 1 + jax.random.uniform(key))  # not one of these
    assert sum(n for (name, thread), n in seen.threads.items() if "lambda" in name and thread == "compile") == 2


def test_presets_come_before_the_users_own_flags(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_triton_gemm=true")
    compiler_flags(PRESETS["quick"])
    assert os.environ["XLA_FLAGS"] == "--xla_gpu_enable_triton_gemm=false --xla_gpu_enable_triton_gemm=true"
    compiler_flags(PRESETS["none"])
    assert os.environ["XLA_FLAGS"].count("triton") == 2
    with pytest.raises(config.ConfigError, match="unknown xla 'fast'.*There are: none, quick"):
        glue.main(["--config=configs/lora.py:smoke", "--xla=fast"])


def test_the_second_run_takes_its_programs_from_the_cache(tmp_path, monkeypatch):
    """On by default, in the user's cache folder; after JAX has forgotten all that it compiled in this process."""
    monkeypatch.setenv("LORAJAX_CACHE", str(tmp_path))
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_persistent_cache_min_compile_time_secs
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()
    try:
        compile_cache()
        assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        hits = []
        for _ in range(2):
            jax.clear_caches()
            with Compiled() as seen:
                jax.jit(lambda x: x @ x + 1)(np.ones((3, 3), np.float32))
            hits.append(seen.hits)
        assert hits == [0, 1] and list((tmp_path / "xla").iterdir())
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before[1])
        compilation_cache.reset_cache()
