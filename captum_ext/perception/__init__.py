"""Perception Visualization: where a network looks, and what it sees there."""

__all__: list[str] = []
