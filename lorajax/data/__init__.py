"""Text and image classification data: tasks, loading, tokens, batches, metrics. Knows nothing of models or adapters.

::

    spec = task("rte")
    splits = load_glue("rte")                              # or load_reviews(archive) for the task "reviews"
    tokens = tokenize(splits["train"], load_tokenizer(folder), max_length=128)
    stream = Batches(tokens, 32, seed=0).stream()          # batches without end; stream.position is all to be saved
    evaluate(spec, outputs, labels, weight)[spec.headline]
"""

from lorajax.data.batches import Batch, Batches, Position, Stream, bucket_lengths
from lorajax.data.glue import load_glue
from lorajax.data.images import IMAGES, ImageBatches, Images, load_images
from lorajax.data.metrics import METRICS, evaluate, majority
from lorajax.data.reviews import load_reviews
from lorajax.data.tasks import GLUE, TASKS, Examples, Task, task
from lorajax.data.tokens import Tokens, load_tokenizer, tokenize

__all__ = [
    "GLUE",
    "IMAGES",
    "METRICS",
    "TASKS",
    "Batch",
    "Batches",
    "Examples",
    "ImageBatches",
    "Images",
    "Position",
    "Stream",
    "Task",
    "Tokens",
    "bucket_lengths",
    "evaluate",
    "load_glue",
    "load_images",
    "load_reviews",
    "load_tokenizer",
    "majority",
    "task",
    "tokenize",
]
