"""Quantization with calibration data: outputs are kept, not weights."""
