"""Which teachers the method reaches: a corpus, and any ONNX files, taken through `ndonnx compress`.

python -m benchmarks.coverage [MODEL_OR_DIR ...] [--out coverage.json] [--only NAME] [--cache DIR] [--steps N]
"""
