"""How good and how fast a model is: evaluation, partial models, sensitivity, latency."""
