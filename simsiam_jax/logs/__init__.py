"""Terminal, metrics.jsonl, TensorBoard, W&B and MLflow."""
