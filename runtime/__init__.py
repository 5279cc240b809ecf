"""What surrounds the training loop: configuration, devices, checkpoints, records, console."""
