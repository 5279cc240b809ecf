"""What a trained model can do: held-out loss, benchmarks, text."""
