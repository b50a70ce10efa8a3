"""PEFT adapter folders: `adapter_config.json` and `adapter_model.safetensors`, read into rules and arrays, and written.

    names = lorajax.models.adapter_names(model.config)
    found = peft.read(folder, sites, names)
    adapt = lj.adapt(sites, found.rules)
    trainable, frozen = peft.fill(found, *adapt.init(key, params))
    ...
    peft.write(folder, adapt, trainable, frozen, names)
"""

from lorajax.io.peft_fill import fill
from lorajax.io.peft_methods import METHODS, REFUSED
from lorajax.io.peft_read import Read, read
from lorajax.io.peft_write import content, write
from lorajax.io.tensors import AdapterError

__all__ = ["METHODS", "REFUSED", "AdapterError", "Read", "content", "fill", "read", "write"]
