"""Files: pretrained checkpoints, pinned assets, fingerprints, adapters."""
