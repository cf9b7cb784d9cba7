"""Slices in torch: conversion, the parity gate, and the way back into ONNX."""

from ndonnx.convert.torch_slice import Grid, TorchSlice, check_parity, relative_error, to_torch, write_back

__all__ = ["Grid", "TorchSlice", "check_parity", "relative_error", "to_torch", "write_back"]
