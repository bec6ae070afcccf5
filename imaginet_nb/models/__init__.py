"""The network: no-down ResNet, checkpoints, fast inference."""
