"""Where arrays live: meshes, rules for base weights, what follows from them for adapters, and several processes."""
