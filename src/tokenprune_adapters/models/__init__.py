"""Whole models: where each kind keeps its tower, projector and language model."""
