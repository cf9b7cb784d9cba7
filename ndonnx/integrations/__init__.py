"""ndonnx inside other people's pipelines: thin files over the public API, one for each tool, each behind an extra."""
