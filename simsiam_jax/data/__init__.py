"""The input pipeline: sources, index sampling, augmentation on the host and on the device."""
