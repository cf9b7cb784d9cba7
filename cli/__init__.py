"""The command line of ndonnx: flags in, a recipe through the library, tables or JSON out.

Nothing heavy is imported at module level, so that `--help` answers at once.
"""
