"""From uint8 images to what a vision model reads, on the device and inside the step: flip, crop, scale, resize."""

import jax
import jax.numpy as jnp

# Of ImageNet, per channel: what DINOv2's and the published ResNets' inputs are scaled by.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def augmented(pixels: jax.Array, key: jax.Array, pad: int, flip: bool) -> jax.Array:
    # (B, H, W, C) -> the same shape and dtype: each image is mirrored or not, then shifted by up to `pad` pixels with
    # black moving in. A function of the key alone, which the step makes of the run's seed and the step's number.
    flip_key, shift_key = jax.random.split(key)
    if flip:
        mirrored = jax.random.bernoulli(flip_key, 0.5, (len(pixels), 1, 1, 1))
        pixels = jnp.where(mirrored, pixels[:, :, ::-1], pixels)
    if not pad:
        return pixels
    wide = jnp.pad(pixels, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(shift_key, (len(pixels), 2), 0, 2 * pad + 1)
    cut = lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), pixels.shape[1:])  # noqa: E731
    return jax.vmap(cut)(wide, corners)


def prepared(pixels: jax.Array, size: int) -> jax.Array:
    # uint8 (B, H, W, C) -> float32 (B, size, size, C), scaled; bicubic where the size changes.
    mean, std = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, -1) for x in (MEAN, STD))
    x = (pixels.astype(jnp.float32) / 255.0 - mean) / std
    if x.shape[1:3] == (size, size):
        return x
    return jax.image.resize(x, (x.shape[0], size, size, x.shape[3]), "cubic")
