"""Reads the Metal Shading Language far enough to run or check it on another machine."""
