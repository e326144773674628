"""What the network sees: sources, order, augmentation on the host and on the device."""
